"""The index of a shard: which boxes it holds, where their bytes lie, and a checksum of every block and segment.

It lies in the shard itself, as the datasets ``index`` (JSON, by columns) and ``checksums`` (xxh3-64 of each box's blocks,
then of its segments, in the order of the index), and the manifest holds one digest over both. Bytes that have not changed
since an earlier checkpoint are not in the shard: the index then says in which file of that checkpoint they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc_resume.checkpoint.blocks import (
    BLOCK_BYTES,
    SINGLE_BLOCK_BYTES,
    Partitions,
    count_checksums,
    partitions,
)
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.checkpoint.fields import listed
from hpc_resume.checkpoint.names import check_names
from hpc_resume.checkpoint.structure import check_shape, integers, string
from hpc_resume.errors import IntegrityError
from hpc_resume.rundir import is_checkpoint_name
from hpc_resume.untrusted import brief, parse_json

SHARD_FILE = re.compile(r"rank-[0-9]{5,9}-of-[0-9]{5,9}(?:\.by-[0-9]{5,9})?\.h5")
#: A longer index or table is neither written nor read: 20,000 tensors take 3 MB, a checksum for each of 2 TB 128 MB.
LONGEST_BYTES = 1 << 27
#: Older shards that one may refer to.
MAX_FILES = 256
#: No filesystem holds a longer one.
_END_OF_FILES = 1 << 62
#: Bytes of a checksum in the table.
CHECKSUM_BYTES = 8

Numbers = npt.NDArray[np.int64]


def shard_file(rank: int, world_size: int, *, by: int | None = None) -> str:
    """File name of one rank's shard; ``by`` is the rank that wrote it in its stead."""
    substitute = "" if by is None else f".by-{by:05d}"
    return f"rank-{rank:05d}-of-{world_size:05d}{substitute}.h5"


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of bytes of a box: in which file, and where.

    Parameters
    ----------
    file
        0 for the shard itself, else a place in the index's files, counting from 1.
    offset, length
        Bytes.
    """

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored box.

    Parameters
    ----------
    name, dtype, shape
        The tensor: components joined by ``/``, element type, shape of the whole.
    box
        Which part of it.
    runs
        Where its bytes are, end to end: elements in C order, little-endian.
    length
        Bytes of the box.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    runs: tuple[Run, ...]
    length: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.box.volume * item_bytes(self.dtype))

    @property
    def cut(self) -> Partitions:
        """Its blocks and segments."""
        return partitions(self.shape, self.box, self.length)


@dataclass(frozen=True, slots=True)
class Kind:
    """What entries of many tensors have in common; dtype, shape and box are those of an :class:`Entry`."""

    dtype: str
    shape: tuple[int, ...]
    box: Box
    length: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        check_shape(self.shape, item_bytes(self.dtype))
        if self.box is not Box.whole(self.shape) and not self.box.within(self.shape):
            raise IntegrityError(f"a box outside its tensor of {brief(self.shape)}")
        object.__setattr__(self, "length", self.box.volume * item_bytes(self.dtype))
        if not self.length:
            raise IntegrityError("an empty box")

    @property
    def cut(self) -> Partitions:
        """Its blocks and segments."""
        return partitions(self.shape, self.box, self.length)


class Index:
    """The boxes of one shard, in columns: there may be very many.

    Parameters
    ----------
    files
        Checkpoint and file name of each earlier shard that runs refer to.
    kinds
        Of entries.
    names, kind_of, runs_of
        Of each entry its tensor, its kind by number, and how many runs it has.
    runs
        File, offset and length of each run, entry by entry.
    checksums
        The table's bytes.

    Raises
    ------
    IntegrityError
        If they contradict each other.
    """

    def __init__(
        self,
        *,
        files: Sequence[tuple[str, str]],
        kinds: Sequence[Kind],
        names: Sequence[str],
        kind_of: Numbers,
        runs_of: Numbers,
        runs: tuple[Numbers, Numbers, Numbers],
        checksums: bytes,
    ) -> None:
        self.files = tuple(files)
        self.kinds = tuple(kinds)
        self.names = tuple(names)
        self.run_files, self.run_offsets, self.run_lengths = runs
        self.table = memoryview(checksums).cast("Q")
        self._check_columns(kind_of, runs_of)
        self.kind_of: list[int] = kind_of.tolist()
        #: Place of each entry's first run, and one past the last run.
        self.first_run = np.concatenate(([0], np.cumsum(runs_of)))
        self._check_runs(kind_of, runs_of)
        #: Place of each entry's first checksum in the table.
        self.first_checksum = self._place_checksums(kind_of)
        self._check_edges(runs_of)
        #: For each file, how far runs reach into it, and how many bytes they take there.
        self.reach = self._measure()
        self._numbers: dict[Any, int] = {name: number for number, name in enumerate(self.names)}
        self._pieces = len(self._numbers) < len(self.names)
        if self._pieces:  # of some tensors there are several boxes
            starts = (self.kinds[kind].box.start for kind in self.kind_of)
            self._numbers = {key: n for n, key in enumerate(zip(self.names, starts, strict=True))}
        if len(self._numbers) < len(self.names):
            raise IntegrityError("a box stands in it twice")
        self._entries: dict[int, Entry] = {}

    def _check_columns(self, kind_of: Numbers, runs_of: Numbers) -> None:
        count = len(self.run_files)
        if {len(kind_of), len(runs_of)} != {len(self.names)} or {
            len(self.run_offsets),
            len(self.run_lengths),
        } != {count}:
            raise IntegrityError("its columns are not of one length")
        if not _within(kind_of, 0, len(self.kinds) - 1) or not _within(runs_of, 1, count):
            raise IntegrityError("a box of no kind, or without runs")
        if int(runs_of.sum()) != count:
            raise IntegrityError(f"{count} runs for boxes of {int(runs_of.sum())}")

    def _check_runs(self, kind_of: Numbers, runs_of: Numbers) -> None:
        """Check where runs lie, and that those of each box are as long as it is."""
        if not _within(self.run_files, 0, len(self.files)):
            raise IntegrityError("a run in a file that it does not name")
        # So that no sum of them leaves 64 bits.
        if not _within(self.run_offsets, 0, _END_OF_FILES - 1) or not _within(
            self.run_lengths, 1, _END_OF_FILES - 1
        ):
            raise IntegrityError("a run at no place, or of no length")
        if self.run_lengths.sum(dtype=np.float64) >= _END_OF_FILES:
            raise IntegrityError("boxes of more bytes than any file can have")
        if len(runs_of):
            total = np.add.reduceat(self.run_lengths, self.first_run[:-1])
            lengths = np.array([kind.length for kind in self.kinds], np.int64)[kind_of]
            if (wrong := np.flatnonzero(total != lengths)).size:
                number = int(wrong[0])
                raise IntegrityError(
                    f"{self.names[number]!r:.100}: {total[number]} bytes for a box of {lengths[number]}"
                )

    def _place_checksums(self, kind_of: Numbers) -> Numbers:
        """Give the place of each entry's first checksum; there must be as many as all need together."""
        least = np.array([max(kind.length // BLOCK_BYTES, 1) for kind in self.kinds], np.int64)
        needed = int(least[kind_of].sum())
        if needed <= len(self.table):  # else blocks are not even counted one by one
            counts = np.zeros(len(self.kinds), np.int64)
            for number in np.unique(kind_of).tolist():
                kind = self.kinds[number]
                counts[number] = 1 if kind.length <= SINGLE_BLOCK_BYTES else count_checksums(kind.cut)
            places = np.concatenate(([0], np.cumsum(counts[kind_of])))
            needed = int(places[-1])
        if needed != len(self.table):
            raise IntegrityError(f"{len(self.table)} checksums instead of {needed} or more")
        return places[:-1]

    def _check_edges(self, runs_of: Numbers) -> None:
        """Check that runs end where blocks do."""
        for number in np.flatnonzero(runs_of > 1).tolist():
            first, last = self.first_run[number : number + 2]
            ends = np.cumsum(self.run_lengths[first:last])
            if not np.isin(ends, self.kinds[self.kind_of[number]].cut[0]).all():
                raise IntegrityError(f"{self.names[number]!r:.100}: a run ends within a block")

    def _measure(self) -> dict[int, tuple[int, int]]:
        end = np.zeros(len(self.files) + 1, np.int64)
        total = end.copy()
        np.maximum.at(end, self.run_files, self.run_offsets + self.run_lengths)
        np.add.at(total, self.run_files, self.run_lengths)
        pairs = zip(end.tolist(), total.tolist(), strict=True)
        return {file: pair for file, pair in enumerate(pairs) if pair[0]}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, in the order of the checksums."""
        return tuple(map(self.entry, range(len(self))))

    def entry(self, number: int) -> Entry:
        """Give one of them."""
        found = self._entries.get(number)
        if found is None:
            kind = self.kinds[self.kind_of[number]]
            place = slice(*self.first_run[number : number + 2])
            columns = (
                column[place].tolist() for column in (self.run_files, self.run_offsets, self.run_lengths)
            )
            runs = tuple(map(Run, *columns))
            found = self._entries[number] = Entry(self.names[number], kind.dtype, kind.shape, kind.box, runs)
        return found

    def number_of(self, name: str) -> int | None:
        """Place of the only box of a tensor; None if there is none, or tensors stand in pieces here."""
        return None if self._pieces else self._numbers.get(name)

    def find(self, name: str, box: Box) -> int:
        """Place of a stored box in the index.

        Raises
        ------
        IntegrityError
            If it is not there.
        """
        number = self._numbers.get((name, box.start) if self._pieces else name)
        if number is not None:
            stored = self.kinds[self.kind_of[number]].box
            if stored is box or stored == box:
                return number
        raise IntegrityError(f"{name}: the box at {list(box.start)} of {list(box.size)} is not in its index")

    def own_extents(self) -> list[tuple[int, int]]:
        """Offset and length of all bytes that this shard holds of its boxes, in any order."""
        own = self.run_files == 0
        return list(zip(self.run_offsets[own].tolist(), self.run_lengths[own].tolist(), strict=True))


def _within(numbers: Numbers, least: int, most: int) -> bool:
    return not len(numbers) or (int(numbers.min()) >= least and int(numbers.max()) <= most)


def encode_index(entries: Sequence[Entry], files: Sequence[tuple[str, str]] = ()) -> bytes:
    """Write an index, without its checksums, as JSON."""
    kinds: dict[tuple[str, tuple[int, ...], Box], int] = {}
    kind_of = [kinds.setdefault((each.dtype, each.shape, each.box), len(kinds)) for each in entries]
    runs = [run for entry in entries for run in entry.runs]
    record = {
        "files": list(files),
        "kinds": [(dtype, shape, box.start, box.size) for dtype, shape, box in kinds],
        "names": [entry.name for entry in entries],
        "kind_of": kind_of,
        "runs_of": [len(entry.runs) for entry in entries],
        "run_files": [run.file for run in runs],
        "run_offsets": [run.offset for run in runs],
        "run_lengths": [run.length for run in runs],
    }
    return json.dumps(record, separators=(",", ":")).encode()


def decode_index(data: bytes, checksums: bytes, *, size_bytes: int) -> Index:
    """Read an index, and check it against itself and against the size of its file.

    Parameters
    ----------
    data, checksums
        Contents of the two datasets.
    size_bytes
        Of the shard.

    Raises
    ------
    IntegrityError
        If it is damaged, or says what can't be.
    """
    try:
        if len(checksums) % CHECKSUM_BYTES:
            raise IntegrityError("its checksums are cut off")
        record = parse_json(data)
        files = [(_checkpoint(checkpoint), _file(file)) for checkpoint, file in listed(record["files"])]
        names, kinds = listed(record["names"]), listed(record["kinds"])
        if len(files) > MAX_FILES:
            raise IntegrityError(f"it refers to {len(files)} other files")
        if not len(kinds) <= len(names) <= len(checksums) // CHECKSUM_BYTES:
            raise IntegrityError(
                f"{len(names)} boxes of {len(kinds)} kinds with {len(checksums)} bytes of checksums"
            )
        if not set(map(type, names)) <= {str}:
            raise TypeError("a name that is no string")
        check_names(names)
        index = Index(
            files=files,
            kinds=[_kind(*kind) for kind in kinds],
            names=names,
            kind_of=_numbers(record["kind_of"]),
            runs_of=_numbers(record["runs_of"]),
            runs=(
                _numbers(record["run_files"]),
                _numbers(record["run_offsets"]),
                _numbers(record["run_lengths"]),
            ),
            checksums=checksums,
        )
    except IntegrityError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise IntegrityError(f"its index is damaged ({type(error).__name__}: {error!s:.200})") from error
    end, total = index.reach.get(0, (0, 0))
    if end > size_bytes:
        raise IntegrityError("a box ends after its file does")
    if total > size_bytes:
        raise IntegrityError("boxes overlap: they are longer than the file")
    return index


def _kind(dtype: Any, shape: Any, start: Any, size: Any) -> Kind:
    extents, begin, sizes = integers(shape), integers(start), integers(size)
    whole = sizes == extents and len(begin) == len(extents) and not any(begin)
    return Kind(string(dtype), extents, Box.whole(extents) if whole else Box(begin, sizes))


def _numbers(values: Any) -> Numbers:
    """Turn a list of integers into an array."""
    if type(values) is not list or not set(map(type, values)) <= {int}:
        raise TypeError("a column of something else than integers")
    return np.array(values, np.int64)


def _checkpoint(name: Any) -> str:
    if not isinstance(name, str) or not is_checkpoint_name(name):
        raise IntegrityError(f"{brief(name)} is no name of a checkpoint")
    return name


def _file(name: Any) -> str:
    if not isinstance(name, str) or not SHARD_FILE.fullmatch(name):
        raise IntegrityError(f"{brief(name)} is no name of a shard")
    return name


def index_digest(data: bytes, checksums: bytes) -> str:
    """32 hex digits of xxh3-128 over an index and its checksums; the manifest holds it."""
    digest = xxhash.xxh3_128(data)
    digest.update(checksums)
    return digest.hexdigest()
