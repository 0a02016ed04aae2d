"""Gradients of micro-batches are those of the global batch, on real ranks."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.errors import UsageError
from hpc_resume.run.microbatches import Share, micro_batches
from tests.ranks import run_ranks

GLOBAL_BATCH = 64


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 2)).double()


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(GLOBAL_BATCH, 9, generator=generator, dtype=torch.float64)
    return x, torch.randn(GLOBAL_BATCH, 2, generator=generator, dtype=torch.float64)


def loss_of(model, part):
    return (model(part["x"]) - part["y"][0]).square().mean()


def gradients(rank, size, kind, limit):
    """Two steps' gradients, so that what the first leaves behind shows in the second."""
    model = network()
    wrapped = fully_shard(model) if kind == "fsdp" else DistributedDataParallel(model)
    x, y = samples()
    share = Share(global_batch=GLOBAL_BATCH, rank=rank, world_size=size)
    mine = slice(share.begin, share.begin + share.samples)
    found, counts = [], []
    for _ in range(2):
        pieces = 0
        batch = {"x": x[mine], "y": (y[mine],)}
        for micro, weight in micro_batches(batch, [wrapped], share=share, world_size=size, limit=limit):
            (loss_of(wrapped, micro) * weight).backward()
            pieces += 1
        counts.append(pieces)
        full = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in model.parameters()]
        found.append([gradient.clone().numpy() for gradient in full])
        wrapped.zero_grad()
    return found, counts


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("ranks", "limit", "pieces"), [(1, 5, 13), (2, None, 1), (2, 7, 5), (3, None, 1), (3, 4, 6), (3, 1, 22)]
)
def test_gradients_equal_those_of_the_global_batch(kind, ranks, limit, pieces):
    model = network()
    x, y = samples()
    loss_of(model, {"x": x, "y": (y,)}).backward()
    expected = [parameter.grad.numpy() for parameter in model.parameters()]
    for found, counts in run_ranks(gradients, ranks, kind, limit):
        assert counts == [pieces] * 2  # as many on every rank, or FSDP2 would wait for ever
        for step in found:
            for mine, right in zip(step, expected, strict=True):
                np.testing.assert_allclose(mine, right, rtol=1e-12, atol=1e-14)


def collectives(rank, size):
    """Count the all-reduces of a step with three micro-batches."""
    model = DistributedDataParallel(network())
    calls = []

    def hook(_, bucket):
        calls.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, hook)
    x, _ = samples()
    share = Share(global_batch=6, rank=rank, world_size=size)
    counts = []
    for micro, weight in micro_batches(x[:3], [model], share=share, world_size=size, limit=1):
        (model(micro).sum() * weight).backward()
        counts.append(len(calls))
    return counts


def test_only_the_last_micro_batch_synchronises():
    assert run_ranks(collectives, 2) == [[0, 0, 1]] * 2


@pytest.mark.parametrize("global_batch", [1, 5, 12, 64])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 5, 100])
def test_every_sample_is_in_one_micro_batch_and_all_weights_make_up_one_batch(global_batch, limit):
    for world_size in range(1, global_batch + 1):
        shares = [Share(global_batch=global_batch, rank=r, world_size=world_size) for r in range(world_size)]
        pieces = [share.pieces(limit) for share in shares]
        assert len({len(each) for each in pieces}) == 1
        positions = [
            share.begin + place
            for share, cut in zip(shares, pieces, strict=True)
            for begin, end, weight in cut
            if weight
            for place in range(begin, end)
        ]
        assert positions == list(range(global_batch))
        assert all(end - begin <= (limit or global_batch) for cut in pieces for begin, end, _ in cut)
        assert sum(weight for cut in pieces for _, _, weight in cut) == pytest.approx(world_size)


def cut(batch, limit=2, share=None):
    return [micro for micro, _ in micro_batches(batch, [], share=share, world_size=1, limit=limit)]


def test_nested_batches_are_cut_sample_by_sample():
    Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - what collate_fn meets
    batch = {
        "pair": Pair(torch.arange(3), np.arange(3)),
        "names": ["a", "b", "c"],
        "list": [torch.arange(3), torch.tensor(7), None, "as it is"],
        "flag": True,
    }
    one, two = cut(batch)
    assert torch.equal(one["pair"].left, torch.tensor([0, 1]))
    assert two["pair"].right.tolist() == [2]
    assert (one["names"], two["names"]) == (["a", "b"], ["c"])
    assert torch.equal(two["list"][0], torch.tensor([2]))
    assert two["list"][1:] == [torch.tensor(7), None, "as it is"]
    assert two["flag"] is True


def test_a_single_micro_batch_is_the_batch_itself():
    batch = {"ragged": [torch.arange(3), torch.arange(5)]}
    assert cut(batch, limit=None)[0] is batch


def test_what_can_not_be_cut_is_named():
    with pytest.raises(UsageError, match=r"batch\['mask'\] has shape \[5, 5\] in a batch of 3 samples"):
        cut({"x": torch.zeros(3), "mask": torch.zeros(5, 5)})
    with pytest.raises(UsageError, match=r"batch\[1\] is a object"):
        cut((torch.zeros(3), object()))
    with pytest.raises(UsageError, match="no tensor in the batch"):
        cut(["a", "b"])


def test_a_batch_that_is_not_this_ranks_part_is_refused():
    share = Share(global_batch=8, rank=0, world_size=2)
    with pytest.raises(
        UsageError, match="has 3 samples in its first dimension, but this rank's part of the step is 4 of 8"
    ):
        cut(torch.zeros(3), share=share)
