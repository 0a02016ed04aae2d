from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint.boxes import Box, covers_once
from tests.checkpoint.shapes import boxes_in, indices, quick, shapes


def pairs(strategy=shapes):
    return strategy.flatmap(lambda shape: st.tuples(st.just(shape), boxes_in(shape), boxes_in(shape)))


@quick
@given(pairs())
def test_intersections_are_those_of_sets(case):
    _, one, other = case
    common = one.intersect(other)
    assert (indices(common) if common else set()) == indices(one) & indices(other)
    assert common is None or common.volume


@st.composite
def tilings(draw):
    """Boxes that tile a tensor, cut at random; then perhaps spoilt."""
    shape = draw(shapes)
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        if not shape:
            boxes.append(box)
            break
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.size[dim]))
        for start, size in ((box.start[dim], cut), (box.start[dim] + cut, box.size[dim] - cut)):
            boxes.append(
                Box(
                    (*box.start[:dim], start, *box.start[dim + 1 :]),
                    (*box.size[:dim], size, *box.size[dim + 1 :]),
                )
            )
    if draw(st.booleans()):
        place = draw(st.integers(0, len(boxes) - 1))
        boxes[place] = draw(boxes_in(shape))
    return shape, draw(st.permutations(boxes))


@quick
@given(tilings())
def test_covers_once_counts_every_element(case):
    shape, boxes = case
    held = [index for box in boxes for index in indices(box)]
    truth = len(held) == len(set(held)) and set(held) == indices(Box.whole(shape))
    assert covers_once(shape, boxes) == truth


def test_boxes_outside_or_of_other_dimensions_cover_nothing():
    assert not covers_once((2,), [Box((1,), (2,))])
    assert not covers_once((2,), [Box((0, 0), (1, 2))])
    assert covers_once((), [Box((), ())])
    assert not covers_once((), [Box((), ()), Box((), ())])
    assert covers_once((0, 3), [])
