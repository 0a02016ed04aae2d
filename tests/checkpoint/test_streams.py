"""Generators that users track: where they were, per rank, and never from a damaged state."""

import json
import random

import numpy as np
import pytest
import torch

from hpc_resume.checkpoint import streams
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError, MismatchError, StateError
from hpc_resume.run import generators
from tests.checkpoint.fakes import make_run, playing, save_as

KINDS = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": random.Random,
    "legacy": np.random.RandomState,
    "pcg": np.random.default_rng,
    "pcgdxsm": lambda seed: np.random.Generator(np.random.PCG64DXSM(seed)),
    "mersenne": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "sfc": lambda seed: np.random.Generator(np.random.SFC64(seed)),
}


def draw(stream):
    if isinstance(stream, torch.Generator):
        return torch.randn(3, generator=stream).tolist()
    if isinstance(stream, random.Random):
        return [stream.gauss(0, 1) for _ in range(3)]  # draws two at a time, and keeps one
    numbers = stream.integers if isinstance(stream, np.random.Generator) else stream.randint
    return [*stream.normal(size=3), int(numbers(2**31, dtype=np.uint32))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1, 200])
def test_it_goes_on_where_it_was(kind, before):
    stream = KINDS[kind](5)
    for _ in range(before):
        draw(stream)
    saved = streams.take("noise", stream)
    assert len(saved) == 8192  # whatever its numbers are, the layout of a shard stays the same
    expected = [draw(stream) for _ in range(3)]
    other = KINDS[kind](6)
    streams.put("noise", other, saved)
    assert [draw(other) for _ in range(3)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_anew_it_follows_its_names(kind):
    found = []
    for names in ((1, 2, 0, "a"), (1, 2, 0, "a"), (1, 2, 1, "a"), (1, 2, 0, "b")):
        stream = KINDS[kind](9)
        draw(stream)
        streams.reseed(stream, *names)
        found.append(draw(stream))
    assert found[0] == found[1]
    assert found[0] != found[2] != found[3] != found[0]


def test_another_kind_is_told():
    saved = streams.take("noise", np.random.default_rng(1))
    with pytest.raises(
        MismatchError, match="noise: a torch cpu generator now, in the checkpoint a NumPy PCG64"
    ):
        streams.put("noise", torch.Generator(), saved)


def damaged(kind, change):
    stream = KINDS[kind](1)
    state = json.loads(streams.take("noise", stream).numpy().tobytes())
    change(state["state"])
    data = json.dumps(state).encode()
    with pytest.raises(IntegrityError, match="no state of a"):
        streams.put("noise", stream, torch.frombuffer(bytearray(data), dtype=torch.uint8))


def test_numpy_is_not_led_outside_of_its_words():
    damaged("mersenne", lambda state: state["state"].update(pos=10**6))
    damaged("mersenne", lambda state: state["state"].update(pos=-1))
    damaged("mersenne", lambda state: state["state"]["key"].pop())
    damaged("mersenne", lambda state: state["state"]["key"].__setitem__(0, 2**40))
    damaged("philox", lambda state: state.update(buffer_pos=9))
    damaged("philox", lambda state: state.update(buffer_pos="x"))
    damaged("philox", lambda state: state.pop("buffer"))
    damaged("pcg", lambda state: state["state"].update(inc=-5))
    damaged("legacy", lambda state: state["state"].update(pos=625))
    damaged("legacy", lambda state: state.update(gauss="nan"))
    damaged("python", lambda state: state["$tuple"][1]["$tuple"].pop())
    damaged("torch", lambda state: state.update({"$bytes": "AAAA"}))
    for data in (b"[1]", b"{}", b"{", b'{"kind":3}'):
        with pytest.raises(IntegrityError):
            streams.put("noise", random.Random(), torch.frombuffer(bytearray(data), dtype=torch.uint8))


def test_entropy_of_the_system_has_no_state():
    with pytest.raises(StateError, match="track\\(noise=…\\): SystemRandom"):
        TrackedState({"noise": random.SystemRandom()}, rank=0, world_size=1)


def items(rank):
    return {"noise": torch.Generator().manual_seed(rank), "numpy": np.random.default_rng(rank)}


def save(tmp_path, size):
    run = make_run(tmp_path)
    name, manifest = save_as(run, size, items)
    return run, name, manifest


def back(run, name, manifest, rank, size, make=items):
    with playing(rank, size), CheckpointReader(run.checkpoints / name, manifest) as reader:
        mine = make(100 + rank)
        state = TrackedState(mine, rank=rank, world_size=size)
        state.restore(reader)
        before = generators.capture()
        try:
            why = generators.restore_all(state, reader, rank=rank, world_size=size, seed=4)
        finally:
            generators.restore(before)
    return [draw(item) for item in mine.values()], why


def test_each_rank_has_its_own_and_another_number_of_ranks_begins_anew(tmp_path):
    run, name, manifest = save(tmp_path, 3)
    # Written by the engine alone, the checkpoint has no states of the process's generators.
    _, why = back(run, name, manifest, 0, 3)
    assert why == "the checkpoint has no states of generators"
    anew = [back(run, name, manifest, rank, 2) for rank in range(2)]
    assert [why for _, why in anew] == ["the checkpoint was taken on 3 ranks"] * 2
    assert anew[0][0] != anew[1][0]
    assert back(run, name, manifest, 1, 2) == anew[1]
    with playing(2, 3), CheckpointReader(run.checkpoints / name, manifest) as reader:
        mine = items(7)
        TrackedState(mine, rank=2, world_size=3).restore_streams(reader)
    assert [draw(each) for each in mine.values()] == [draw(each) for each in items(2).values()]


def test_one_that_was_alike_on_all_ranks_goes_on_on_any_number(tmp_path):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 3, lambda rank: items(5))
    for size in (1, 2, 4):
        found, _ = back(run, name, manifest, size - 1, size)
        assert found == [draw(each) for each in items(5).values()]


def test_what_is_tracked_now_and_was_not_then_is_told(tmp_path):
    run, name, manifest = save(tmp_path, 1)
    with pytest.raises(MismatchError, match="more: tracked now, not in the checkpoint"):
        back(run, name, manifest, 0, 1, lambda rank: {**items(rank), "more": random.Random(1)})
    with pytest.raises(MismatchError, match="numpy: in the checkpoint, not tracked now"):
        back(run, name, manifest, 0, 1, lambda rank: {"noise": items(rank)["noise"]})
