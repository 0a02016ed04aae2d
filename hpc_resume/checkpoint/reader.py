"""Reading boxes out of a committed checkpoint: wanted boxes x stored boxes = byte runs, each verified.

Bytes go straight into the destination where it is contiguous memory on the CPU and the wanted part is made of
whole blocks; else through a small buffer, a few blocks at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.batch import Batch, as_type
from hpc_resume.checkpoint.blocks import SEGMENT_BYTES, SINGLE_BLOCK_BYTES, checks
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.index import Entry
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.shardfile import Check, ShardFile
from hpc_resume.checkpoint.structure import TensorRecord
from hpc_resume.errors import IntegrityError

if TYPE_CHECKING:
    import torch

#: One system call reads this much, and it is verified while it is still in the cache.
_READ_BYTES = SEGMENT_BYTES
#: One thread's task: long enough that handing it over costs nothing beside it.
_TASK_BYTES = 24 << 20


class Wanted(NamedTuple):
    """A box to be read.

    Parameters
    ----------
    name
        Of the tensor.
    box
        Which part of it.
    out
        Where it goes: of the box's size, on any device, of any strides and element type.
    """

    name: str
    box: Box
    out: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """What of a stored box goes where."""

    file: ShardFile
    number: int
    entry: Entry
    part: Box
    out: torch.Tensor  # of the part's size


class CheckpointReader:
    """Reads tensors of one checkpoint; every byte that it hands out has been verified.

    Parameters
    ----------
    folder
        The checkpoint, among the others of its run.
    manifest
        Its manifest.
    threads
        That read.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int = 2) -> None:
        self.folder = folder
        self.manifest = manifest
        self._threads = max(threads, 1)
        self._files: dict[int, ShardFile] = {}
        #: Bytes of tensors that were read so far.
        self.bytes_read = 0

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Fill ``out`` with a box of a tensor; see :meth:`read_all`."""
        self.read_all([Wanted(name, box, out)])

    @paused_collector()
    def read_all(self, wanted: Iterable[Wanted]) -> None:
        """Fill tensors with boxes.

        Raises
        ------
        IntegrityError
            If bytes are damaged or missing; the outputs are then undefined.
        """
        tensors = self.manifest.structure.tensors
        batches: dict[int, Batch] = {}
        small: dict[int, tuple[Box, Batch] | None] = {}
        reads: list[Future[int]] = []
        with _Readers(self._threads) as readers:
            for each in wanted:  # the first ones are being read while the next ones are planned
                if each.out.shape != each.box.size:
                    raise ValueError(f"{each.name}: {tuple(each.out.shape)} for a box of {each.box.size}")
                record = tensors[each.name]
                if id(record) not in small:  # thousands of tensors are of few kinds
                    small[id(record)] = self._whole_small(record, batches)
                found = small[id(record)]
                if (
                    found is not None
                    and (each.box is found[0] or each.box == found[0])
                    and found[1].add_whole(each.name, record, each.out)
                ):
                    continue
                for rank, part in self._parts(each):
                    if part.entry.length <= SINGLE_BLOCK_BYTES:
                        whole = part.part is part.entry.box or part.part == part.entry.box
                        slices = None if whole else part.part.slices_in(part.entry.box)
                        self._batch(rank, batches).add(part.number, part.out, slices)
                    else:
                        reads += [readers.submit(_read_rows, task) for task in _split(part)]
            for batch in batches.values():
                reads += [readers.submit(batch.read, group) for group in batch.groups()]
            self.bytes_read += sum(read.result() for read in reads)

    def _batch(self, rank: int, batches: dict[int, Batch]) -> Batch:
        if rank not in batches:
            batches[rank] = Batch(self._open(rank))
        return batches[rank]

    def _whole_small(self, record: TensorRecord, batches: dict[int, Batch]) -> tuple[Box, Batch] | None:
        """Where small tensors of a kind are that one rank stores, each in one piece; None if they are others."""
        layout = record.layout
        if layout is None or len(layout.ranks) > 1 or layout.splits:
            return None
        if not 0 < record.size_bytes <= SINGLE_BLOCK_BYTES:
            return None
        return Box.whole(record.shape), self._batch(layout.ranks[0], batches)

    def private(self, rank: int, prefix: str) -> dict[str, torch.Tensor]:
        """Read what a rank stored for itself, by the rest of the name."""
        import torch

        file = self._open(rank)
        found, parts = {}, []
        for number, name in enumerate(file.index.names):
            if name.startswith(prefix):
                entry = file.index.entry(number)
                if entry.box != Box.whole(entry.shape):
                    raise IntegrityError(f"{file.path}: {entry.name} is stored in part only")
                file.check_there(number)
                out = torch.empty(entry.shape, dtype=dtypes.torch_dtype(entry.dtype))
                found[entry.name.removeprefix(prefix)] = out
                parts.append(_Part(file, number, entry, entry.box, out))
        for part in parts:
            for task in _split(part):
                self.bytes_read += _read_rows(task)
        return found

    def check_size(self, name: str) -> None:
        """Check that a tensor's bytes are there before memory is taken for them.

        Raises
        ------
        IntegrityError
            If a manifest promises more than its shards hold.
        """
        record = self.manifest.structure.tensors[name]
        whole = Box.whole(record.shape)
        stored = 0
        for rank, box in self.manifest.structure.parts(name, whole):
            file, number = self._find(name, rank, box)
            file.check_there(number)
            stored += file.index.entry(number).length
        if whole.volume and stored != record.size_bytes:
            raise IntegrityError(f"{self.folder}: {name}: {stored} bytes of {record.size_bytes} are stored")

    def _parts(self, wanted: Wanted) -> list[tuple[int, _Part]]:
        shape = self.manifest.structure.tensors[wanted.name].shape
        if wanted.box is not Box.whole(shape) and not wanted.box.within(shape):
            raise ValueError(f"{wanted.name}: {wanted.box} is not within {shape}")
        found = []
        for rank, box in self.manifest.structure.parts(wanted.name, wanted.box):
            file, number = self._find(wanted.name, rank, box)
            entry = file.index.entry(number)
            if box is wanted.box or box == wanted.box:
                found.append((rank, _Part(file, number, entry, box, wanted.out)))
                continue
            part = box.intersect(wanted.box)
            assert part is not None
            out = wanted.out[part.slices_in(wanted.box)]
            found.append((rank, _Part(file, number, entry, part, out)))
        return found

    def _find(self, name: str, rank: int, box: Box) -> tuple[ShardFile, int]:
        """Find a stored box in its shard's index."""
        record = self.manifest.structure.tensors[name]
        file = self._open(rank)
        try:
            number = file.index.find(name, box)
        except IntegrityError as error:
            raise IntegrityError(f"{file.path}: {error}") from error
        entry = file.index.entry(number)
        if entry.dtype != record.dtype or entry.shape != record.shape:
            raise IntegrityError(f"{file.path}: {name} is another tensor there")
        return file, number

    def _open(self, rank: int) -> ShardFile:
        if rank not in self._files:
            self._files[rank] = ShardFile.open(self.folder, self.manifest, rank)
        return self._files[rank]


