"""The image of a shard: every byte of the HDF5 file except the tensors' and the checksums.

h5py lays a file out once for each structure, in memory; the bytes that it wrote are kept and replayed at each
save, so that a steady save never calls HDF5.

Any HDF5 program reads the result: a tensor's piece is a contiguous dataset under the tensor's name, with its
place in the whole as attributes. Pieces under :data:`PACKED_BELOW_BYTES` lie together in the dataset
``packed``, so that ten thousand scalars do not cost ten thousand objects.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.blocks import Partitions, count_checksums, partitions
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.checkpoint.index import CHECKSUM_BYTES, LONGEST_BYTES, Entry, Run, encode_index
from hpc_resume.errors import StateError

PACKED_BELOW_BYTES = 4096
ALIGN_BYTES = 4096
_PACK_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor that a shard is going to hold.

    Parameters
    ----------
    name, dtype, shape
        The tensor.
    box
        Which part of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @property
    def length(self) -> int:
        """Bytes."""
        return self.box.volume * item_bytes(self.dtype)

    @property
    def cut(self) -> Partitions:
        """Its blocks and segments."""
        return partitions(self.shape, self.box, self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A laid-out file.

    Parameters
    ----------
    size_bytes
        Of the file.
    data
        Offset and length of what is to be filled in, in the order of the pieces.
    index, table
        Offset and length of the index's and the checksums' bytes.
    entries, files, index_bytes
        The index, and its bytes.
    segments
        Offset and content of everything else that is not zero.
    rest
        All bytes outside the pieces, in the order of the file, before and after the checksums.
    """

    size_bytes: int
    data: tuple[tuple[int, int], ...]
    index: tuple[int, int]
    table: tuple[int, int]
    entries: tuple[Entry, ...]
    files: tuple[tuple[str, str], ...]
    index_bytes: bytes
    segments: tuple[tuple[int, bytes], ...]
    rest: tuple[bytes, bytes]

    def rest_digest(self, table: bytes) -> str:
        """16 hex digits of xxh3-64 over all bytes outside the pieces, in the order of the file."""
        before, after = self.rest
        digest = xxhash.xxh3_64(before)
        digest.update(table)
        digest.update(after)
        return digest.hexdigest()


