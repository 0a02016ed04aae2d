"""A committed shard as readers see it: its verified index, and its blocks."""

from __future__ import annotations

import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from hpc_resume.checkpoint.index import LONGEST_BYTES, Index, decode_index, index_digest
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.errors import IntegrityError
from hpc_resume.untrusted import open_regular

#: First byte in a box, one past the last, and the place of the checksum among the box's.
Check = tuple[int, int, int]

#: What is read at a time where only a checksum is wanted.
_STREAM_BYTES = 1 << 20
#: What a shard may hold besides boxes, index and checksums: HDF5's own records and gaps, several times over. More
#: would only be there to be read by whoever verifies it; holes in a file cost nothing.
_MOST_REST_BYTES = 1 << 20
_MOST_REST_BYTES_PER_BOX = 1 << 14


class ShardFile:
    """One shard, open for reading.

    Parameters
    ----------
    path
        The file.
    fd
        Its descriptor, owned from now on.
    size_bytes
        As recorded.
    index
        Its verified index.
    """

    def __init__(self, path: Path, fd: int, size_bytes: int, index: Index) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.index = index
        self._fds = {0: fd}
        self._starts: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, manifest: Manifest, rank: int) -> ShardFile:
        """Open the shard of a rank and verify its index.

        Raises
        ------
        IntegrityError
            If it is gone, or damaged; the message names the file.
        """
        record = manifest.shards[rank]
        path = folder / record.file
        fd = _open(path)
        try:
            if max(record.index[1], record.table[1]) > LONGEST_BYTES:
                raise IntegrityError(f"an index of {record.index[1]} bytes, checksums of {record.table[1]}")
            size_bytes = os.fstat(fd).st_size
            if size_bytes != record.size_bytes:
                raise IntegrityError(f"{size_bytes} bytes, but {record.size_bytes} were written")
            data, table = _read_bytes(fd, *record.index), _read_bytes(fd, *record.table)
            if index_digest(data, table) != record.digest:
                raise IntegrityError("its index is not what was written (xxh3 differs)")
            index = decode_index(data, table, size_bytes=size_bytes)
            rest = size_bytes - index.reach.get(0, (0, 0))[1] - len(data) - len(table)
            if rest > _MOST_REST_BYTES + _MOST_REST_BYTES_PER_BOX * len(index):
                raise IntegrityError(f"{rest} bytes of it belong to nothing")
            unknown = {checkpoint for checkpoint, _ in index.files} - set(manifest.refers)
            if unknown:
                raise IntegrityError(f"it refers to {min(unknown)}, of which the manifest does not know")
        except (IntegrityError, OSError, MemoryError) as error:
            os.close(fd)
            raise _about(path, error) from error
        return cls(path, fd, record.size_bytes, index)

    def close(self) -> None:
        """Close this file and those that it refers to."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def rest_checksum(self) -> str:
        """Xxh3-64 over all bytes that belong to no box: headers, index, checksums, padding.

        Raises
        ------
        IntegrityError
            If boxes overlap, or the file is shorter than recorded.
        """
        return _rest_checksum(self._fds[0], self.size_bytes, sorted(self.index.own_extents()))

    def read(self, file: int, offset: int, into: memoryview) -> None:
        """Read bytes, unverified.

        Parameters
        ----------
        file
            0 for this shard, else a place in the index's files, counting from 1.
        offset
            In that file.
        into
            Where they go.

        Raises
        ------
        IntegrityError
            If there are fewer; the message names the file.
        """
        try:
            _read_exactly(self._fd(file), offset, into)
        except (IntegrityError, OSError) as error:
            raise _about(self._path(file), error) from error

    def read_checked(
        self, number: int, groups: Iterable[Sequence[Check]], into: memoryview, begin: int = 0
    ) -> int:
        """Read stretches of a box, and verify each while it is in the cache; returns their bytes.

        Parameters
        ----------
        number
            Of the box in the index.
        groups
            For each stretch the blocks or segments that cover it, the last one up to its end; see
            :func:`blocks.checks`.
        into
            Where the box's bytes go from ``begin`` on.
        begin
            Byte of the box.
        """
        entry = self.index.entry(number)
        digest, table = xxhash.xxh3_64_intdigest, self.index.table
        first = int(self.index.first_checksum[number])
        run = entry.runs[0]
        fd = self._fd(run.file) if len(entry.runs) == 1 else None
        total = 0
        for checks in groups:
            low, high = checks[0][0], checks[-1][1]
            stretch = into[low - begin : high - begin]
            if fd is None or not _reads(fd, run.offset + low, stretch):
                self._read_runs(number, low, stretch)  # or it says what is wrong
            for start, end, place in checks:
                if digest(stretch[start - low : end - low]) != table[first + place]:
                    raise self._damage(number, start, end - start)
            total += high - low
        return total

    def _read_runs(self, number: int, begin: int, into: memoryview) -> None:
        """Read a stretch of a box from wherever its parts are."""
        runs, starts = self.index.entry(number).runs, self._run_starts(number)
        end = begin + len(into)
        for turn in range(bisect_right(starts, begin) - 1, len(runs)):
            run, position = runs[turn], starts[turn]
            if position >= end:
                break
            low, high = max(begin, position), min(end, position + run.length)
            self.read(run.file, run.offset + low - position, into[low - begin : high - begin])

    def verify(self, numbers: Sequence[int], found: Sequence[int]) -> None:
        """Compare boxes of one block each with their checksums.

        Parameters
        ----------
        numbers
            Of the boxes in the index.
        found
            Checksums of what was read.

        Raises
        ------
        IntegrityError
            If one differs; the message names the file, the tensor and the bytes.
        """
        places = self.index.first_checksum[np.array(numbers, np.int64)]
        differs = np.asarray(self.index.table)[places] != np.array(found, np.uint64)
        if differs.any():
            number = numbers[int(np.argmax(differs))]
            raise self._damage(number, 0, self.index.entry(number).length)

    def _damage(self, number: int, position: int, length: int) -> IntegrityError:
        """Say which bytes of a box differ from what was written."""
        file, offset = self._whereabouts(number, position)
        return IntegrityError(
            f"{self._path(file)}: {self.index.names[number]}: bytes {offset} to {offset + length} are not "
            "what was written (xxh3 differs)"
        )

    def _whereabouts(self, number: int, position: int) -> tuple[int, int]:
        """File and offset of a byte of a box."""
        starts = self._run_starts(number)
        place = bisect_right(starts, position) - 1
        run = self.index.entry(number).runs[place]
        return run.file, run.offset + position - starts[place]

    def _run_starts(self, number: int) -> list[int]:
        """Byte positions in a box at which its runs begin."""
        runs = self.index.entry(number).runs
        if len(runs) == 1:
            return [0]
        if number not in self._starts:
            self._starts[number] = [0, *itertools.accumulate(run.length for run in runs[:-1])]
        return self._starts[number]

    def check_there(self, number: int) -> None:
        """Check that the files that hold a box are long enough for all that they are said to hold.

        Raises
        ------
        IntegrityError
            If one is not; the message names it.
        """
        for file in {run.file for run in self.index.entry(number).runs}:
            self._fd(file)

    def _fd(self, file: int) -> int:
        with self._lock:
            if file not in self._fds:
                fd = _open(self._path(file))
                end, total = self.index.reach[file]
                if max(end, total) > (size_bytes := os.fstat(fd).st_size):
                    os.close(fd)
                    raise IntegrityError(f"{self._path(file)}: {size_bytes} bytes, but {end} are referred to")
                self._fds[file] = fd
            return self._fds[file]

    def _path(self, file: int) -> Path:
        if file == 0:
            return self.path
        checkpoint, name = self.index.files[file - 1]
        return self.path.parent.parent / checkpoint / name


def _open(path: Path) -> int:
    """Open a shard; neither it nor its folder may be a link, which could lead anywhere."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return open_regular(path.name, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        error.filename = str(path)  # it knows a name in the folder, or the folder
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error


