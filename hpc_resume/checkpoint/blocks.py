"""Blocks: the stretches of a stored box that one checksum covers, and the panels that a box is stored in.

Both are computed from shapes alone, by the writer and by any reader, so neither is recorded. Edges of blocks lie
where other numbers of ranks will cut: a rank that needs a part of a box then reads, and verifies, just that
part. Several neighbouring blocks make a segment, with a checksum of its own: whoever reads all of it verifies it
at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from hpc_resume.checkpoint.boxes import Box

#: Longest block: what is compared, and written anew if it differs, by an incremental save.
BLOCK_BYTES = 128 * 1024
#: ... of a table with many short rows, of which an optimizer may touch few.
TABLE_BLOCK_BYTES = 16 * 1024
_TABLE_ROWS = 8192
_TABLE_ROW_BYTES = 1024
#: Longest segment. Source: measured; still in the cache when it is hashed after it was read, and the call of the
#: hash function and the interpreter's lock cost little against it.
SEGMENT_BYTES = 1 << 20
#: A box up to this size is one block.
SINGLE_BLOCK_BYTES = 64 * 1024
#: Numbers of ranks at whose row cuts blocks end, so that any of them reads whole blocks only.
_ROW_CUTS = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
#: ... unless the rows of one rank would be fewer bytes than this.
_SHORTEST_CUT_BYTES = 16 * 1024
#: Panels of a tensor that is split in columns. With eight, any number of ranks up to eight reads at most twice
#: what it needs.
_PANELS = 8

#: Byte positions at which blocks, or segments, begin, and the length of the box.
Edges = tuple[int, ...]
#: The edges of a box's blocks, and of its segments if it has more than one block.
Partitions = tuple[Edges, ...]


def partitions(shape: Sequence[int], box: Box, length: int) -> Partitions:
    """Cut a stored box into blocks and segments.

    Parameters
    ----------
    shape
        Of the whole tensor.
    box
        The stored box; its bytes are in C order.
    length
        Bytes of it.

    Returns
    -------
    tuple of tuple of int
        The checksums of a box are those of its blocks, then those of its segments.
    """
    if length <= SINGLE_BLOCK_BYTES:
        return ((0, length),) if length else ((0,),)
    return _cut(shape[0], box.start[0], box.size[0], length)


def count_checksums(cut: Partitions) -> int:
    """Return the number of checksums of a box."""
    return sum(len(edges) - 1 for edges in cut)


@lru_cache(maxsize=4096)
def _cut(extent: int, first: int, rows: int, length: int) -> Partitions:
    row_bytes = length // rows
    cuts = {0, rows}
    for ranks in _ROW_CUTS:
        chunk = -(-extent // ranks)
        if chunk * row_bytes >= _SHORTEST_CUT_BYTES:
            cuts.update(row - first for row in range(chunk, extent, chunk) if first < row < first + rows)
    edges: list[int] = []
    block_bytes = (
        TABLE_BLOCK_BYTES if extent >= _TABLE_ROWS and row_bytes <= _TABLE_ROW_BYTES else BLOCK_BYTES
    )
    step = block_bytes // row_bytes
    for low, high in pairwise(sorted(cuts)):
        if step:
            edges += range(low * row_bytes, high * row_bytes, step * row_bytes)
        else:  # blocks within rows
            for row in range(low, high):
                edges += range(row * row_bytes, (row + 1) * row_bytes, block_bytes)
    edges.append(length)
    segments = [0]
    for low, high in pairwise(edges):
        if high - segments[-1] > SEGMENT_BYTES:
            segments.append(low)
    return tuple(edges), (*segments, length)


def checks(cut: Partitions, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Say what to verify to be sure of a range of a box: segments where they lie in it, else blocks.

    Yields
    ------
    (int, int, int)
        First byte, one past the last, and the place among the box's checksums; in order, without gaps, from
        at or before ``begin`` to at or after ``end``.
    """
    blocks = cut[0]
    segments = cut[1] if len(cut) > 1 else ()
    place = bisect_right(blocks, begin) - 1
    position = blocks[place]
    while position < end:
        number = bisect_left(segments, position)
        if number < len(segments) - 1 and segments[number] == position and segments[number + 1] <= end:
            yield position, segments[number + 1], len(blocks) - 1 + number
            position = segments[number + 1]
            place = bisect_left(blocks, position)
        else:
            yield position, blocks[place + 1], place
            place += 1
            position = blocks[place]


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
