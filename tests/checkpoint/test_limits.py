"""What can't be read again is not written; and rules that a hostile file could be slow by are fast."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch

from hpc_resume.checkpoint import objects, store
from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.errors import StateError
from tests.hostile.base import Writer, make_run, tracked


def guillotine(rng, shape, pieces):
    """Boxes that tile a tensor, cut at random."""
    boxes = [Box.whole(shape)]
    while len(boxes) < pieces:
        box = boxes.pop(rng.randrange(len(boxes)))
        dim = rng.randrange(len(shape))
        if box.size[dim] < 2:
            boxes.append(box)
            continue
        at = rng.randrange(1, box.size[dim])
        low, high = list(box.size), list(box.size)
        start = list(box.start)
        low[dim], high[dim] = at, box.size[dim] - at
        start[dim] += at
        boxes += [Box(box.start, tuple(low)), Box(tuple(start), tuple(high))]
    return boxes


@pytest.mark.parametrize("seed", range(20))
def test_tilings_are_told_from_what_is_none(seed):
    rng = random.Random(seed)
    shape = tuple(rng.randrange(3, 9) for _ in range(rng.randrange(1, 4)))
    boxes = guillotine(rng, shape, rng.randrange(1, math.prod(shape) // 2 + 1))
    rng.shuffle(boxes)
    assert covers_once(shape, boxes)
    assert not covers_once(shape, [*boxes, boxes[0]])
    assert not covers_once(shape, boxes[1:])
    for number, box in itertools.islice(enumerate(boxes), 5):
        moved = Box((*box.start[:-1], (box.start[-1] + 1) % shape[-1]), box.size)
        assert not covers_once(shape, [*boxes[:number], moved, *boxes[number + 1 :]]) or moved == box


def test_a_pinwheel_that_no_cut_goes_through_is_a_tiling():
    turns = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert covers_once((3, 3), [Box(*turn) for turn in turns])
    assert not covers_once((3, 3), [Box(*turn) for turn in [*turns[:4], ((0, 1), (1, 1))]])


@pytest.mark.parametrize("mesh", [(4096,), (1, 4096), (64, 64), (16, 16, 16)])
def test_the_boxes_of_thousands_of_ranks_are_checked_at_once(mesh):
    shape = tuple(2 * extent for extent in mesh)
    boxes = [
        Box(tuple(2 * at for at in place), (2,) * len(mesh)) for place in itertools.product(*map(range, mesh))
    ]
    begun = time.process_time()
    assert covers_once(shape, boxes)
    assert time.process_time() - begun < 1


def test_one_rank_that_splits_columns_finds_its_panels():
    """The boxes that it stores are those in which a reader looks."""
    layout = Layout((1,), (0,), ((0, 1),))
    structure = Structure({"w": TensorRecord((256, 512), "float32", layout)})
    whole = Box.whole((256, 512))
    stored = [box for _, box in structure.stored_by(0)]
    assert len(stored) == 8
    assert [box for _, box in structure.parts("w", whole)] == stored


def test_a_parameter_that_never_had_a_gradient_can_be_restored(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "unused": torch.nn.Linear(3, 3)})
        optimizer = torch.optim.AdamW(net.parameters())
        net["used"](torch.ones(3)).sum().backward()
        optimizer.step()
        return net, optimizer

    net, optimizer = build(1)
    state = TrackedState({"net": net, "optimizer": optimizer}, rank=0, world_size=1)
    captured = state.capture({})
    assert not any("unused" in name for name in captured.leaves if name.startswith("optimizer"))

    writer = Writer(tmp_path / "run", ranks=1)
    place = writer.run.checkpoints / writer.save(3, state)
    writer.close()
    other, fresh = build(2)
    with CheckpointReader(place, read_manifest(place)) as reader:
        TrackedState({"net": other, "optimizer": fresh}, rank=0, world_size=1).restore(reader)
    assert torch.equal(other["unused"].weight, net["unused"].weight)
    ours, theirs = optimizer.state[net["used"].weight], fresh.state[other["used"].weight]
    assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    assert other["unused"].weight not in fresh.state


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.datetime64("2020-01-01"), "datetime64"),
        (np.str_("x"), "str_"),
        (1 << 20_000, "20001 bits"),
        ({"\ud800": torch.ones(2)}, "can't be a tensor's name"),
        ({"x" * 3000: torch.ones(2)}, "can't be a tensor's name"),
    ],
    ids=["time", "numpy-text", "long-integer", "half-a-character", "long-name"],
)
def test_what_could_not_be_read_is_not_stored(value, why):
    with pytest.raises(StateError, match=why):
        TrackedState({"extra": {"value": value}}, rank=0, world_size=1)
    extra = {}
    state = TrackedState({"extra": extra}, rank=0, world_size=1)
    extra["value"] = value  # while training
    with pytest.raises(StateError, match=why):
        state.capture({})


@pytest.mark.parametrize("text", ["\udcff", "é", "\0"])
def test_any_string_is_stored(text):
    assert objects.decode(objects.parse(objects.dump(objects.encode({"a": text}, ())))) == {"a": text}


def test_the_deepest_state_that_is_stored_is_read():
    deep, deepest = 0, None
    for level in range(objects.MAX_DEPTH + 5):
        deep = {("a", level): deep} if level % 3 else (deep,)
        try:
            encoded = objects.encode(deep, ("key",))
        except StateError:
            break
        deepest = deep, encoded, level
    assert deepest[2] > objects.MAX_DEPTH - 5
    assert objects.decode(objects.parse(objects.dump(deepest[1]))) == deepest[0]


def test_a_run_of_two_ranks_is_restored_by_one(tmp_path):
    run = make_run(tmp_path / "run")
    name, manifest = store.find(run)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        tracked(3).restore(reader)
