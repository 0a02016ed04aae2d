"""A committed shard as readers see it: its verified index, and its blocks."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import xxhash

from hpc_resume.checkpoint.index import Index, decode_index, index_digest
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.errors import IntegrityError

#: First byte in a box, one past the last, and the place of the checksum among the box's.
Check = tuple[int, int, int]

#: What is read at a time where only a checksum is wanted.
_STREAM_BYTES = 1 << 20
#: An index may not be longer than this part of an address space; 20,000 tensors take 3 MB.
_LONGEST_INDEX_BYTES = 1 << 30


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
            if max(record.index[1], record.table[1]) > _LONGEST_INDEX_BYTES:
                raise IntegrityError(f"an index of {record.index[1]} bytes")
            size_bytes = os.fstat(fd).st_size
            if size_bytes < max(sum(record.index), sum(record.table)):
                raise IntegrityError(f"{size_bytes} bytes, but {record.size_bytes} were written")
            data, table = bytearray(record.index[1]), bytearray(record.table[1])
            _read_exactly(fd, record.index[0], memoryview(data))
            _read_exactly(fd, record.table[0], memoryview(table))
            if index_digest(bytes(data), bytes(table)) != record.digest:
                raise IntegrityError("its index is not what was written (xxh3 differs)")
            index = decode_index(bytes(data), bytes(table), size_bytes=record.size_bytes)
        except (IntegrityError, OSError) as error:
            os.close(fd)
            raise IntegrityError(f"{path}: {error}") from error
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
            raise IntegrityError(f"{self._path(file)}: {error}") from error

    def read_checked(self, number: int, checks: Sequence[Check], into: memoryview) -> None:
        """Read a stretch of a box and verify it.

        Parameters
        ----------
        number
            Of the box in the index.
        checks
            Neighbouring blocks or segments that make up the stretch; see :func:`blocks.checks`.
        into
            Of their length.
        """
        entry = self.index.entries[number]
        begin, end = checks[0][0], checks[-1][1]
        if len(entry.runs) == 1:
            self.read(entry.runs[0].file, entry.runs[0].offset + begin, into)
        else:
            position = 0
            for run in entry.runs:
                low, high = max(begin, position), min(end, position + run.length)
                if low < high:
                    self.read(run.file, run.offset + low - position, into[low - begin : high - begin])
                position += run.length
                if position >= end:
                    break
        digest, table, first = xxhash.xxh3_64_intdigest, self.index.table, self.index.first_checksum[number]
        for low, high, place in checks:
            if digest(into[low - begin : high - begin]) != table[first + place]:
                raise self._damage(number, low, high - low)

    def verify(self, number: int, data: memoryview) -> None:
        """Compare a box that is one block with its checksum.

        Raises
        ------
        IntegrityError
            If it differs; the message names the file, the tensor and the bytes.
        """
        if xxhash.xxh3_64_intdigest(data) != self.index.table[self.index.first_checksum[number]]:
            raise self._damage(number, 0, len(data))

    def _damage(self, number: int, position: int, length: int) -> IntegrityError:
        """Say which bytes of a box differ from what was written."""
        file, offset = self._whereabouts(number, position)
        return IntegrityError(
            f"{self._path(file)}: {self.index.entries[number].name}: bytes {offset} to {offset + length} are not "
            "what was written (xxh3 differs)"
        )

    def _whereabouts(self, number: int, position: int) -> tuple[int, int]:
        """File and offset of a byte of a box."""
        runs = self.index.entries[number].runs
        starts = [0]
        for run in runs:
            starts.append(starts[-1] + run.length)
        place = bisect_right(starts, position) - 1
        return runs[place].file, runs[place].offset + position - starts[place]

    def _fd(self, file: int) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = _open(self._path(file))
            return self._fds[file]

    def _path(self, file: int) -> Path:
        if file == 0:
            return self.path
        checkpoint, name = self.index.files[file - 1]
        return self.path.parent.parent / checkpoint / name


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error


def _read_exactly(fd: int, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise IntegrityError(f"the file ends at byte {offset + done}")
        done += count


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
