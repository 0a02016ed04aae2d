"""Loaders that are not ours: they go on exactly where they were, or are refused before anything is loaded."""

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler, StatefulDistributedSampler

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import Declined, IntegrityError, StateError, UsageError
from hpc_resume.run.foreign import ForeignLoader, is_loader
from hpc_resume.run.workers import Shielded
from hpc_resume.rundir import RunDirectory
from tests.checkpoint.fakes import make_run, playing, save_as
from tests.ranks import Attempt
from tests.run.test_node_types import ask_to_stop


@pytest.fixture(autouse=True)
def no_group_is_left():
    """An attempt that fails leaves its process group to the process, which would end."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Stream(IterableDataset):
    """Numbers 0 to 19 from a rank's and a worker's own part, with a state."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size
        self.read = self.resume = 0

    def __iter__(self):
        self.read, self.resume = self.resume, 0
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = range(self.rank * workers + worker, 20, self.world_size * workers)
        for number in mine[self.read :]:
            self.read += 1
            yield number

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = self.resume = state["read"]


def streaming(rank, world_size, **options):
    return StatefulDataLoader(Stream(rank, world_size), batch_size=2, **options)


def shuffling(rank, world_size):
    """With a sampler whose state is a tensor."""
    sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(7))
    return StatefulDataLoader(range(10), batch_size=3, sampler=sampler)


def skipping(rank, world_size):
    """With a sampler that has neither a state nor a generator."""
    return StatefulDataLoader(range(10), batch_size=3, sampler=torch.utils.data.RandomSampler(range(10)))


def distributed(rank, world_size):
    sampler = StatefulDistributedSampler(range(10), world_size, rank, shuffle=True, seed=2)
    return StatefulDataLoader(range(10), batch_size=3, sampler=sampler)


def with_workers(rank, world_size):
    return streaming(rank, world_size, num_workers=2, multiprocessing_context="fork")


def train(folder, make, until):
    """Batches of the steps that are done, and what the loop draws for itself."""
    seen = []
    with hr.Run(folder, seed=3) as run:
        loader = make(run.rank, run.world_size)
        run.track(model=torch.nn.Linear(2, 1), data=loader)
        for step, batch in run.steps(loader, until=until):
            seen.append((step, batch.tolist(), torch.rand(()).item()))
    return seen


@pytest.mark.parametrize("make", [streaming, shuffling, skipping, distributed, with_workers])
def test_a_loader_goes_on_where_it_was_pass_after_pass(tmp_path, make):
    whole = train(tmp_path / "whole", make, 23)
    parts = [train(tmp_path / "parts", make, until) for until in (3, 4, 10, 12, 23)]
    assert [step for part in parts for step in part] == whole
    assert [len(part) for part in parts] == [3, 1, 6, 2, 11]
    per_pass = 10 if make in {streaming, with_workers} else 4
    for begin in range(0, 20, per_pass):
        used = [number for _, batch, _ in whole[begin : begin + per_pass] for number in batch]
        assert sorted(used) == list(range(20 if per_pass == 10 else 10))
    if make in {shuffling, skipping, distributed}:
        assert [batch for _, batch, _ in whole[:4]] != [batch for _, batch, _ in whole[4:8]]


# ------------------------------------------------- several ranks


class Counter:
    """A loader of somebody's: as small as can be."""

    def __init__(self, at=0, **attributes):
        self.at = at
        self.extra = None
        vars(self).update(attributes)

    def __iter__(self):
        while self.at < 100:
            self.at += 1
            yield self.at

    def state_dict(self):
        return {"at": self.at, "extra": self.extra}

    def load_state_dict(self, state):
        self.at, self.extra = state["at"], state["extra"]


def saved(tmp_path, size, loader_of):
    run = make_run(tmp_path)
    name, manifest = save_as(run, size, lambda rank: tracked(loader_of(rank), rank, size))
    return run.checkpoints / name, manifest


def tracked(loader, rank, world_size):
    foreign = ForeignLoader("data", loader, rank=rank, world_size=world_size, seed=0)
    return {"data": foreign, "meta": {"best": 1.0}}


