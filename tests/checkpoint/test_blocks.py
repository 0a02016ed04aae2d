import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint.blocks import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    SINGLE_BLOCK_BYTES,
    TABLE_BLOCK_BYTES,
    checks,
    count_checksums,
    panels,
    partitions,
)
from hpc_resume.checkpoint.boxes import Box, covers_once
from tests.checkpoint.shapes import quick


@st.composite
def stored(draw):
    shape = (
        draw(st.sampled_from([1, 2, 3, 64, 257, 1000, 30_000])),
        *draw(st.sampled_from([(), (1,), (3,), (768,), (70_001,), (33, 5), (2, 40_000)])),
    )
    first = draw(st.integers(0, shape[0] - 1))
    rows = draw(st.integers(1, shape[0] - first))
    return (
        shape,
        Box((first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])),
        draw(st.sampled_from([1, 2, 4, 16])),
    )


@quick
@given(stored())
def test_blocks_tile_a_box(case):
    shape, box, item = case
    length = box.volume * item
    edges = partitions(shape, box, length)[0]
    lengths = [high - low for low, high in pairwise(edges)]
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(n > 0 for n in lengths)
    assert max(lengths) <= max(BLOCK_BYTES, SINGLE_BLOCK_BYTES)
    # Checksums stay small beside what they cover, unless single rows are no multiple of a block.
    assert len(lengths) <= 1 + length // (TABLE_BLOCK_BYTES // 4) + box.size[0] * (
        length // box.size[0] > BLOCK_BYTES
    )
    if length > SINGLE_BLOCK_BYTES:
        row_bytes = length // box.size[0]
        for ranks in range(2, 9):
            chunk = -(-shape[0] // ranks)
            if chunk * row_bytes >= 16 * 1024:
                cuts = {row - box.start[0] for row in range(chunk, shape[0], chunk)}
                inside = {cut * row_bytes for cut in cuts if 0 < cut < box.size[0]}
                assert inside <= set(edges), "every number of ranks up to 8 reads whole blocks"


def test_what_has_no_elements_has_no_blocks():
    assert partitions((0, 5), Box((0, 0), (0, 5)), 0) == ((0,),)
    assert partitions((), Box((), ()), 4) == ((0, 4),)


@quick
@given(stored(), st.data())
def test_segments_are_whole_blocks_and_any_range_is_verified_without_gaps(case, data):
    shape, box, item = case
    length = box.volume * item
    cut = partitions(shape, box, length)
    sums = [pair for edges in cut for pair in pairwise(edges)]
    assert count_checksums(cut) == len(sums)
    if len(cut) > 1:
        segments = cut[1]
        assert set(segments) <= set(cut[0])
        assert (segments[0], segments[-1]) == (0, length)
        assert all(0 < high - low <= SEGMENT_BYTES for low, high in pairwise(segments))
    begin = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(begin + 1, length))
    found = list(checks(cut, begin, end))
    assert all(sums[place] == (low, high) for low, high, place in found)
    assert all(one[1] == other[0] for one, other in pairwise(found))
    # No block more than those that are touched.
    assert found[0][0] == max(edge for edge in cut[0] if edge <= begin)
    assert found[-1][1] == min(edge for edge in cut[0] if edge >= end)


@quick
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3)),
    st.sets(st.integers(0, 2)),
    st.sampled_from([1, 4, 16]),
    st.data(),
)
def test_panels_tile_a_box_at_the_same_places_for_all(shape, dims, item, data):
    cut = data.draw(st.integers(0, shape[1] - 1))
    box = Box((0, cut, 0), (shape[0], shape[1] - cut, shape[2]))
    found = list(panels(shape, box, item, sorted(dims)))
    moved = [Box((p.start[0], p.start[1] - cut, p.start[2]), p.size) for p in found]
    assert covers_once(box.size, moved)
    assert len(found) <= 8
    dim = min((d for d in dims if d > 0), default=None)
    if dim is None or box.volume * item <= SINGLE_BLOCK_BYTES:
        assert found == [box]
    else:
        width = math.ceil(shape[dim] / 8)
        assert all(p.start[dim] % width == 0 or p.start[dim] == box.start[dim] for p in found)
