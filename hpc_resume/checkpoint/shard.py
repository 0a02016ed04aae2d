"""One rank's shard: a plain HDF5 file whose tensor bytes are written and read by offset.

h5py lays the file out (contiguous datasets, early allocation, no fill); the bytes go to the datasets'
offsets with ``pwrite`` from several threads. Any HDF5 program reads it: a tensor's piece is the dataset
under the tensor's name, with its place in the whole tensor as attributes. Pieces under
:data:`PACKED_BELOW_BYTES` lie together in the dataset ``packed``, so that ten thousand scalars do not cost
ten thousand objects; ``index`` says, as JSON, where everything is, and ``checksums`` holds xxh3-64 of each
block in the index's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.manifest import BLOCK_BYTES, block_count
from hpc_resume.errors import IntegrityError
from hpc_resume.files import DISK, Filesystem, JsonObject

PACKED_BELOW_BYTES = 4096
#: Bytes that one thread hashes and writes at a time.
_TASK_BYTES = 8 * BLOCK_BYTES
_ALIGN_BYTES = 4096
_PACK_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a tensor, with its bytes.

    Parameters
    ----------
    name
        Of the tensor: components joined by ``/``.
    dtype
        Name of the element type.
    shape
        Of the whole tensor.
    box
        Which part this is.
    data
        Its bytes in C order, little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenShard:
    """What a receipt says of a shard.

    Parameters
    ----------
    size_bytes
        Of the file.
    rest
        xxh3-64 over all bytes that belong to no piece, in order.
    offsets, checksums
        One for each piece, in the order given.
    """

    size_bytes: int
    rest: str
    offsets: tuple[int, ...]
    checksums: tuple[str, ...]


def write_shard(
    path: Path, pieces: Sequence[Piece], *, threads: int = 2, fs: Filesystem = DISK
) -> WrittenShard:
    """Write a shard, durable on return.

    Parameters
    ----------
    path
        The file; written under a temporary name beside it and renamed.
    pieces
        What it holds; names may repeat (several boxes of one tensor).
    threads
        Writers.

    Raises
    ------
    OSError
        If the filesystem refuses; ``path`` then does not exist.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    offsets, checksum_offset = _lay_out(temporary, pieces)
    fd = fs.open(temporary, os.O_RDWR)
    try:
        checksums = _write_pieces(fd, pieces, offsets, threads, fs)
        fs.write_all(fd, b"".join(bytes.fromhex(text)[::-1] for text in _blocks(checksums)), checksum_offset)
        size_bytes = os.fstat(fd).st_size
        extents = [(offset, len(piece.data)) for offset, piece in zip(offsets, pieces, strict=True)]
        rest = rest_checksum(fd, size_bytes, extents)
        fs.fsync(fd)
    finally:
        fs.close(fd)
    fs.rename(temporary, path)
    fs.fsync_dir(path.parent)
    return WrittenShard(size_bytes=size_bytes, rest=rest, offsets=tuple(offsets), checksums=checksums)


def _lay_out(path: Path, pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """Make the HDF5 file without any tensor byte; returns the pieces' offsets and that of the checksums."""
    import h5py

    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    # Threshold as large as the alignment: a threshold of 1 would align HDF5's own metadata too, which was
    # measured to cost 12-36 s at 20,000 datasets.
    access.set_alignment(_ALIGN_BYTES, _ALIGN_BYTES)
    access.set_meta_block_size(64 * 1024 + 1400 * len(pieces))
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    file = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fapl=access)
    try:
        layout = _Layout(file)
        return layout.place(pieces)
    finally:
        file.close()