def restore(folder, manifest, loader, rank, world_size):
    with playing(rank, world_size), CheckpointReader(folder, manifest) as reader:
        items = tracked(loader, rank, world_size)
        items["meta"]["best"] = 2.0
        state = TrackedState(items, rank=rank, world_size=world_size)
        try:
            state.restore(reader)
        except Exception:
            assert (loader.at, items["meta"]) == (0, {"best": 2.0})  # nothing was loaded
            raise
    return loader


def test_each_rank_gets_its_own_state_back_tensors_too(tmp_path):
    def with_tensors(rank):
        extra = {
            "torch": torch.arange(3) + rank,
            "bits": torch.tensor([], dtype=torch.bool),
            "numpy": [np.float32(2.5), np.full((2, 2), rank, dtype=np.uint8)],
            "ordered": OrderedDict(state=(torch.tensor(1.5 + rank),)),
        }
        return Counter(10 + rank, extra=extra)

    folder, manifest = saved(tmp_path, 3, with_tensors)
    for rank in range(3):
        found, expected = restore(folder, manifest, Counter(), rank, 3), with_tensors(rank)
        assert found.at == expected.at
        assert torch.equal(found.extra["torch"], expected.extra["torch"])
        assert found.extra["bits"].dtype == torch.bool
        assert found.extra["bits"].shape == (0,)
        assert found.extra["numpy"][0] == 2.5
        assert (found.extra["numpy"][1] == rank).all()
        assert found.extra["ordered"]["state"][0].item() == 1.5 + rank


@pytest.mark.parametrize("differing", [True, False])
def test_another_number_of_ranks_is_declined_even_if_the_states_are_equal(tmp_path, differing):
    folder, manifest = saved(tmp_path, 2, lambda rank: Counter(5 + differing * rank))
    for size in (1, 3):
        match = rf"data: Counter was saved on 2 ranks.* where {size} ranks go on.*on 2 ranks.*run\.loader.*elastic = True"
        with pytest.raises(Declined, match=match):
            restore(folder, manifest, Counter(), size - 1, size)


def test_a_state_that_is_the_same_on_any_number_of_ranks_goes_on_anywhere(tmp_path):
    folder, manifest = saved(tmp_path, 2, lambda rank: Counter(5, elastic=True))
    assert manifest.differing_ranks == ()
    assert restore(folder, manifest, Counter(elastic=True), 2, 3).at == 5


def test_a_state_that_says_it_is_the_same_and_is_not_is_refused_elsewhere(tmp_path):
    folder, manifest = saved(tmp_path, 2, lambda rank: Counter(5 + rank, elastic=True))
    with pytest.raises(UsageError, match="differed from rank 0's"):
        restore(folder, manifest, Counter(elastic=True), 2, 3)
    assert restore(folder, manifest, Counter(elastic=True), 1, 2).at == 6


def test_where_a_lost_rank_was_is_not_made_up():
    state = ForeignLoader("data", Counter(5), rank=0, world_size=2, seed=0).state_dict()
    other = ForeignLoader("data", Counter(), rank=1, world_size=2, seed=0)
    with pytest.raises(IntegrityError, match="Counter of rank 1 was is lost"):
        other.check_state(state)


@pytest.mark.parametrize(
    "packed",
    [
        ["int64", [2], b""],
        ["int64", [-1], b"12345678"],
        ["object", [1], b"12345678"],
        ["int64", "x", b""],
        [1],
        5,
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_loaded(packed):
    foreign = ForeignLoader("data", Counter(), rank=0, world_size=1, seed=0)
    state = {**foreign.state_dict(), "loader": {"at": [{"hpc_resume/tensor": packed, "is_tensor": True}]}}
    with pytest.raises(IntegrityError, match="state"):
        foreign.check_state(state)


def test_workers_of_other_loaders_are_spared_by_signals_too():
    loader = with_workers(0, 1)
    ForeignLoader("data", loader, rank=0, world_size=1, seed=0)
    assert isinstance(loader.worker_init_fn, Shielded)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (torch.zeros(5 << 20), r"data/extra: .*more than 16 MiB of tensors.*not what it has read"),
        (torch.zeros(1, dtype=torch.bfloat16), r"data/extra: .*bfloat16 in it can't be stored"),
        (np.array([None]), r"data/extra: .*object in it can't be stored"),
    ],
)
def test_a_state_that_is_no_position_is_refused_by_name(extra, match):
    with pytest.raises(StateError, match=match):
        ForeignLoader("data", Counter(extra=extra), rank=0, world_size=1, seed=0).state_dict()