def _about(path: Path, error: Exception) -> IntegrityError:
    """Say of which file an error is; the system's, too, then knows it, for whoever looks whether it may pass."""
    told = IntegrityError(f"{path}: {error}")
    if isinstance(error, OSError):
        error.filename = str(path)
    return told


def _reads(fd: int, offset: int, into: memoryview) -> bool:
    """Read by one system call; whether it gave all."""
    try:
        return os.preadv(fd, [into], offset) == len(into)
    except OSError:
        return False


def _read_exactly(fd: int, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise IntegrityError(f"the file ends at byte {offset + done}")
        done += count


def _read_bytes(fd: int, offset: int, length: int) -> bytes:
    data = bytearray(length)
    _read_exactly(fd, offset, memoryview(data))
    return bytes(data)


def _rest_checksum(fd: int, size_bytes: int, extents: Sequence[tuple[int, int]]) -> str:
    """Xxh3-64 over all bytes of a file outside the extents: headers, index, checksums, padding.

    Parameters
    ----------
    fd
        The open file.
    size_bytes
        Its size as recorded.
    extents
        Offset and length of each stretch of tensors' bytes.

    Raises
    ------
    IntegrityError
        If they overlap or the file is shorter than recorded.
    """
    digest = xxhash.xxh3_64()
    position = 0
    for offset, length in [*sorted(extent for extent in extents if extent[1]), (size_bytes, 0)]:
        if offset < position:
            raise IntegrityError(f"two boxes overlap at byte {offset}")
        while position < offset:
            data = os.pread(fd, min(offset - position, _STREAM_BYTES), position)
            if not data:
                raise IntegrityError(f"the file ends at byte {position} of {size_bytes}")
            digest.update(data)
            position += len(data)
        position = offset + length
    return digest.hexdigest()
