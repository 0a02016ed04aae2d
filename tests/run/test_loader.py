"""Parts of the global batch on any number of ranks."""

import pytest
import torch

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import Declined, MismatchError, UsageError
from hpc_resume.run.loader import _SAMPLERS, ElasticLoader
from tests.checkpoint.fakes import make_run, playing, save_as


def loader(rank, world_size, *, global_batch=8, uneven=False, **options):
    data = torch.arange(100)
    return ElasticLoader(
        data, global_batch, rank=rank, world_size=world_size, seed=3, uneven=uneven, **options
    )


def steps(world_size, count=20, **how):
    ranks = [iter(loader(rank, world_size, **how)) for rank in range(world_size)]
    return [[next(rank).tolist() for rank in ranks] for _ in range(count)]


def test_the_order_is_the_same_on_any_number_of_ranks_that_divide_the_batch_or_not():
    whole = [[each for part in step for each in part] for step in steps(1)]
    for world_size in (2, 3, 5, 8):
        found = steps(world_size, uneven=True)
        assert [[each for part in step for each in part] for step in found] == whole
        sizes = {len(part) for step in found for part in step}
        assert max(sizes) - min(sizes) <= 1


def test_uneven_parts_are_declined_unless_something_weighs_them():
    with pytest.raises(Declined, match=r"can't be split evenly over 3 ranks.*uneven=True.*9, say"):
        loader(0, 3)


def test_a_rank_without_samples_is_declined():
    with pytest.raises(Declined, match=r"leaves some of 9 ranks without a sample"):
        loader(0, 9, uneven=True)


def test_no_batch_at_all_is_a_mistake_on_any_nodes():
    with pytest.raises(UsageError, match="must be 1 or more") as caught:
        loader(0, 1, global_batch=0)
    assert not isinstance(caught.value, Declined)


def test_the_position_survives_another_number_of_ranks():
    two = loader(0, 2)
    batches = iter(two)
    next(batches), next(batches)
    three = loader(2, 3, uneven=True)
    three.load_state_dict(two.state_dict())
    assert next(iter(three)).tolist() == steps(3, 3, uneven=True)[2][2]


# ------------------------------------------------- epochs


def test_epochs_are_counted_where_the_batch_does_not_divide_them():
    data = loader(0, 1, global_batch=32)  # 100 samples
    assert (data.steps_per_epoch, data.steps_for(1), data.steps_for(8), data.steps_for(0.5)) == (4, 4, 25, 2)
    batches, seen = iter(data), []
    assert (data.epoch, data.epoch_ends) == (0, False)
    for _ in range(7):
        next(batches)
        seen.append((data.epoch, data.epoch_ends))
    assert seen == [(0, False), (0, False), (0, False), (0, True), (1, False), (1, False), (1, True)]


def test_dropping_the_rest_makes_epochs_of_whole_batches():
    data = loader(0, 1, global_batch=32, drop_last=True)
    assert (data.steps_per_epoch, data.steps_for(8)) == (3, 24)
    batches = iter(data)
    epochs = [[index for _ in range(3) for index in next(batches).tolist()] for _ in range(3)]
    assert all(len(set(epoch)) == 96 for epoch in epochs)
    assert (
        len({frozenset(range(100)) - set(epoch) for epoch in epochs}) == 3
    )  # never the same ones are left out
    assert (data.epoch, data.epoch_ends) == (2, True)


# ------------------------------------------------- what is refused


class WeightedRandomSampler:
    pass


class MySampler:
    pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"sampler": WeightedRandomSampler()},
            r"sampler=WeightedRandomSampler: instead of it, use weights=…",
        ),
        ({"sampler": MySampler()}, r"sampler=MySampler: .*state_dict\(\).*StatefulDataLoader"),
        ({"batch_size": 8}, "batch_size=: use global_batch, which counts the samples of all ranks"),
        ({"num_worker": 2}, r"no such option 'num_worker'; did you mean num_workers\?"),
        ({"weight": [1]}, r"no such option 'weight'; did you mean weights\?"),
        ({"qqqq": 2}, "no such option 'qqqq'; those of torch.utils.data.DataLoader are taken"),
        ({"batch_sampler": MySampler()}, "batch_sampler=: use global_batch, with lengths=…"),
        ({"generator": torch.Generator()}, "generator=: use the run's seed"),
    ],
)
def test_what_follows_from_the_order_is_refused_with_what_to_use_instead(options, match):
    with pytest.raises(UsageError, match=match):
        loader(0, 1, **options)


def test_all_of_pytorchs_samplers_are_known():
    from torch.utils.data import sampler

    known = {
        name for name, kind in vars(sampler).items() if isinstance(kind, type) and name.endswith("Sampler")
    }
    assert known - {"Sampler", "BatchSampler"} <= set(_SAMPLERS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1.0] * 100}, "weights was None, is '"),
        ({"drop_last": True}, "drop_last was None, is True"),
        ({"lengths": [1.0] * 100, "window": 3}, "lengths was None.*window was None, is 3"),
        ({"global_batch": 4}, "global_batch was 8, is 4"),
        ({"shuffle": False}, "shuffle was True, is False"),
    ],
)
def test_a_position_in_another_order_is_refused_before_anything_is_loaded(tmp_path, options, match):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda _: {"data": loader(0, 1), "meta": {"best": 1.0}})
    items = {"data": loader(0, 1, **options), "meta": {"best": 2.0}}
    with playing(0, 1), CheckpointReader(run.checkpoints / name, manifest) as reader:
        state = TrackedState(items, rank=0, world_size=1)
        with pytest.raises(MismatchError, match=f"data: run.loader: .*another order: .*{match}"):
            state.restore(reader)
    assert items["meta"] == {"best": 2.0}


def test_other_weights_are_another_order():
    state = loader(0, 1, weights=[1.0] * 100).state_dict()
    with pytest.raises(UsageError, match="weights was '"):
        loader(0, 1, weights=[1.0] * 99 + [1.5]).load_state_dict(state)


# ------------------------------------------------- workers


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_interruptions_change_nothing(workers):
    whole = [batch for (batch,) in steps(1, 9, global_batch=7, lengths=list(range(100)))]
    found, state = [], None
    for world_size, count in ((1, 2), (2, 4), (1, 3)):
        options = {"num_workers": workers, "multiprocessing_context": "fork", "lengths": list(range(100))}
        ranks = [
            loader(rank, world_size, global_batch=7, uneven=True, **options) for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state or rank.state_dict())
        parts = [iter(rank) for rank in ranks]
        found += [[index for part in parts for index in next(part).tolist()] for _ in range(count)]
        state = ranks[0].state_dict()
    assert found == whole
