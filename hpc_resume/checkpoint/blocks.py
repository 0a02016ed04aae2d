"""Blocks: the stretches of a stored box that one checksum covers, and the panels that a box is stored in.

Both are computed from shapes alone, by the writer and by any reader, so neither is recorded. Their edges lie
where other numbers of ranks will cut: a rank that needs a part of a box then reads, and verifies, just that
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from hpc_resume.checkpoint.boxes import Box

#: Longest block. Source: measured; 128 KiB are still in the cache when they are hashed, and xxh3's call costs
#: 3 % of the hashing.
BLOCK_BYTES = 128 * 1024
#: A box up to this size is one block.
SINGLE_BLOCK_BYTES = 64 * 1024
#: Numbers of ranks at whose row cuts blocks end, so that any of them reads whole blocks only.
_ROW_CUTS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
#: ... unless the rows of one rank would be fewer bytes than this.
_SHORTEST_CUT_BYTES = 16 * 1024
#: Panels of a tensor that is split in columns. With eight, any number of ranks up to eight reads at most twice
#: what it needs.
_PANELS = 8


def block_edges(shape: Sequence[int], box: Box, item_bytes: int) -> tuple[int, ...]:
    """Byte positions at which the blocks of a box begin, and its length.

    Parameters
    ----------
    shape
        Of the whole tensor.
    box
        The stored box; its bytes are in C order.
    item_bytes
        Bytes of an element.
    """
    length = box.volume * item_bytes
    if length <= SINGLE_BLOCK_BYTES:
        return (0, length) if length else (0,)
    return _edges(shape[0], box.start[0], box.size[0], length)


@lru_cache(maxsize=4096)
def _edges(extent: int, first: int, rows: int, length: int) -> tuple[int, ...]:
    row_bytes = length // rows
    cuts = {0, rows}
    for ranks in _ROW_CUTS:
        chunk = -(-extent // ranks)
        if chunk * row_bytes >= _SHORTEST_CUT_BYTES:
            cuts.update(row - first for row in range(chunk, extent, chunk) if first < row < first + rows)
    edges: list[int] = []
    ordered = sorted(cuts)
    step = BLOCK_BYTES // row_bytes
    for low, high in pairwise(ordered):
        if step:
            edges += range(low * row_bytes, high * row_bytes, step * row_bytes)
        else:  # blocks within rows
            for row in range(low, high):
                edges += range(row * row_bytes, (row + 1) * row_bytes, BLOCK_BYTES)
    return (*edges, length)


def panels(shape: Sequence[int], box: Box, item_bytes: int, split_dims: Sequence[int]) -> Iterator[Box]:
    """Cut a box into the panels that it is stored in, one after the other.

    A tensor that is split in a dimension other than the first is likely to be split there again, in another
    number of parts: rows of the whole box would then be read for a few of their elements. So it is stored as
    up to eight panels in that dimension, at the same places for every rank.

    Parameters
    ----------
    shape
        Of the whole tensor.
    box
        What a rank stores of it.
    item_bytes
        Bytes of an element.
    split_dims
        Dimensions in which ranks split the tensor.
    """
    dim = next((dim for dim in sorted(split_dims) if dim > 0), None)
    if dim is None or box.volume * item_bytes <= SINGLE_BLOCK_BYTES:
        yield box
        return
    width = -(-shape[dim] // _PANELS)
    first, stop = box.start[dim], box.start[dim] + box.size[dim]
    while first < stop:
        last = min((first // width + 1) * width, stop)
        start, size = list(box.start), list(box.size)
        start[dim], size[dim] = first, last - first
        yield Box(tuple(start), tuple(size))
        first = last
