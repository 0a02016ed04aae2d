"""A shard's file: every byte accounted for, and plain HDF5 to everybody else."""

from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.image import PACKED_BELOW_BYTES, Piece, full_image
from hpc_resume.checkpoint.index import decode_index, index_digest
from hpc_resume.checkpoint.shard import ShardWriter
from tests.checkpoint.fakes import CARELESS, random_tensor
from tests.checkpoint.shapes import dtypes, quick


@st.composite
def pieces(draw):
    """Tensors, whole or in one or two boxes."""
    found = []
    for number in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from(["m/a", "m/b.weight", "ä/☃", "100%25"])) + f"/{number}"
        dtype = draw(dtypes)
        shape = draw(st.sampled_from([(), (1,), (7, 3), (300, 41), (5000,), (2, 60_000), (3, 4, 5)]))
        cut = draw(st.integers(0, shape[0] - 1)) if shape and draw(st.booleans()) else 0
        if cut:
            found.append(Piece(name, dtype, shape, Box((0,) * len(shape), (cut, *shape[1:]))))
            found.append(
                Piece(name, dtype, shape, Box((cut, *(0,) * (len(shape) - 1)), (shape[0] - cut, *shape[1:])))
            )
        else:
            found.append(Piece(name, dtype, shape, Box.whole(shape)))
    return found


def values(piece, seed):
    return random_tensor(piece.box.size, getattr(torch, piece.dtype), seed)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@quick
@given(found=pieces(), direct=st.booleans())
def test_every_byte_is_a_pieces_or_the_rests(folder, found, direct):
    tensors = [values(piece, number) for number, piece in enumerate(found)]
    image = full_image(found)
    writer = ShardWriter(threads=2, fs=CARELESS, direct=direct)
    path = folder / "shard.h5"
    written = writer.write(path, image, [*map(raw, tensors)], cuts=[piece.cut for piece in found])
    writer.close()
    data = path.read_bytes()
    assert len(data) == written.size_bytes == image.size_bytes

    # Pieces do not overlap, and hold the tensors' bytes; the rest is what its checksum says.
    extents = sorted(image.data)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(extents))
    for (offset, length), tensor in zip(image.data, tensors, strict=True):
        assert data[offset : offset + length] == raw(tensor).tobytes()
    rest = bytearray()
    position = 0
    for offset, length in [*extents, (len(data), 0)]:
        rest += data[position:offset]
        position = offset + length
    assert xxhash.xxh3_64_hexdigest(bytes(rest)) == written.rest

    # The index in it is the one that the receipt vouches for.
    index_bytes, table = (data[a : a + n] for a, n in (written.index, written.table))
    assert index_digest(index_bytes, table) == written.digest
    index = decode_index(index_bytes, table, size_bytes=len(data))
    for number, (entry, tensor) in enumerate(zip(index.entries, tensors, strict=True)):
        bits, first = raw(tensor).tobytes(), index.first_checksum[number]
        for place, (low, high) in enumerate((pair for edges in entry.cut for pair in pairwise(edges)), first):
            assert xxhash.xxh3_64_intdigest(bits[low:high]) == index.table[place]

    # Anybody's HDF5 reads it, in types that mean the same.
    seen = set()
    with h5py.File(path) as file:
        for piece, tensor in zip(found, tensors, strict=True):
            if piece.length >= PACKED_BELOW_BYTES:
                name = f"tensors/{piece.name}" + "+" * (piece.name in seen)
                seen.add(piece.name)
                assert tuple(file[name].attrs["global_shape"]) == piece.shape
                assert tuple(file[name].attrs["start"]) == piece.box.start
                assert reads_equal(file[name][()], tensor)


def reads_equal(read, tensor):
    if tensor.dtype in {torch.bfloat16, torch.float8_e5m2}:
        return np.array_equal(read.astype("f4"), tensor.float().numpy(), equal_nan=True)
    return read.tobytes() == raw(tensor).tobytes()  # fp8 e4m3, which HDF5 can't say, as uint8
