"""Parts of the global batch on any number of ranks."""

import pytest
import torch

from hpc_resume.errors import Declined, UsageError
from hpc_resume.run.loader import ElasticLoader


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
