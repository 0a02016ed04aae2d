"""Writing shards: file images filled with tensors' bytes, hashed and written by several threads."""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from hpc_resume.checkpoint.blocks import Partitions
from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.hashing import Bytes, Job, Order, shares
from hpc_resume.checkpoint.image import ALIGN_BYTES, Image
from hpc_resume.checkpoint.index import index_digest
from hpc_resume.files import DISK, Filesystem

#: What one thread hashes and writes at a time. Source: measured, 4 to 16 MiB are alike.
CHUNK_BYTES = 8 << 20
#: Smaller files go through the page cache: O_DIRECT has nothing to win there.
_DIRECT_FROM_BYTES = 1 << 20
_T = TypeVar("_T")
#: What a filesystem says that knows no O_DIRECT.
_NOT_DIRECT = frozenset({errno.EINVAL, errno.ENOTSUP})


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """What a receipt says of a shard.

    Parameters
    ----------
    size_bytes
        Of the file.
    index, table
        Offset and length of its index and of its checksums.
    checksums
        The checksums.
    digest
        xxh3-128 over index and checksums.
    rest
        xxh3-64 over all bytes that belong to no piece, in order.
    """

    size_bytes: int
    index: tuple[int, int]
    table: tuple[int, int]
    checksums: bytes
    digest: str
    rest: str

    @classmethod
    def of(cls, image: Image, checksums: bytes) -> WrittenShard:
        """Say it of a file that is its image with these checksums."""
        return cls(
            size_bytes=image.size_bytes,
            index=image.index,
            table=image.table,
            checksums=checksums,
            digest=index_digest(image.index_bytes, checksums),
            rest=image.rest_digest(checksums),
        )