def stream(steps, until=None):
    with hr.Run() as run:
        loader = with_workers(run.rank, run.world_size)
        run.track(model=torch.nn.Linear(2, 1), data=loader)
        for step, batch in run.steps(loader, until=steps):
            with Path(run.directory.root / f"seen-{run.rank}.txt").open("a") as file:
                file.write(f"{step} {batch.tolist()}\n")
            if until is not None:
                ask_to_stop(run, step, at=until)


def test_ranks_with_workers_go_on_on_as_many_ranks_only(tmp_path):
    assert Attempt(tmp_path, 2, stream, 12, 4).wait() == [75, 75]
    one = Attempt(tmp_path, 1, stream, 12)
    one.wait()
    assert "data: StatefulDataLoader was saved on 2 ranks" in one.log.read_text()
    two = Attempt(tmp_path, 2, stream, 12)
    assert two.wait() == [0, 0], two.log.read_text()
    for rank in range(2):
        lines = (tmp_path / f"seen-{rank}.txt").read_text().splitlines()
        workers = [list(range(rank * 2 + worker, 20, 4)) for worker in range(2)]
        parts = [[mine[0:2], mine[2:4], mine[4:5]] for mine in workers]
        one_pass = [parts[worker][place] for place in range(3) for worker in range(2)]
        assert lines == [f"{step} {batch}" for step, batch in enumerate(one_pass * 2)]


# ------------------------------------------------- what run.steps takes


def steps_of(tmp_path, batches, until=3, **items):
    with hr.Run(tmp_path) as run:
        run.track(model=torch.nn.Linear(2, 1), **items)
        return [batch for _, batch in run.steps(batches, until=until)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: DataLoader(range(9)),
            r"a torch.utils.data.DataLoader can't say where it is.*run\.loader\(dataset",
        ),
        (lambda: shuffling(0, 1), r"this loader \(StatefulDataLoader\) is not tracked.*run\.track\(data=…\)"),
        (Counter, r"this loader \(Counter\) is not tracked"),
    ],
)
def test_a_loader_whose_position_would_be_lost_is_refused(tmp_path, capsys, make, match):
    with pytest.raises(SystemExit) as caught:
        steps_of(tmp_path, make())
    assert caught.value.code == 2
    assert re.search(match, capsys.readouterr().err)


def test_any_other_iterable_is_gone_through_once_and_the_log_says_that_it_begins_anew(tmp_path, capsys):
    assert steps_of(tmp_path, iter(DataLoader(range(2))), until=5) == [0, 1]
    assert "nothing that is tracked says where the data" in capsys.readouterr().err


def test_what_is_made_of_a_tracked_loader_is_taken(tmp_path, capsys):
    loader = Counter()
    assert steps_of(tmp_path, enumerate(loader), data=loader) == [(0, 1), (1, 2), (2, 3)]
    assert "nothing that is tracked" not in capsys.readouterr().err


def test_any_of_several_tracked_loaders_is_taken_and_its_samples_are_counted(tmp_path):
    with hr.Run(tmp_path) as run:
        one, two = run.loader(range(100), global_batch=2), run.loader(range(100), global_batch=5)
        run.track(model=torch.nn.Linear(2, 1), one=one, two=two)
        assert len(list(run.steps(two, until=3))) == 3
        assert len(list(run.steps(one, until=4))) == 1
    _, manifest = store.find(RunDirectory(tmp_path), 3)
    assert manifest.samples == 15
    assert (one.samples, two.samples) == (2, 15)


def test_a_loader_that_can_be_gone_through_once_ends_the_run(tmp_path):
    loader = Counter(97)
    assert steps_of(tmp_path, loader, until=9, data=loader) == [98, 99, 100]


def test_a_loader_without_a_batch_is_a_mistake(tmp_path, capsys):
    loader = Counter(100)
    with pytest.raises(SystemExit):
        steps_of(tmp_path, loader, data=loader)
    assert "data (Counter) gave no batch at all" in capsys.readouterr().err


def test_models_and_dicts_are_no_loaders():
    assert is_loader(Counter())
    for item in (torch.nn.Sequential(), torch.nn.ModuleList(), {"a": 1}, OrderedDict(), torch.Generator()):
        assert not is_loader(item)