class _Layout:
    """Creates the datasets of one file."""

    def __init__(self, file: Any) -> None:
        import h5py

        self._h5 = h5py
        self._file = file
        self._create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        self._create.set_layout(h5py.h5d.CONTIGUOUS)
        self._create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(1)

    def place(self, pieces: Sequence[Piece]) -> tuple[list[int], int]:
        offsets = [-1] * len(pieces)
        used: set[str] = set()
        packed_bytes = 0
        for index, piece in enumerate(pieces):
            if len(piece.data) < PACKED_BELOW_BYTES:
                offsets[index] = packed_bytes
                packed_bytes += -(-len(piece.data) // _PACK_ALIGN_BYTES) * _PACK_ALIGN_BYTES
                continue
            path = f"tensors/{piece.name}"
            while path in used:  # another box of the same tensor
                path += "+"
            used.add(path)
            dataset = self._dataset(path, dtypes.hdf5_type(piece.dtype), piece.box.size)
            self._attribute(dataset, "global_shape", piece.shape)
            self._attribute(dataset, "start", piece.box.start)
            offsets[index] = dataset.get_offset()
        if packed_bytes:
            base = self._dataset("packed", dtypes.hdf5_type("uint8"), (packed_bytes,)).get_offset()
            for index, piece in enumerate(pieces):
                if len(piece.data) < PACKED_BELOW_BYTES:
                    offsets[index] += base
        final = [offset if len(piece.data) else 0 for piece, offset in zip(pieces, offsets, strict=True)]
        entries = [
            {
                "name": piece.name,
                "dtype": piece.dtype,
                "shape": list(piece.shape),
                "start": list(piece.box.start),
                "size": list(piece.box.size),
                "offset": offset,
                "length": len(piece.data),
            }
            for piece, offset in zip(pieces, final, strict=True)
        ]
        self._index(entries)
        blocks = sum(block_count(len(piece.data)) for piece in pieces)
        checksums = self._dataset("checksums", dtypes.hdf5_type("uint64"), (max(blocks, 1),))
        return final, checksums.get_offset()

    def _dataset(self, path: str, kind: Any, shape: tuple[int, ...]) -> Any:
        space = self._h5.h5s.create_simple(shape) if shape else self._h5.h5s.create(self._h5.h5s.SCALAR)
        return self._h5.h5d.create(self._file, path.encode(), kind, space, self._create, self._links)

    def _attribute(self, dataset: Any, name: str, values: tuple[int, ...]) -> None:
        import numpy as np

        self._h5.Dataset(dataset).attrs[name] = np.array(values, dtype=np.int64)

    def _index(self, entries: list[JsonObject]) -> None:
        import numpy as np

        text = json.dumps({"block_bytes": BLOCK_BYTES, "pieces": entries}, separators=(",", ":")).encode()
        dataset = self._dataset("index", dtypes.hdf5_type("uint8"), (len(text),))
        dataset.write(self._h5.h5s.ALL, self._h5.h5s.ALL, np.frombuffer(text, np.uint8).copy())


def _write_pieces(
    fd: int, pieces: Sequence[Piece], offsets: Sequence[int], threads: int, fs: Filesystem
) -> tuple[str, ...]:
    """Hash and write all pieces; returns the checksums of each."""

    def task(piece: memoryview, offset: int) -> str:
        digests = [xxhash.xxh3_64_hexdigest(block) for _, block in _split(piece, BLOCK_BYTES)]
        fs.write_all(fd, piece, offset)
        return "".join(digests)

    jobs = [
        (index, part, offset + begin)
        for index, (piece, offset) in enumerate(zip(pieces, offsets, strict=True))
        for begin, part in _split(piece.data, _TASK_BYTES)
    ]
    checksums = [""] * len(pieces)
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="hpc-resume-write") as pool:
        results = pool.map(task, [part for _, part, _ in jobs], [offset for _, _, offset in jobs])
        for (index, _, _), digest in zip(jobs, results, strict=True):
            checksums[index] += digest
    return tuple(checksums)


def _split(data: memoryview, size: int) -> Iterator[tuple[int, memoryview]]:
    for begin in range(0, len(data), size):
        yield begin, data[begin : begin + size]


def _blocks(checksums: Sequence[str]) -> Iterator[str]:
    for text in checksums:
        for begin in range(0, len(text), 16):
            yield text[begin : begin + 16]


def rest_checksum(fd: int, size_bytes: int, extents: Sequence[tuple[int, int]]) -> str:
    """Xxh3-64 over all bytes of a file outside the extents: headers, index, padding.

    Parameters
    ----------
    fd
        The open file.
    size_bytes
        Its size as recorded.
    extents
        Offset and length of each piece.

    Raises
    ------
    IntegrityError
        If pieces overlap or the file is shorter than recorded.
    """
    digest = xxhash.xxh3_64()
    position = 0
    for offset, length in [*sorted(extent for extent in extents if extent[1]), (size_bytes, 0)]:
        if offset < position:
            raise IntegrityError(f"two boxes overlap at byte {offset}")
        while position < offset:
            data = os.pread(fd, min(offset - position, BLOCK_BYTES), position)
            if not data:
                raise IntegrityError(f"the file ends at byte {position} of {size_bytes}")
            digest.update(data)
            position += len(data)
        position = offset + length
    return digest.hexdigest()


def read_blocks(fd: int, offset: int, length: int, checksums: str, first: int, into: memoryview) -> None:
    """Read whole checksum blocks of one box and verify them.

    Parameters
    ----------
    fd
        The open shard.
    offset, length, checksums
        The stored box.
    first
        Index of the first block to read.
    into
        Where the bytes go; a whole number of blocks, or up to the box's end.

    Raises
    ------
    IntegrityError
        If the file is too short or a checksum differs; the message names the byte range.
    """
    if not len(into):
        return
    begin = first * BLOCK_BYTES
    if begin + len(into) > length:
        raise IntegrityError(f"bytes {begin} to {begin + len(into)} of a box of {length}")
    for index, (relative, block) in enumerate(_split(into, BLOCK_BYTES), first):
        at = offset + begin + relative
        done = 0
        while done < len(block):
            count = os.preadv(fd, [block[done:]], at + done)
            if count == 0:
                raise IntegrityError(f"the file ends at byte {at + done}")
            done += count
        if xxhash.xxh3_64_hexdigest(block) != checksums[16 * index : 16 * index + 16]:
            raise IntegrityError(f"bytes {at} to {at + len(block)} are not what was written (xxh3 differs)")