class ShardWriter:
    """Writes shards; keeps its threads and buffers from one to the next.

    Parameters
    ----------
    threads
        Writes at a time. One thread more hashes; each has a buffer of :data:`CHUNK_BYTES`, unless everything
        that it writes lies in an arena.
    fs
        The filesystem.
    direct
        Write past the page cache (O_DIRECT) where the filesystem can.
    """

    def __init__(self, *, threads: int = 2, fs: Filesystem = DISK, direct: bool = True) -> None:
        self._threads = max(threads, 1)
        self._fs = fs
        self._direct = direct
        # One thread more than write at a time: it hashes the next chunk meanwhile.
        self._pool = ThreadPoolExecutor(self._threads + 1, thread_name_prefix="hpc-resume-write")
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="hpc-resume-look")
        self._writing = threading.Semaphore(self._threads)
        self._own = threading.local()
        self._order: tuple[Image, Order] | None = None

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        self._beside.shutdown()

    def beside(self, function: Callable[..., _T], *args: Any) -> Future[_T]:
        """Do something that reads the same bytes while they are written, on a thread of its own."""
        return self._beside.submit(function, *args)

    def hash(self, jobs: Sequence[Job], table: npt.NDArray[np.uint64]) -> None:
        """Fill in the checksums of some stretches of pieces."""

        def work(share: list[Job]) -> None:
            for job in share:
                view = job.piece.data
                for place, (low, high) in enumerate(pairwise(job.edges), job.first):
                    table[place] = xxhash.xxh3_64_intdigest(view[low:high])

        self._run(work, shares(jobs, self._threads, CHUNK_BYTES))

    def write(
        self,
        path: Path,
        image: Image,
        data: Sequence[Bytes],
        *,
        cuts: Sequence[Partitions] = (),
        table: bytes | None = None,
        arena: Bytes | None = None,
    ) -> WrittenShard:
        """Write a shard, durable on return.

        Parameters
        ----------
        path
            The file; written under a temporary name beside it and renamed.
        image
            What it consists of besides tensors.
        data
            The bytes of each piece, end to end what ``image.data`` leaves room for.
        cuts
            The blocks and segments of each piece, to hash them on the way.
        table
            The checksums, if they are known already.
        arena
            Memory that holds the file's image with ``data`` at its place: written as it is.

        Raises
        ------
        OSError
            If the filesystem refuses; ``path`` then does not exist.
        """
        direct = self._direct and image.size_bytes >= _DIRECT_FROM_BYTES
        opener = self._open_direct if direct else None
        with self._fs.replacing(path, os.O_RDWR, opener) as fd:
            table = self._fill(fd, image, data, cuts, table, arena)
            self._fs.truncate(fd, image.size_bytes)
        return WrittenShard.of(image, table)

    def _fill(
        self,
        fd: int,
        image: Image,
        data: Sequence[Bytes],
        cuts: Sequence[Partitions],
        table: bytes | None,
        arena: Bytes | None,
    ) -> bytes:
        """Write all bytes; returns the table."""
        sums = None if table is not None else np.zeros(image.table[1] // 8, dtype=np.uint64)
        with paused_collector():
            order = None if sums is None else self._order_of(image, cuts)
            contents = None if arena is not None else _Contents(image, data)
        first, last = image.table[0], image.table[0] + image.table[1]
        chunks = list(_chunks(image.size_bytes, first, last))
        late = [chunk for chunk in chunks if chunk[1] > first and chunk[0] < last]

        def digest(chunk: tuple[int, int]) -> None:
            if sums is not None and order is not None:
                for place, block in order.within(*chunk, data):
                    sums[place] = xxhash.xxh3_64_intdigest(block)

        def write(chunk: tuple[int, int]) -> None:
            begin, end = chunk
            padded = begin + -(-(end - begin) // ALIGN_BYTES) * ALIGN_BYTES
            if contents is None:
                buffer = arena[begin:padded]  # type: ignore[index]
            else:
                buffer = self._buffer()[: padded - begin]
                contents.copy(begin, end, buffer)
            self._write(fd, buffer, begin)

        def work(chunk: tuple[int, int]) -> None:
            digest(chunk)
            write(chunk)

        self._run(work, [chunk for chunk in chunks if chunk not in late])
        if sums is not None:
            self._run(digest, late)
            table = sums.tobytes()
        assert table is not None
        if contents is not None:
            contents.add_table(table)
        else:
            arena[first:last] = np.frombuffer(table, np.uint8)  # type: ignore[index]
        for chunk in late:
            write(chunk)
        return table

    def _order_of(self, image: Image, cuts: Sequence[Partitions]) -> Order:
        """In which order to hash; the same as before while the structure stays the same."""
        if self._order is None or self._order[0] is not image or self._order[1].cuts is not cuts:
            self._order = image, Order(image.data, cuts)
        return self._order[1]

    def _run(self, function: Callable[[Any], None], jobs: Iterable[object]) -> None:
        """Run jobs on the threads; the first error ends it.

        On return none is running any more: the caller is going to close the file, and a late write would go
        to whatever has its number next.
        """
        futures = [self._pool.submit(function, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            concurrent.futures.wait(futures)

    def _open_direct(self, path: Path, flags: int) -> int:
        try:
            return self._fs.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        return self._fs.open(path, flags)

    def _write(self, fd: int, buffer: Bytes, offset: int) -> None:
        with self._writing:
            try:
                self._fs.write_all(fd, buffer.data, offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                # Opened so, but not written so (or what was left after a short write is not aligned). Another
                # thread may have been here already.
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
                self._fs.write_all(fd, buffer.data, offset)

    def _buffer(self) -> Bytes:
        """Give the page-aligned buffer of the calling thread."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), np.uint8)
        buffer: Bytes = self._own.buffer
        return buffer


class _Contents:
    """What stands where in a file: pieces and segments by offset."""

    def __init__(self, image: Image, data: Sequence[Bytes]) -> None:
        extents = list(_placed(image.data, data))
        self._spans = sorted(
            [*extents, *((at, np.frombuffer(content, np.uint8)) for at, content in image.segments)],
            key=lambda span: span[0],
        )
        self._starts = [start for start, _ in self._spans]
        self._table_at = image.table[0]

    def add_table(self, table: bytes) -> None:
        """Put the checksums in their place."""
        if table:
            at = bisect_right(self._starts, self._table_at)
            self._starts.insert(at, self._table_at)
            self._spans.insert(at, (self._table_at, np.frombuffer(table, np.uint8)))

    def copy(self, begin: int, end: int, buffer: Bytes) -> None:
        """Copy a range of the file into a buffer, and zeros behind it."""
        position = begin
        for number in range(max(bisect_right(self._starts, begin) - 1, 0), len(self._spans)):
            start, content = self._spans[number]
            if start >= end:
                break
            low, high = max(start, begin), min(start + len(content), end)
            if low >= high:
                continue
            buffer[position - begin : low - begin] = 0
            np.copyto(buffer[low - begin : high - begin], content[low - start : high - start])
            position = high
        buffer[position - begin :] = 0


def _chunks(size_bytes: int, table_first: int, table_last: int) -> Iterator[tuple[int, int]]:
    """Cut a file into what is written at a time; the pages of the table, which is known last, by themselves."""
    low = table_first // ALIGN_BYTES * ALIGN_BYTES
    high = min(-(-table_last // ALIGN_BYTES) * ALIGN_BYTES, size_bytes)
    for first, last in ((0, low), (low, high), (high, size_bytes)):
        for begin in range(first, last, CHUNK_BYTES):
            yield begin, min(begin + CHUNK_BYTES, last)


def _placed(extents: Sequence[tuple[int, int]], data: Sequence[Bytes]) -> Iterator[tuple[int, Bytes]]:
    """Give each array its offset; one extent may be filled by several."""
    places = iter(extents)
    offset = room = 0
    for array in data:
        if not len(array):
            continue
        while room == 0:
            offset, room = next(places)
        yield offset, array
        offset, room = offset + len(array), room - len(array)
