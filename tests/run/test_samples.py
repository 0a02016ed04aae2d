"""What is random in a sample follows from the sample, whoever loads it."""
# ruff: noqa: NPY002 - users' datasets draw from NumPy's global generator

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate, get_worker_info

import hpc_resume as hr
from hpc_resume.errors import UsageError
from hpc_resume.run.loader import ElasticLoader

SIZE, BATCH = 10, 6


class Augmented:
    """Draws from every global generator, an odd number of times, and from one made of the key."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        numbers += [torch.rand(()).item(), torch.randn(3).sum().item()]
        numbers.append(np.random.default_rng(hr.sample_key()).normal())
        return index, torch.tensor(numbers, dtype=torch.float64)


def masked(samples):
    """As a collator that masks tokens."""
    index, numbers = default_collate(samples)
    return index, numbers, torch.rand(3).sum() + random.random() + np.random.rand()


def loaders(world_size, *, dataset=None, **options):
    return [
        ElasticLoader(
            dataset or Augmented(), BATCH, rank=r, world_size=world_size, seed=5, uneven=True, **options
        )
        for r in range(world_size)
    ]


def steps(world_size, first, count, **options):
    """Rows of some steps, one for each sample of the global batch."""
    ranks = loaders(world_size, **options)
    for rank in ranks:
        rank.samples = first * BATCH
    parts = [iter(rank) for rank in ranks]
    found = []
    for _ in range(count):
        batches = [next(part) for part in parts]
        found.append(torch.cat([torch.cat([b[0][:, None].double(), b[1]], 1) for b in batches]))
    return found


WHOLE = steps(1, 0, 10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 8), st.integers(1, 2), st.integers(0, 100))
def test_augmentations_depend_on_neither_ranks_nor_interruptions(world_size, first, count, chance):
    random.seed(chance)
    np.random.seed(chance)
    torch.manual_seed(chance)
    for found, expected in zip(steps(world_size, first, count), WHOLE[first:], strict=False):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentations_and_collating_depend_on_no_workers(workers):
    def first(count, **options):
        (loader,) = loaders(1, collate_fn=masked, **options)
        batches = iter(loader)
        return [next(batches) for _ in range(count)]

    options = {"num_workers": workers, "multiprocessing_context": "fork"}
    for found, expected in zip(first(4, **options), first(4), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({float(extra) for _, _, extra in first(10)}) == 10


def test_every_sample_of_every_epoch_is_augmented_in_its_own_way():
    rows = torch.cat(WHOLE)
    assert len({tuple(row.tolist()) for row in rows[:, 1:]}) == len(rows)
    for column in range(1, rows.shape[1]):
        assert len(set(rows[:, column].tolist())) == len(rows)


def test_a_sample_that_is_drawn_twice_is_augmented_in_two_ways():
    rows = torch.cat(steps(1, 0, 10, weights=[0] * 9 + [1]))
    assert set(rows[:, 0].tolist()) == {9.0}
    assert len(set(rows[:, 1].tolist())) == len(rows)


def test_loading_moves_no_stream_of_the_rank_itself():
    def drawn():
        found = [random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]  # ... with one more in store
        return [*found, random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]

    def run(load):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        first = [random.gauss(0, 1), np.random.randn(), torch.randn(1).item()]
        if load:
            (loader,) = loaders(1, collate_fn=masked)
            next(iter(loader))
        return first + drawn()

    assert run(load=True) == run(load=False)


def test_a_sample_that_fails_leaves_the_streams_alone_too():
    class Failing(Augmented):
        def __getitem__(self, index):
            random.random()
            raise ValueError("no such file")

    random.seed(1)
    state = random.getstate()
    with pytest.raises(ValueError, match="no such file"):
        next(iter(loaders(1, dataset=Failing())[0]))
    assert random.getstate() == state
    with pytest.raises(UsageError, match="no sample is being loaded"):
        hr.sample_key()


class Whole(Augmented):
    """Gives whole batches if it is asked."""

    asked = 0

    def __getitems__(self, indices):
        type(self).asked += 1
        return [torch.tensor(index) for index in indices]


def test_without_seeds_whole_batches_are_asked_for():
    (seeded,), (plain,) = loaders(1, dataset=Whole()), loaders(1, dataset=Whole(), augment_seed=False)
    index, _ = next(iter(seeded))
    assert Whole.asked == 0
    assert next(iter(plain)).tolist() == index.tolist()
    assert Whole.asked == 1


def test_without_seeds_the_streams_of_the_rank_are_drawn_from():
    (loader,) = loaders(1, augment_seed=False)
    random.seed(1)
    state = random.getstate()
    _, numbers = next(iter(loader))
    assert random.getstate() != state
    assert numbers[0, -1] == WHOLE[0][0, -1]  # the key is there all the same


class Opened(Augmented):
    handle = None

    def __getitem__(self, index):
        return torch.tensor(self.handle)


def open_in_worker(worker):
    get_worker_info().dataset.handle = 100 + worker


def test_workers_see_the_users_dataset():
    options = {"num_workers": 1, "multiprocessing_context": "fork", "worker_init_fn": open_in_worker}
    (loader,) = loaders(1, dataset=Opened(), **options)
    assert next(iter(loader)).tolist() == [100] * BATCH


def test_keys_name_seed_epoch_and_index():
    class Keys(Augmented):
        def __getitem__(self, index):
            key = hr.sample_key()
            assert key.number == index
            return torch.tensor([key.seed, key.epoch, key.number])

    batches = iter(loaders(1, dataset=Keys())[0])
    keys = torch.cat([next(batches) for _ in range(5)])
    assert sorted(keys.tolist()) == [[5, epoch, index] for epoch in range(3) for index in range(SIZE)]
