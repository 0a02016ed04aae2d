"""The order in which DDP sums gradients."""

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.run.bucketorder import keep_order
from tests.ranks import run_ranks


def net():
    torch.manual_seed(0)
    parts = [torch.nn.Linear(23, 31), torch.nn.GELU(), torch.nn.Linear(31, 17), torch.nn.Linear(17, 5)]
    return torch.nn.Sequential(*parts)


def gradients_of_steps(rank, size, *, ordered):
    """Gradients of one and the same batch in an attempt's first steps; their mean over ranks taken by us."""
    model = DistributedDataParallel(net())
    assert not ordered or keep_order([model]) == []
    batch = torch.randn(8, 23, generator=torch.Generator().manual_seed(rank))
    found = []
    for _ in range(3):
        model.zero_grad()
        model(batch).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    alone = net()
    alone(batch).square().mean().backward()
    for p in alone.parameters():
        torch.distributed.all_reduce(p.grad)
        p.grad.div_(size)
    return found, [p.grad for p in alone.parameters()]


def same(one, two):
    return all(map(torch.equal, one, two))


def test_all_steps_sum_in_one_order():
    for (first, second, third), mean in run_ranks(gradients_of_steps_in_order, 4):
        assert same(first, second)
        assert same(second, third)
        assert all(torch.allclose(mine, other, atol=1e-7) for mine, other in zip(first, mean, strict=True))


def gradients_of_steps_in_order(rank, size):
    return gradients_of_steps(rank, size, ordered=True)


def own_hook(rank, size):
    model = DistributedDataParallel(net())
    model.register_comm_hook(None, fp16_compress_hook)
    wrapped = torch.nn.ModuleDict({"policy": model})
    return keep_order([wrapped])


def test_a_hook_of_ones_own_stays():
    assert run_ranks(own_hook, 3) == [["policy"]] * 3


def test_two_ranks_need_none():
    assert run_ranks(hooks, 2) == [0, 0]
    assert run_ranks(hooks, 3) == [1, 1, 1]


def hooks(rank, size):
    model = DistributedDataParallel(net())
    keep_order([model])
    return len(model._comm_hooks)