def full_image(pieces: Sequence[Piece]) -> Image:
    """Lay out a shard that holds all of its pieces.

    Parameters
    ----------
    pieces
        None of them empty.
    """
    layout = _Layout(pieces_above_packed=sum(piece.length >= PACKED_BELOW_BYTES for piece in pieces))
    offsets, packed_bytes = [], 0
    used: set[str] = set()
    for piece in pieces:
        if piece.length < PACKED_BELOW_BYTES:
            offsets.append(packed_bytes)
            packed_bytes += -(-piece.length // _PACK_ALIGN_BYTES) * _PACK_ALIGN_BYTES
            continue
        path = f"tensors/{piece.name}"
        while path in used:  # another box of the same tensor
            path += "+"
        used.add(path)
        offsets.append(
            layout.dataset(
                path,
                piece.dtype,
                piece.box.size,
                attributes={"global_shape": piece.shape, "start": piece.box.start},
            )
        )
    if packed_bytes:
        # Smaller ones would not be aligned, and tensors can't be viewed at odd offsets.
        base = layout.dataset("packed", "uint8", (max(packed_bytes, ALIGN_BYTES),))
        offsets = [
            base + offset if piece.length < PACKED_BELOW_BYTES else offset
            for piece, offset in zip(pieces, offsets, strict=True)
        ]
    entries = tuple(
        Entry(piece.name, piece.dtype, piece.shape, piece.box, (Run(0, offset, piece.length),))
        for piece, offset in zip(pieces, offsets, strict=True)
    )
    data = tuple((offset, piece.length) for piece, offset in zip(pieces, offsets, strict=True))
    return layout.finish(data, entries, (), sum(count_checksums(piece.cut) for piece in pieces))


def changed_image(
    size_bytes: int,
    entries_at: Callable[[int], tuple[Entry, ...]],
    files: tuple[tuple[str, str], ...],
    checksums: int,
) -> Image:
    """Lay out a shard that holds only the bytes that have changed, end to end in the dataset ``changed``.

    Parameters
    ----------
    size_bytes
        Of the changed bytes.
    entries_at
        Gives the index, once it is known at which offset they lie.
    files
        Checkpoint and file of each shard that the index refers to.
    checksums
        Number of checksums.
    """
    layout = _Layout(pieces_above_packed=1)
    offset = layout.dataset("changed", "uint8", (size_bytes,)) if size_bytes else 0
    data = ((offset, size_bytes),) if size_bytes else ()
    return layout.finish(data, entries_at(offset), files, checksums)


class _Layout:
    """Creates the datasets of one file, in memory."""

    def __init__(self, *, pieces_above_packed: int) -> None:
        import h5py

        self._h5 = h5py
        self._memory = _SparseMemory()
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
        # Threshold as large as the alignment: a threshold of 1 would align HDF5's own metadata too, which was
        # measured to cost 12-36 s at 20,000 datasets.
        access.set_alignment(ALIGN_BYTES, ALIGN_BYTES)
        access.set_meta_block_size(64 * 1024 + 1400 * pieces_above_packed)
        access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, self._memory)
        self._file = h5py.h5f.create(b"image", h5py.h5f.ACC_TRUNC, fapl=access)
        self._create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        self._create.set_layout(h5py.h5d.CONTIGUOUS)
        self._create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(1)
        self._extents: list[tuple[int, int]] = []

    def dataset(
        self,
        path: str,
        dtype: str,
        shape: tuple[int, ...],
        *,
        attributes: dict[str, tuple[int, ...]] | None = None,
    ) -> int:
        """Make a dataset; returns its offset."""
        import numpy as np

        h5 = self._h5
        space = h5.h5s.create_simple(shape) if shape else h5.h5s.create(h5.h5s.SCALAR)
        dataset = h5.h5d.create(
            self._file, path.encode(), dtypes.hdf5_type(dtype), space, self._create, self._links
        )
        for name, values in (attributes or {}).items():
            h5.Dataset(dataset).attrs[name] = np.array(values, dtype=np.int64)
        offset = int(dataset.get_offset())
        self._extents.append((offset, int(dataset.get_storage_size())))
        return offset

    def finish(
        self,
        data: tuple[tuple[int, int], ...],
        entries: tuple[Entry, ...],
        files: tuple[tuple[str, str], ...],
        checksums: int,
    ) -> Image:
        """Add index and table, and take what HDF5 has written."""
        index_bytes = encode_index(entries, files)
        if max(len(index_bytes), CHECKSUM_BYTES * checksums) > LONGEST_BYTES:
            raise StateError(
                f"{len(entries)} pieces with {checksums} checksums are more than one shard can hold: use more ranks"
            )
        extents = list(self._extents)
        index = self.dataset("index", "uint8", (len(index_bytes),))
        table = self.dataset("checksums", "uint64", (max(checksums, 1),))
        self._file.close()
        size_bytes = self._memory.size()
        extents += [(index, len(index_bytes)), (table, CHECKSUM_BYTES * max(checksums, 1))]
        segments = [(index, index_bytes)]
        position = 0
        for offset, length in [*sorted(extents), (size_bytes, 0)]:
            assert offset >= position
            segments += self._read(position, offset - position)
            position = offset + length
        segments.sort()
        table_bytes = CHECKSUM_BYTES * checksums
        holes = sorted([*(extent for extent in data if extent[1]), (table, table_bytes)])
        before = _outside(segments, [hole for hole in holes if hole[0] < table], 0, table)
        after = _outside(
            segments, [hole for hole in holes if hole[0] > table], table + table_bytes, size_bytes
        )
        return Image(
            size_bytes=size_bytes,
            data=data,
            index=(index, len(index_bytes)),
            table=(table, table_bytes),
            entries=entries,
            files=files,
            index_bytes=index_bytes,
            segments=tuple(segments),
            rest=(before, after),
        )

    def _read(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        content = self._memory.read_at(offset, length)
        stripped = content.rstrip(b"\0")
        return [(offset, stripped)] if stripped else []


class _SparseMemory(io.RawIOBase):
    """A file in memory for HDF5; what it leaves out, which is every tensor, takes no memory."""

    def __init__(self) -> None:
        super().__init__()
        self._fd = os.memfd_create("hpc-resume-image", os.MFD_CLOEXEC)

    def close(self) -> None:
        """Give the memory up."""
        if not self.closed:
            os.close(self._fd)
        super().close()

    def readable(self) -> bool:
        """Return True."""
        return True

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        return os.lseek(self._fd, offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Read from here."""
        return os.readv(self._fd, [buffer])

    def write(self, data: Any) -> int:
        """Write here."""
        return os.write(self._fd, data)

    def truncate(self, size: int | None = None) -> int:
        """Set the length."""
        assert size is not None
        os.ftruncate(self._fd, size)
        return size

    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes of a range."""
        return os.pread(self._fd, length, offset) if length else b""


def _outside(
    segments: Sequence[tuple[int, bytes]], holes: Sequence[tuple[int, int]], first: int, last: int
) -> bytes:
    """Bytes from ``first`` to ``last`` without the holes; what is in no segment is zero."""
    found: list[bytes] = []
    position = first
    marks = sorted(
        [*((at, len(content), content) for at, content in segments), *((*h, None) for h in holes)],
        key=lambda mark: mark[:2],
    )
    for offset, length, content in marks:
        if not first <= offset < last:
            continue
        found.append(bytes(offset - position))
        if content is not None:
            found.append(content)
        position = offset + length
    found.append(bytes(last - position))
    return b"".join(found)
