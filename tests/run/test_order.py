"""The order of samples: the same on any ranks, each sample once an epoch, from any position at no cost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_resume.errors import Declined, UsageError
from hpc_resume.run import loader as loader_module
from hpc_resume.run import order as order_module
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.order import Order, permute


@pytest.fixture(scope="module", autouse=True)
def few_ahead():
    """Most of these look at few steps; places are computed some steps at a time, here too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_AHEAD", 24)
        yield


def lengths_of(size):
    return np.random.default_rng(size).integers(1, 500, size)


@st.composite
def kinds(draw):
    """What a user may ask for: the dataset's size, the global batch, and options."""
    size, batch = draw(st.integers(1, 60)), draw(st.integers(1, 24))
    options = {"seed": draw(st.integers(0, 2**40)), "shuffle": draw(st.booleans())}
    if size >= batch:
        options["drop_last"] = draw(st.booleans())
    if draw(st.booleans()):
        options |= {"lengths": lengths_of(size), "window": draw(st.integers(1, 4))}
    return size, batch, options


class Interrupted:
    """Trains by turns on drawn numbers of ranks; what each step used, and in which epoch."""

    def __init__(self, size, batch, options):
        self.size, self.batch, self.options = size, batch, options
        self.state = None

    def turn(self, world_size, steps):
        """Go on for some steps on so many ranks, all of which must agree where they are."""
        options = {"uneven": True, "augment_seed": False, **self.options}
        ranks = [
            ElasticLoader(range(self.size), self.batch, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        if self.state is not None:
            for rank in ranks:
                rank.load_state_dict(self.state)
        parts = [iter(rank) for rank in ranks]
        found = [[index for part in parts for index in next(part).tolist()] for _ in range(steps)]
        assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
        self.state = ranks[0].state_dict()
        return found


turns = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(kinds(), turns)
def test_interruptions_and_ranks_change_nothing_and_each_sample_comes_once_an_epoch(kind, turns):
    size, batch, options = kind
    run = Interrupted(size, batch, options)
    found = [step for ranks, count in turns for step in run.turn(min(ranks, batch), count)]
    # The same global batches, in the same order, as on one rank without interruption.
    assert found == Interrupted(size, batch, options).turn(1, len(found))
    used = [index for step in found for index in step]
    length = size // batch * batch if options.get("drop_last") else size
    whole = len(used) // length
    if not options.get("lengths", np.empty(0)).size:
        for epoch in range(whole + 1):
            part = used[epoch * length : (epoch + 1) * length]
            assert max(Counter(part).values(), default=1) == 1
            assert epoch == whole or options.get("drop_last") or sorted(part) == list(range(size))
    # Batches may have samples of two epochs: what a sample's epoch is, the order itself says.
    draws = Order(size, batch, **options).at(np.arange(len(used)))
    assert draws.index.tolist() == used
    pairs = Counter(zip(draws.epoch.tolist(), used, strict=True))
    assert max(pairs.values(), default=1) == 1
    per_epoch = Counter(draws.epoch.tolist())
    assert all(per_epoch[epoch] == length for epoch in range(whole))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 2**20))
def test_an_epoch_is_a_permutation(size, seed, epoch):
    found = permute(np.arange(size), size, seed, epoch)
    assert sorted(found.tolist()) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(permute(np.arange(50), 50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_the_one_that_older_checkpoints_count_in():
    assert permute(np.arange(8), 8, 3, 1).tolist() == GOLDEN


GOLDEN = [4, 7, 1, 6, 5, 3, 0, 2]


# ------------------------------------------------- by weight


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), turns, st.integers(0, 2**40), st.data())
def test_draws_by_weight_are_the_same_on_any_ranks_and_never_of_weight_zero(size, batch, turns, seed, data):
    weights = data.draw(
        st.lists(st.floats(0, 1e6), min_size=size, max_size=size).filter(lambda values: sum(values) > 0)
    )
    options = {"seed": seed, "weights": weights}
    run = Interrupted(size, batch, options)
    found = [step for ranks, count in turns for step in run.turn(min(ranks, batch), count)]
    assert found == Interrupted(size, batch, options).turn(1, len(found))
    assert all(weights[index] > 0 for step in found for index in step)


