"""The index of a shard: which boxes it holds, where their bytes lie, and a checksum of every block and segment.

It lies in the shard itself, as the datasets ``index`` (JSON) and ``checksums`` (xxh3-64 of each box's blocks, then of its
segments, in the order of the index), and the manifest holds one digest over both. Bytes that have not changed since an earlier
checkpoint are not in the shard: the index then says in which file of that checkpoint they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from hpc_resume.checkpoint.structure import check_names, check_shape
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


class Index:
    """The boxes of one shard.

    Parameters
    ----------
    entries
        In the order of the checksums.
    checksums
        The table's bytes.
    files
        Checkpoint and file name of each earlier shard that runs refer to.
    """

    def __init__(
        self, entries: Sequence[Entry], checksums: bytes, files: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.entries = tuple(entries)
        self.files = tuple(files)
        #: For each file, how far runs reach into it, and how many bytes they take there.
        self.reach: dict[int, tuple[int, int]] = {}
        self.checksums = checksums
        self.table = memoryview(checksums).cast("Q")
        self.first_checksum: list[int] = []
        self._find: dict[tuple[str, tuple[int, ...]], int] = {}
        place = 0
        for number, entry in enumerate(self.entries):
            self.first_checksum.append(place)
            self._find[entry.name, entry.box.start] = number
            place += 1 if entry.length <= SINGLE_BLOCK_BYTES else count_checksums(entry.cut)
            for run in entry.runs:
                end, total = self.reach.get(run.file, (0, 0))
                self.reach[run.file] = max(end, run.offset + run.length), total + run.length
        if place != len(self.table) or len(self._find) != len(self.entries):
            raise IntegrityError(
                f"{len(self.table)} checksums instead of {place}, or a box that stands twice"
            )

    def find(self, name: str, box: Box) -> int:
        """Place of a stored box in the index.

        Raises
        ------
        IntegrityError
            If it is not there.
        """
        number = self._find.get((name, box.start))
        if number is None or (self.entries[number].box is not box and self.entries[number].box != box):
            raise IntegrityError(
                f"{name}: the box at {list(box.start)} of {list(box.size)} is not in its index"
            )
        return number

    def own_extents(self) -> Iterator[tuple[int, int]]:
        """Offset and length of all bytes that this shard holds of its boxes, in any order."""
        for entry in self.entries:
            for run in entry.runs:
                if run.file == 0:
                    yield run.offset, run.length


def encode_index(entries: Sequence[Entry], files: Sequence[tuple[str, str]] = ()) -> bytes:
    """Write an index, without its checksums, as JSON."""
    rows = [
        [
            entry.name,
            entry.dtype,
            entry.shape,
            entry.box.start,
            entry.box.size,
            [(run.file, run.offset, run.length) for run in entry.runs],
        ]
        for entry in entries
    ]
    return json.dumps({"files": list(files), "pieces": rows}, separators=(",", ":")).encode()


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
        if len(files) > MAX_FILES:
            raise IntegrityError(f"it refers to {len(files)} other files")
        pieces = listed(record["pieces"])
        _check_types(pieces)
        entries = []
        blocks = len(checksums) // CHECKSUM_BYTES
        for name, dtype, shape, start, size, runs in pieces:
            extents, begin = tuple(shape), tuple(start)
            whole = size == shape and not any(begin) and len(begin) == len(extents)
            entry = Entry(
                name,
                dtype,
                extents,
                Box.whole(extents) if whole else Box(begin, tuple(size)),
                tuple([Run(*run) for run in runs]),
            )
            blocks -= _check(entry, len(files), size_bytes, blocks)
            entries.append(entry)
        index = Index(entries, checksums, files)
    except IntegrityError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise IntegrityError(f"its index is damaged ({type(error).__name__}: {error!s:.200})") from error
    if index.reach.get(0, (0, 0))[1] > size_bytes:
        raise IntegrityError("boxes overlap: they are longer than the file")
    return index


def _check_types(pieces: Any) -> None:
    """Check that rows of an index are made of strings and 64-bit integers: all at once, for there are many."""
    names: list[Any] = []
    dtypes: set[Any] = set()
    lists: list[Any] = []
    numbers: list[Any] = []
    for name, dtype, shape, start, size, runs in pieces:
        names.append(name)
        dtypes.add(dtype)
        lists += (shape, start, size, runs)
        lists += runs
        numbers += shape
        numbers += start
        numbers += size
        for run in runs:
            numbers += run
    if not set(map(type, lists)) <= {list} or not set(map(type, numbers)) <= {int}:
        raise TypeError("a row of something else than lists of integers")
    if not {*map(type, names), *map(type, dtypes)} <= {str}:
        raise TypeError("a name or an element type that is no string")
    if numbers and (max(numbers) >= 1 << 63 or min(numbers) <= -1 << 63):
        raise ValueError("a number of more than 64 bits")
    check_names(names)


def _check(entry: Entry, files: int, size_bytes: int, blocks: int) -> int:
    """Check one entry; returns how many checksums it must have at least, of those that are left."""
    check_shape(entry.shape, item_bytes(entry.dtype))
    inside = entry.box is Box.whole(entry.shape) or entry.box.within(entry.shape)
    if not inside or not entry.length:
        raise IntegrityError(f"{entry.name!r:.100}: an empty box, or one outside its tensor")
    least = max(entry.length // BLOCK_BYTES, 1)
    if least > blocks:  # before its blocks are counted one by one
        raise IntegrityError(f"{entry.name!r:.100}: {entry.length} bytes, but {blocks} checksums are left")
    total = 0
    for run in entry.runs:
        if run.offset < 0 or run.length <= 0 or not 0 <= run.file <= files:
            raise IntegrityError(f"{entry.name!r:.100}: {run}")
        if run.offset + run.length > (size_bytes if run.file == 0 else _END_OF_FILES):
            raise IntegrityError(f"{entry.name!r:.100}: a box ends after its file does")
        total += run.length
    if total != entry.length:
        raise IntegrityError(f"{entry.name!r:.100}: {total} bytes for a box of {entry.length}")
    if len(entry.runs) > 1:
        edges = set(entry.cut[0])
        position = 0
        for run in entry.runs:
            position += run.length
            if position not in edges:
                raise IntegrityError(f"{entry.name!r:.100}: a run ends within a block")
    return least


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
