"""Optimizer state: by names, to the bit, in the optimizer's own tensors, and without stepping it."""

import pytest
import torch

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import MismatchError
from tests.checkpoint.fakes import make_run, same_bits, save_as


class Net(torch.nn.Module):
    """Has parameters that are trained, that never get a gradient, and that are frozen."""

    def __init__(self):
        super().__init__()
        self.used = torch.nn.Linear(4, 5)
        self.never = torch.nn.Linear(3, 3)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.used(x).square().sum()


class Master(torch.optim.Optimizer):
    """Keeps fp32 weights of bf16 parameters, as many do for mixed precision."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    master = state.setdefault("master", parameter.float() * (1 + 2**-12))
                    master -= group["lr"] * parameter.grad.float()
                    parameter.copy_(master)


def two_groups(net):
    rest = [*net.never.parameters(), *net.frozen.parameters()]
    return [{"params": [*net.used.parameters()], "lr": 0.1}, {"params": rest, "lr": 0.01}]


OPTIMIZERS = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "groups": lambda net: torch.optim.AdamW(two_groups(net), amsgrad=True),
    "named": lambda net: torch.optim.AdamW(net.named_parameters()),
    "tensor_lr": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1), foreach=False),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), fused=True),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters()),  # has state of frozen parameters, too
    "adafactor": lambda net: torch.optim.Adafactor(net.parameters()),  # rows and columns, of other shapes
    "lbfgs": lambda net: torch.optim.LBFGS(net.parameters()),  # can't be stepped without a closure
    "master": lambda net: Master(net.bfloat16().parameters()),
}


def build(name, seed, steps=0):
    torch.manual_seed(seed)
    net = Net()
    optimizer = OPTIMIZERS[name](net)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 4, dtype=net.used.weight.dtype))
        loss.backward()
        return loss

    for _ in range(steps):
        if name == "lbfgs":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def look(net, optimizer):
    """Everything in them, copied."""
    state = optimizer.state_dict()
    return clone({"net": dict(net.state_dict()), **state})


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list) else a == b


def restore(run, name, manifest, net, optimizer):
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        TrackedState({"net": net, "optimizer": optimizer}, rank=0, world_size=1).restore(reader)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_saving_leaves_it_alone_and_restoring_brings_all_back(tmp_path, kind, steps):
    net, optimizer = build(kind, 1, steps)
    before = look(net, optimizer)
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: {"net": net, "optimizer": optimizer})
    assert equal(look(net, optimizer), before)
    for other_steps in (0, 1):  # fresh, and with a state of its own
        restored = build(kind, 2, other_steps)
        restore(run, name, manifest, *restored)
        assert equal(look(*restored), before)
        assert all(parameter.grad is None for parameter in restored[0].parameters())


@pytest.mark.parametrize("steps", [0, 1])
def test_restoring_reads_into_the_optimizers_own_tensors(tmp_path, steps, monkeypatch):
    run = make_run(tmp_path)
    net, optimizer = build("adamw", 1, 2)
    name, manifest = save_as(run, 1, lambda rank: {"net": net, "optimizer": optimizer})
    net, optimizer = build("adamw", 2, steps)
    before = {state["exp_avg"].data_ptr() for state in optimizer.state.values()}
    read_into = set()
    read_all = CheckpointReader.read_all

    def watch(self, wanted):
        wanted = list(wanted)
        read_into.update(each.out.data_ptr() for each in wanted)
        read_all(self, wanted)

    monkeypatch.setattr(CheckpointReader, "read_all", watch)
    restore(run, name, manifest, net, optimizer)
    after = {state["exp_avg"].data_ptr() for state in optimizer.state.values()}
    assert after
    assert after <= read_into
    assert before <= after


def test_other_parameter_groups_are_told(tmp_path):
    run = make_run(tmp_path)
    net, optimizer = build("groups", 1, 1)
    name, manifest = save_as(run, 1, lambda rank: {"net": net, "optimizer": optimizer})
    net, optimizer = build("adamw", 2)
    with pytest.raises(MismatchError, match="optimizer: 1 parameter groups, in the checkpoint 2"):
        restore(run, name, manifest, net, optimizer)
    swapped = torch.optim.AdamW(two_groups(net)[::-1], amsgrad=True)
    with pytest.raises(
        MismatchError, match=r"optimizer: parameter group 0 has frozen\.bias, frozen\.weight, never"
    ):
        restore(run, name, manifest, net, swapped)


def test_state_of_another_shape_is_told(tmp_path):
    run = make_run(tmp_path)
    net, optimizer = build("master", 1, 1)
    name, manifest = save_as(run, 1, lambda rank: {"net": net, "optimizer": optimizer})
    net, optimizer = build("master", 1, 1)
    optimizer.state[net.used.weight]["master"] = torch.zeros(5, 3)
    with pytest.raises(
        MismatchError, match=r"used\.weight/master: shape \[5, 3\], in the checkpoint \[5, 4\]"
    ):
        restore(run, name, manifest, net, optimizer)