def test_draws_by_weight_follow_the_weights_and_differ_from_epoch_to_epoch():
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    order = Order(6, 1, seed=1, weights=weights)
    draws = order.at(np.arange(60_000))
    counts = np.bincount(draws.index, minlength=6)
    expected = weights / weights.sum() * counts.sum()
    drawn = weights > 0
    assert counts[~drawn].sum() == 0
    chi_squared = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert chi_squared < 13.8  # 2 degrees of freedom: once in 1000
    epochs = {tuple(draws.index[draws.epoch == epoch].tolist()) for epoch in range(1000)}
    assert len(epochs) > 100
    # Twice the same sample in one epoch is two draws.
    assert draws.number[:6].tolist() == list(range(6))


# ------------------------------------------------- by length


def test_batches_by_length_are_tighter_and_shuffled():
    size, batch = 6400, 32
    lengths = np.random.default_rng(0).integers(1, 1000, size)

    def spread(**options):
        index = Order(size, batch, seed=0, **options).at(np.arange(size)).index.reshape(-1, batch)
        return lengths[index], index

    plain, _ = spread()
    found, index = spread(lengths=lengths, window=20)
    assert np.ptp(found, axis=1).mean() < np.ptp(plain, axis=1).mean() / 10
    assert sorted(index.reshape(-1).tolist()) == list(range(size))
    means = found.mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # batches do not ascend
    halves = found[:, : batch // 2].mean(axis=1) - found[:, batch // 2 :].mean(axis=1)
    assert abs((halves > 0).mean() - 0.5) < 0.15  # nor does what is in them


def test_without_shuffling_a_window_is_sorted_and_no_more():
    lengths = [5, 1, 4, 2, 9, 8, 7, 6]
    order = Order(8, 2, seed=0, shuffle=False, lengths=lengths, window=2)
    assert order.at(np.arange(8)).index.tolist() == [1, 3, 2, 0, 7, 6, 5, 4]


# ------------------------------------------------- the cost


def counted(monkeypatch):
    counts = {"computed": 0, "loaded": 0}

    def permute_counted(positions, *rest):
        counts["computed"] += np.size(positions)
        return permute(positions, *rest)

    monkeypatch.setattr(order_module, "permute", permute_counted)

    class Data:
        def __len__(self):
            return 10_000_000

        def __getitem__(self, index):
            counts["loaded"] += 1
            return index

    return counts, Data()


@pytest.mark.parametrize("step", [0, 1_000_000_000])
def test_going_on_costs_the_same_from_anywhere(monkeypatch, step):
    ahead = 1024
    monkeypatch.setattr(loader_module, "_AHEAD", ahead)
    counts, data = counted(monkeypatch)
    for options, most in (({}, ahead), ({"lengths": np.ones(len(data)), "window": 8}, 2 * ahead)):
        counts["computed"] = counts["loaded"] = 0
        loader = ElasticLoader(data, 32, rank=1, world_size=2, seed=1, **options)
        loader.load_state_dict({**loader.state_dict(), "samples": step * 32})
        next(iter(loader))
        assert counts["loaded"] == 16
        assert 0 < counts["computed"] <= most + 8 * 32


# ------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1, 2]}, r"weights=… has shape \[2\], the dataset 4 samples"),
        ({"weights": [1, 2, -1, 3]}, r"weights\[2\] is -1.0; each must be finite and 0 or more"),
        ({"weights": [0, 0, 0, 0]}, "adds up to nothing"),
        ({"weights": [1e308] * 4}, "more than can be counted"),
        ({"weights": ["a"] * 4}, "must be a number for each sample"),
        ({"weights": [1] * 4, "shuffle": False}, "leave out shuffle=False"),
        ({"lengths": [1, 2, float("nan"), 3]}, r"lengths\[2\] is nan"),
        ({"lengths": [1] * 4, "window": 0}, "window=0 must be 1 or more"),
        ({"drop_last": True}, "leaves nothing of 4 samples in global batches of 8"),
    ],
)
def test_what_can_not_be_an_order_is_refused(options, match):
    with pytest.raises(UsageError, match=match) as caught:
        Order(4, 8, seed=0, **options)
    assert not isinstance(caught.value, Declined)