class _Readers:
    """Threads that read; an error leaves what has not begun undone."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hpc-resume-read")

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[[Any], int], task: Any) -> Future[int]:
        """Read something; the result is the number of bytes."""
        return self._pool.submit(function, task)


def _split(part: _Part) -> Iterator[tuple[_Part, int, int]]:
    """Cut a part into tasks of some rows of its stored box, at edges of blocks."""
    entry = part.entry
    if not entry.box.size:
        yield part, 0, 1
        return
    row_bytes = entry.length // entry.box.size[0]
    first = part.part.start[0] - entry.box.start[0]
    stop = first + part.part.size[0]
    # Segments end where reading and verifying is cheapest; a box of one block is one task anyway.
    rows_of_edges = [edge // row_bytes for edge in entry.cut[-1] if edge % row_bytes == 0]
    low = first
    for row in rows_of_edges:
        if low < row < stop and (row - low) * row_bytes >= _TASK_BYTES:
            yield part, low, row
            low = row
    yield part, low, stop


def _read_rows(task: tuple[_Part, int, int]) -> int:
    """Read rows ``low`` to ``high`` of a stored box, as far as they belong to the part; returns bytes read."""
    part, low, high = task
    entry = part.entry
    rows = entry.box.size[0] if entry.box.size else 1
    row_bytes = entry.length // rows
    first_row = part.part.start[0] - entry.box.start[0] if entry.box.size else 0
    out = part.out[low - first_row : high - first_row] if entry.box.size else part.out
    begin, end = low * row_bytes, high * row_bytes
    whole_rows = part.part.size[1:] == entry.box.size[1:]
    plain = out.device.type == "cpu" and out.is_contiguous()
    if whole_rows and plain and dtypes.torch_dtype(entry.dtype) == out.dtype:
        return _read_direct(part, begin, end, _bytes_of(out))
    return _read_through(part, out, low, high, row_bytes)


def _read_direct(part: _Part, begin: int, end: int, into: memoryview) -> int:
    """Read bytes of a stored box to their place; only the blocks at the ends may need a buffer."""
    groups = list(_groups(part.entry, begin, end))
    inner = [group for group in groups if begin <= group[0][0] and group[-1][1] <= end]
    count = part.file.read_checked(part.number, inner, into, begin)
    for group in groups:
        low, high = group[0][0], group[-1][1]
        if low < begin or high > end:
            buffer = memoryview(bytearray(high - low))
            count += part.file.read_checked(part.number, [group], buffer, low)
            inner_low, inner_high = max(low, begin), min(high, end)
            into[inner_low - begin : inner_high - begin] = buffer[inner_low - low : inner_high - low]
    return count


def _groups(entry: Entry, begin: int, end: int) -> Iterator[list[Check]]:
    """Put what verifies a range together into reads; blocks that stick out of the range come alone."""
    group: list[Check] = []
    for check in checks(entry.cut, begin, end):
        out = check[0] < begin or check[1] > end
        if group and (out or check[1] - group[0][0] > _READ_BYTES):
            yield group
            group = []
        group.append(check)
        if out:
            yield group
            group = []
    if group:
        yield group


def _read_through(part: _Part, out: torch.Tensor, low: int, high: int, row_bytes: int) -> int:
    """Read rows through a buffer and copy what belongs to the part: other types, devices, strides, columns."""
    import torch

    entry = part.entry
    count = 0
    row = low
    while row < high:
        end_row = min(high, max(row + 1, row + _READ_BYTES // max(row_bytes, 1)))
        group = list(checks(entry.cut, row * row_bytes, end_row * row_bytes))
        first, last = group[0][0], group[-1][1]
        # Rows whose blocks were read anyway are taken along.
        end_row = min(high, max(end_row, last // row_bytes))
        raw = torch.empty(last - first, dtype=torch.uint8)
        part.file.read_checked(part.number, [group], raw.numpy().data, first)
        count += len(raw)
        inner = entry.box.size[1:]
        size = (end_row - row, *inner) if entry.box.size else ()
        begin = row * row_bytes - first
        source = as_type(raw, begin, begin + (end_row - row) * row_bytes, entry.dtype).view(size)
        if entry.box.size:
            columns = (slice(None), *part.part.slices_in(entry.box)[1:])
            out[row - low : end_row - low].copy_(source[columns])
        else:
            out.copy_(source)
        row = end_row
    return count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_like(record: TensorRecord, *, dtype: torch.dtype | None, device: str) -> torch.Tensor:
    """Make a tensor of a record's shape, of its own type unless another is asked for."""
    import torch

    return torch.empty(record.shape, dtype=dtype or dtypes.torch_dtype(record.dtype), device=device)
