import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.checkpoint.layout import WHOLE_BELOW_BYTES, Layout, split_replicas, spread
from tests.checkpoint.shapes import boxes_in, dtypes, indices, layouts, quick


def box_by_hand(layout, shape, rank):
    """What a rank holds, by chunking one dimension after the other."""
    coordinate = np.argwhere(np.array(layout.ranks).reshape(layout.mesh) == rank)[0]
    held = [np.arange(extent) for extent in shape]
    for mesh_dim, dim in layout.splits:
        parts, chunk = layout.mesh[mesh_dim], -(-len(held[dim]) // layout.mesh[mesh_dim])
        held[dim] = held[dim][chunk * coordinate[mesh_dim] :][: chunk if parts > 1 else None]
    return {
        tuple(map(int, index))
        for index in np.stack(np.meshgrid(*held, indexing="ij"), -1).reshape(-1, len(shape))
    }


cases = st.tuples(layouts(), st.tuples(st.integers(0, 9), st.integers(0, 9)))


@quick
@given(cases)
def test_boxes_groups_and_holders_agree(case):
    layout, shape = case
    for rank in range(8):
        group = layout.group_of(rank)
        assert (group is None) == (rank not in layout.ranks)
        if group is not None:
            assert indices(layout.box(shape, group)) == box_by_hand(layout, shape, rank)
            assert rank in layout.holders(group)
    held = [rank for group in range(layout.groups) for rank in layout.holders(group)]
    assert sorted(held) == sorted(layout.ranks)
    assert all(list(layout.holders(g)) == sorted(layout.holders(g)) for g in range(layout.groups))
    assert covers_once(shape, [layout.box(shape, group) for group in range(layout.groups)])


@quick
@given(cases, st.data())
def test_overlapping_finds_what_looking_at_all_finds(case, data):
    layout, shape = case
    want = data.draw(boxes_in(shape))
    every = ((group, layout.box(shape, group)) for group in range(layout.groups))
    assert list(layout.overlapping(shape, want)) == [
        (group, box) for group, box in every if box.intersect(want) is not None
    ]


@quick
@given(layouts())
def test_layouts_survive_json(layout):
    record = json.loads(json.dumps(layout.to_json()))
    assert Layout.from_json(record, world_size=8) == layout


@pytest.mark.parametrize(
    "record",
    [
        {"mesh": [2], "ranks": [[0, 3]], "splits": []},
        {"mesh": [2], "ranks": [[0, 1], [0, 1]], "splits": []},
        {"mesh": [2], "ranks": [[7, 2]], "splits": []},
        {"mesh": [2], "ranks": [[-1, 2]], "splits": []},
        {"mesh": [2], "ranks": [[0, 2]], "splits": [[1, 0]]},
        {"mesh": [2], "ranks": [[0, 2]], "splits": [[0, 0], [0, 1]]},
        {"mesh": [2], "ranks": [[0, 2]], "splits": [[0, -1]]},
        {"mesh": [2.0], "ranks": [[0, 2]], "splits": []},
        {"mesh": [-1, -2], "ranks": [[0, 2]], "splits": []},
        {"mesh": [], "ranks": [[0, 1 << 60]], "splits": []},
        {"mesh": [2], "ranks": [[0, True], [1, 1]], "splits": []},
    ],
)
def test_layouts_that_cannot_be_are_refused(record):
    with pytest.raises((ValueError, TypeError)):
        Layout.from_json(record, world_size=8)


@st.composite
def slices(draw):
    """A mesh, and some of its dimensions."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=2, max_size=3)))
    ranks = tuple(draw(st.permutations(range(math.prod(mesh)))))
    kept = [dim for dim in range(len(mesh)) if draw(st.booleans())]
    return Layout(mesh, ranks), kept


@quick
@given(slices())
def test_a_layout_on_a_slice_is_spread_alike_by_all_ranks(case):
    whole, kept = case
    assume(any(whole.mesh[dim] > 1 for dim in range(len(whole.mesh)) if dim not in kept))
    grid = np.array(whole.ranks).reshape(whole.mesh)
    extents = tuple(whole.mesh[dim] for dim in kept) or (1,)
    splits = ((0, 0),)
    results, boxes = set(), {}
    for rank in whole.ranks:
        place = np.argwhere(grid == rank)[0]
        own = grid[tuple(slice(None) if dim in kept else place[dim] for dim in range(grid.ndim))]
        mine = Layout(extents, tuple(map(int, own.reshape(-1))), splits)
        boxes[rank] = mine.box((7, 2), mine.group_of(rank))
        results.add(spread([mine, whole])[mine])
    (result,) = results
    assert set(result.ranks) == set(whole.ranks)
    for rank in whole.ranks:
        assert result.box((7, 2), result.group_of(rank)) == boxes[rank]


def test_ranks_that_are_no_slice_stay_as_they_are():
    whole = Layout((2, 2), (0, 1, 2, 3), ((0, 0),))
    for ranks in ((0, 3), (2, 0), (0, 1, 2), (4, 5)):
        other = Layout.replicated(ranks)
        assert spread([other, whole])[other] == other
    assert spread([whole])[whole] == whole


@st.composite
def replicas(draw):
    holders = sorted(draw(st.sets(st.integers(0, 20), min_size=1, max_size=8)))
    members = []
    for number in range(draw(st.integers(0, 6))):
        size = (draw(st.integers(0, 700)), draw(st.sampled_from([0, 1, 17, 300])))
        members.append((f"t{number}", Box((draw(st.integers(0, 50)), 0), size), item_bytes(draw(dtypes))))
    if draw(st.booleans()):
        members.append(("scalar", Box((), ()), 8))
    return members, holders


@quick
@given(replicas())
def test_replicas_are_shared_fairly_and_every_element_once(case):
    members, holders = case
    shares = split_replicas(members, holders)
    assert shares == split_replicas(list(members), tuple(holders))
    stored = dict.fromkeys(holders, 0)
    slack = 1
    for name, box, item in members:
        found = shares[name]
        moved = [Box(tuple(np.subtract(part.start, box.start).tolist()), part.size) for _, part in found]
        assert covers_once(box.size, moved)
        assert all(part.volume for _, part in found)
        for owner, part in found:
            stored[owner] += part.volume * item
        whole = box.volume * item
        if whole < WHOLE_BELOW_BYTES:
            assert len(found) <= 1
            slack = max(slack, whole)
        else:
            slack = max(slack, whole // box.size[0])
    fair = sum(stored.values()) / len(holders)
    assert all(abs(share - fair) <= slack + 1 for share in stored.values())
