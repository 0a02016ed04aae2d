import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.structure import Structure, TensorRecord, merge
from hpc_resume.errors import IntegrityError
from tests.checkpoint.shapes import boxes_in, quick, structures

WORLD = 8


def everything_stored(structure):
    """By name, who stores which boxes, asked of every rank."""
    found = {name: [] for name in structure.tensors}
    for rank in range(WORLD):
        for name, box in structure.stored_by(rank):
            found[name].append((rank, box))
    return found


@quick
@given(structures())
def test_all_ranks_together_store_every_element_once(structure):
    for name, stored in everything_stored(structure).items():
        record = structure.tensors[name]
        assert covers_once(record.shape, [box for _, box in stored])
        assert all(box.volume and rank in record.layout.ranks for rank, box in stored)


@quick
@given(structures(), st.data())
def test_parts_are_what_ranks_store_of_a_box(structure, data):
    stored = everything_stored(structure)
    for name, record in structure.tensors.items():
        want = data.draw(boxes_in(record.shape))
        found = sorted(structure.parts(name, want))
        assert found == sorted((r, box) for r, box in stored[name] if box.intersect(want) is not None)


@quick
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([((0, 0), (1, 1)), ((1, 1),), ((0, 1), (1, 1))]),
    st.data(),
)
def test_parts_of_tensors_in_panels(rows, columns, splits, data):
    layout = Layout((rows, columns), tuple(range(rows * columns)), splits)
    structure = Structure({"a": TensorRecord((1000, 999), "float64", layout)})
    stored = [(rank, box) for rank in range(16) for _, box in structure.stored_by(rank)]
    assert covers_once((1000, 999), [box for _, box in stored])
    low, left = data.draw(st.integers(0, 999)), data.draw(st.integers(0, 998))
    want = Box((low, left), (data.draw(st.integers(1, 1000 - low)), data.draw(st.integers(1, 999 - left))))
    found = sorted(structure.parts("a", want))
    assert found == sorted((rank, box) for rank, box in stored if box.intersect(want) is not None)


@quick
@given(structures())
def test_structures_survive_json(structure):
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())), world_size=WORLD)
    assert again == structure
    assert again.digest == structure.digest
    assert everything_stored(again) == everything_stored(structure)


@quick
@given(structures(), structures())
def test_merging_keeps_all_or_refuses(one, other):
    clash = any(other.tensors.get(name, record) != record for name, record in one.tensors.items())
    if clash:
        with pytest.raises(IntegrityError, match="What has one name is one tensor"):
            merge([one, other])
    else:
        assert merge([one, other]).tensors == {**one.tensors, **other.tensors}


def test_pieces_say_where_no_layout_does():
    record = TensorRecord((4, 2), "float32", None, ((0, Box((0, 0), (3, 2))), (5, Box((3, 0), (1, 2)))))
    structure = Structure({"a": record})
    again = Structure.from_json(structure.to_json(), world_size=6)
    assert list(again.stored_by(5)) == [("a", Box((3, 0), (1, 2)))]
    assert list(again.parts("a", Box((2, 0), (1, 1)))) == [(0, Box((0, 0), (3, 2)))]
    with pytest.raises(IntegrityError, match="rank 5 of 5"):
        Structure.from_json(structure.to_json(), world_size=5)


@pytest.mark.parametrize(
    "arguments",
    [
        ((-1,), "float32", Layout.replicated((0,))),
        ((1,) * 65, "float32", Layout.replicated((0,))),
        ((1 << 40, 1 << 40), "float32", Layout.replicated((0,))),
        ((2,), "float99", Layout.replicated((0,))),
        ((2,), "float32", Layout((2,), (0, 1), ((0, 1),))),
        ((2,), "float32", None, ((0, Box((0,), (1,))),)),
        ((2,), "float32", Layout.replicated((0,)), ((0, Box((0,), (2,))),)),
    ],
)
def test_records_that_cannot_be_are_refused(arguments):
    with pytest.raises(IntegrityError):
        TensorRecord(*arguments)


class Counted(dict):
    """Counts what is looked up; nobody goes through all of it."""

    looked_up = 0

    def __getitem__(self, key):
        self.looked_up += 1
        return super().__getitem__(key)

    def items(self):
        raise AssertionError("all tensors are gone through")


def test_what_a_rank_stores_takes_as_long_as_it_is_and_comes_by_name():
    ranks = tuple(range(100))
    leader, replicas, rows = (
        Layout.replicated((0,)),
        Layout.replicated(ranks),
        Layout((100,), ranks, ((0, 0),)),
    )
    kinds = {"a": (leader, 2000), "b": (replicas, 500), "c": (rows, 50), "d": (replicas, 500)}
    structure = Structure(
        {
            f"{name}{number % 7}/{number}": TensorRecord((100, 40), "float32", layout)
            for name, (layout, count) in kinds.items()
            for number in range(count)
        }
    )
    first = list(structure.stored_by(0))
    structure.tensors = Counted(structure.tensors)
    for rank in range(1, 100):
        structure.tensors.looked_up = 0
        stored = list(structure.stored_by(rank))
        assert [name for name, _ in stored] == sorted(name for name, _ in stored)
        assert structure.tensors.looked_up <= 2 * len(stored)
        assert len(stored) < 100
    assert len(first) > 2000
    structure.tensors.looked_up = 0
    next(structure.stored_by(0))
    assert structure.tensors.looked_up < 10
