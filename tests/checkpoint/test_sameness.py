"""Interrupted at some step and gone on with fresh objects: the same bits as without, for all that moves the optimisation.

Each way of training is built from a seed and gives what is tracked, and a function that does one step. What goes on is
built from another seed, so that nothing comes from anywhere but the checkpoint.
"""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import MismatchError, StateError
from tests.checkpoint.fakes import make_run, playing, same_bits, save_as

STEPS = 9
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def loss_of(net, step):
    x, y = batch(step)
    return (net(x) - y).square().mean()


def plain(make_optimizer, make_net=network, *, clip=None, order="after"):
    net = make_net()
    optimizer = make_optimizer(net)

    def step(number):
        if order == "before":
            optimizer.zero_grad()
        loss_of(net, number).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if order == "after":
            optimizer.zero_grad()
        elif order == "zeros":
            optimizer.zero_grad(set_to_none=False)

    return {"net": net, "optimizer": optimizer}, step


def with_optimizer(name, make, **options):
    WAYS[name] = lambda: plain(make, **options)


O = torch.optim  # noqa: E741 - as short as a table needs it
with_optimizer("momentum", lambda net: O.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True))
with_optimizer("adamw_amsgrad", lambda net: O.AdamW(net.parameters(), lr=0.01, amsgrad=True))
with_optimizer("adamw_fused", lambda net: O.AdamW(net.parameters(), lr=0.01, fused=True))
with_optimizer("adamw_tensor_lr", lambda net: O.AdamW(net.parameters(), lr=torch.tensor(0.01)))
with_optimizer("adafactor", lambda net: O.Adafactor(net.parameters()))
with_optimizer("rprop", lambda net: O.Rprop(net.parameters()))
with_optimizer("nadam_radam", lambda net: O.NAdam(net.parameters()))
with_optimizer("asgd", lambda net: O.ASGD(net.parameters(), t0=3))
with_optimizer("clipped", lambda net: O.SGD(net.parameters(), lr=0.5, momentum=0.9), clip=0.1)
with_optimizer("zero_before", lambda net: O.Adam(net.parameters(), weight_decay=0.1), order="before")
with_optimizer("zeros_kept", lambda net: O.Adam(net.parameters(), weight_decay=0.1), order="zeros")
with_optimizer("never_zeroed", lambda net: O.SGD(net.parameters(), lr=0.01), order="never")


def parametrized():
    net = network()
    parametrizations.weight_norm(net[0])
    parametrizations.orthogonal(net[3])
    return net


with_optimizer("parametrized", lambda net: O.Adam(net.parameters()), make_net=parametrized)


class Lion(torch.optim.Optimizer):
    """As users write theirs: state that comes into being with the first gradient, and numbers beside tensors."""

    def __init__(self, parameters, lr=0.01):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state.update(momentum=torch.zeros_like(parameter), steps=0, history=[])
                state["steps"] += 1
                state["history"].append(float(parameter.grad.sum()))
                decay = 1 + sum(state["history"]) / state["steps"]
                one, two = group["betas"]
                update = state["momentum"].lerp(parameter.grad, 1 - one).sign()
                parameter.sub_(update * group["lr"] * decay)
                state["momentum"].lerp_(parameter.grad, 1 - two)


with_optimizer("lion", lambda net: Lion(net.parameters()))


class Preconditioned(torch.optim.Optimizer):
    """Keeps state of other types than the parameter's, nested, as Shampoo and SOAP do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                exact = torch.zeros(parameter.shape)
                state.update(
                    sums=[exact, exact.double()], by_name={"q": exact.clone()}, seen=(torch.tensor(3000),)
                )
            gradient = parameter.grad.float()
            state["sums"] = [total + gradient for total in state["sums"]]
            state["by_name"]["q"].lerp_(gradient, 0.001)
            state["seen"] = (state["seen"][0] + 1,)
            update = state["sums"][0] + state["sums"][1].float() + 100 * state["by_name"]["q"]
            parameter.sub_((update * 0.01).to(parameter.dtype) * (state["seen"][0] % 7))


@way
def preconditioned():
    net = network().to(torch.bfloat16)
    optimizer = Preconditioned(net.parameters())

    def step(number):
        x, y = batch(number)
        (net(x.to(torch.bfloat16)) - y).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"net": net, "optimizer": optimizer}, step


class Waves(nn.Module):
    """Complex tensors that PyTorch conjugates, or negates, only when they are read."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, dtype=torch.complex64).conj())
        self.register_buffer("kernel", torch.fft.fft(torch.randn(6)).conj())
        self.register_buffer("phase", torch.randn(6, dtype=torch.complex64).conj().imag)
        assert self.weight.is_conj()
        assert self.kernel.is_conj()
        assert self.phase.is_neg()

    def forward(self, x):
        self.phase += 0.1
        self.kernel.mul_(0.99)
        return (x * self.weight * self.kernel).sum(1, keepdim=True).abs() + self.phase.sin().sum()


with_optimizer("conjugated", lambda net: O.SGD(net.parameters(), lr=0.05, momentum=0.9), make_net=Waves)


@way
def lbfgs():
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

    def step(number):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(net, number)
            loss.backward()
            return loss

        optimizer.step(closure)

    return {"net": net, "optimizer": optimizer}, step


@way
def sparse_and_dense():
    net = nn.ModuleDict({"table": nn.Embedding(20, 6, sparse=True), "rest": network()})
    rare = torch.optim.SparseAdam(net["table"].parameters(), lr=0.1)
    often = torch.optim.AdamW(net["rest"].parameters())

    def step(number):
        rare.zero_grad()
        often.zero_grad()
        words = torch.randint(0, 20, (16,), generator=torch.Generator().manual_seed(number))
        (net["rest"](net["table"](words)) - 1).square().mean().backward()
        rare.step()
        often.step()

    return {"net": net, "rare": rare, "often": often}, step


@way
def lists_of_optimizers_and_frozen_layers():
    net = network()
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(number):
        if number == 4:
            net[0].requires_grad_(True)  # thawed on the way: what goes on must not begin frozen
        if number == 6:
            net[3].bias.requires_grad_(False)
        loss_of(net, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"net": net, "optimizer": optimizer}, step


@way
def zeros_that_decay():
    """A branch that gets no gradient any more, only zeros that are left of it: the optimizer still moves it."""
    net = nn.ModuleDict({"always": network(), "early": nn.Linear(6, 1)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.5)

    def step(number):
        x, y = batch(number)
        out = net["always"](x) + (net["early"](x) if number < 2 else 0)
        (out - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return {"net": net, "optimizer": optimizer}, step


@way
def accumulating():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(number):
        (loss_of(net, number) / 4).backward()
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()

    return {"net": net, "optimizer": optimizer}, step


@way
def accumulating_scaled_and_clipped():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def step(number):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net, number) / 2
        if number == 5:
            loss = loss * math.inf  # the optimizer's step is left out, and the scale goes down
        scaler.scale(loss).backward()
        if number % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return {"net": net, "optimizer": optimizer, "scaler": scaler}, step


@way
def averaged():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    swa = swa_utils.AveragedModel(net)
    schedule = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=5)

    def step(number):
        loss_of(net, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(net)
        if number > 3:
            swa.update_parameters(net)
            schedule.step()

    return {"net": net, "optimizer": optimizer, "ema": ema, "swa": swa, "schedule": schedule}, step


@way
def drawing():
    """Augmentation and noise from generators of all kinds, the process's own left out."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    seed = torch.initial_seed() % 1000
    noise = torch.Generator().manual_seed(seed)
    crops, coins = np.random.default_rng(seed), random.Random(seed)

    def step(number):
        x, y = batch(number)
        x = x + torch.randn(x.shape, generator=noise) * 0.1
        x = x.roll(int(crops.integers(6)), 1) * (1 if coins.random() < 0.5 else -1)
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"net": net, "optimizer": optimizer, "noise": noise, "crops": crops, "coins": coins}, step


SCHEDULES = {
    "warm_up": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(o, 4),
            lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[3, 6],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "multi_step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 7]),
}


def scheduled(make):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = make(optimizer)

    def step(number):
        loss = loss_of(net, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plateau = isinstance(schedule, lr_scheduler.ReduceLROnPlateau)
        schedule.step(loss.item() + number) if plateau else schedule.step()

    return {"net": net, "optimizer": optimizer, "schedule": schedule}, step


WAYS.update({name: lambda make=make: scheduled(make) for name, make in SCHEDULES.items()})


def build(make, seed):
    torch.manual_seed(seed)
    return make()


def look(items):
    """Everything that moves on, copied."""
    found = {}
    for key, item in items.items():
        if isinstance(item, nn.Module):
            found[key] = {name: tensor.detach().clone() for name, tensor in item.state_dict().items()}
            found[f"{key} trained"] = [parameter.requires_grad for parameter in item.parameters()]
            gradients = [parameter.grad for parameter in item.parameters()]
            found[f"{key} gradients"] = [
                g.detach().clone().to_dense() if g is not None else None for g in gradients
            ]
        elif hasattr(item, "state_dict"):
            found[key] = clone(item.state_dict())
        elif isinstance(item, torch.Generator):
            found[key] = item.get_state()
        else:
            found[key] = repr(item.bit_generator.state if hasattr(item, "bit_generator") else item.getstate())
    return found


def clone(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(clone(item) for item in value)
    return value


def differing(one, two, path=""):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if same_bits(one, two) else [path]
    if isinstance(one, dict) and isinstance(two, dict):
        keys = one.keys() | two.keys()
        return [
            found
            for key in sorted(keys, key=str)
            for found in differing(one.get(key), two.get(key), f"{path}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [found for place, (a, b) in pairs for found in differing(a, b, f"{path}/{place}")]
    return [] if one is two or one == two or callable(one) else [path]


@pytest.mark.parametrize("stops", [(1, 2), (2, 3, 4), (5,), (3, 7)])
@pytest.mark.parametrize("name", WAYS)
def test_what_goes_on_is_what_was_interrupted(tmp_path, name, stops):
    items, step = build(WAYS[name], 1)
    with playing(0, 1):  # one thread, here and there
        for number in range(STEPS):
            step(number)
    expected = look(items)
    run = make_run(tmp_path)
    saved = None
    for attempt, (begin, end) in enumerate(zip((0, *stops), (*stops, STEPS), strict=True)):
        items, step = build(WAYS[name], 1 if attempt == 0 else 10 + attempt)
        with playing(0, 1):
            state = TrackedState(items, rank=0, world_size=1)
            if saved is not None:
                with CheckpointReader(run.checkpoints / saved[0], saved[1]) as reader:
                    state.restore(reader)
                    assert state.restore_streams(reader) == []
            for number in range(begin, end):
                step(number)
        if end < STEPS:
            saved = save_as(run, 1, lambda rank, items=items: items, step=end)
    assert differing(expected, look(items)) == []


def test_a_compiled_model_is_the_plain_one_in_a_checkpoint(tmp_path):
    net, optimizer = plain(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01))[0].values()
    net[0] = torch.compile(net[0], backend="eager")  # a part of it
    whole = torch.compile(net, backend="eager")

    def step(model, optimizer, number):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(2):
        step(whole, optimizer, number)
    loss_of(whole, 2).backward()
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: {"net": whole, "optimizer": optimizer})
    assert [each for each in manifest.tensors if "_orig_mod" in each] == []
    others = [network() for _ in range(2)]
    found = []
    for model, tracked in ((others[0], others[0]), (others[1], torch.compile(others[1], backend="eager"))):
        its_optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with playing(0, 1), CheckpointReader(run.checkpoints / name, manifest) as reader:
            state = TrackedState({"net": tracked, "optimizer": its_optimizer}, rank=0, world_size=1)
            state.restore(reader)
        for number in range(3, 5):
            step(tracked, its_optimizer, number)
        found.append(model.state_dict())
    for number in range(3, 5):
        step(whole, optimizer, number)
    expected = {each.replace("_orig_mod.", ""): tensor for each, tensor in net.state_dict().items()}
    assert differing(expected, found[0]) == differing(expected, found[1]) == []


class Adaptive:
    """A schedule with a mind of its own, and a state that only pickle could take."""

    def __init__(self):
        self.history = {"when": lambda: 3}

    def state_dict(self):
        return self.history

    def load_state_dict(self, state):
        self.history = state


def test_arrays_come_back_in_their_shapes(tmp_path):
    rising = np.arange(6.0)
    told = {
        "best": np.array(2.5),
        "none": np.zeros((0, 3)),
        "strided": rising[::2],
        "table": rising.reshape(2, 3).T,
    }
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: {"told": told})
    found = {key: np.zeros(1) for key in told}
    with playing(0, 1), CheckpointReader(run.checkpoints / name, manifest) as reader:
        TrackedState({"told": found}, rank=0, world_size=1).restore(reader)
    assert {key: (array.shape, array.tolist()) for key, array in found.items()} == {
        key: (array.shape, array.tolist()) for key, array in told.items()
    }


class Refusing(Adaptive):
    def __init__(self, error):
        self.error, self.history = error, {}

    def load_state_dict(self, state):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("rate"), MismatchError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error"), torch.AcceleratorError),
    ],
)
def test_what_the_node_lacks_is_no_mismatch(tmp_path, error, told):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: {"schedule": Refusing(error)})
    with playing(0, 1), CheckpointReader(run.checkpoints / name, manifest) as reader, pytest.raises(told):
        TrackedState({"schedule": Refusing(error)}, rank=0, world_size=1).restore(reader)


def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    net = nn.Linear(2, 2)
    with pytest.raises(StateError, match="track\\(ema=…\\): an object of type object has no state_dict"):
        TrackedState({"net": net, "ema": object()}, rank=0, world_size=1)
    with pytest.raises(StateError, match=r"type DataLoader has no state_dict.*take run\.loader"):
        TrackedState({"data": DataLoader([1.0])}, rank=0, world_size=1)
    with pytest.raises(StateError, match=r"track a dict, .*: lr={'lr': 0\.1}"):
        TrackedState({"lr": 0.1}, rank=0, world_size=1)
    with pytest.raises(StateError, match=r"adaptive\['when'\]: an object of type builtins\.function"):
        TrackedState({"net": net, "adaptive": Adaptive()}, rank=0, world_size=1).capture({})
    table = nn.Linear(2, 2)
    table.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
    with pytest.raises(StateError, match=r"net/1.mask: elements of this tensor share memory.*clone\(\)"):
        TrackedState({"net": nn.Sequential(net, table)}, rank=0, world_size=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = TrackedState({"net": net, "optimizer": optimizer}, rank=0, world_size=1)
    optimizer.state["rates"] = {"last": 0.1}
    with pytest.raises(StateError, match=r"optimizer: optimizer.state\['rates'\] belongs to no parameter"):
        state.capture({})
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    with pytest.raises(StateError, match="meta/table: a tensor of layout"):
        TrackedState({"meta": {"table": quantized}}, rank=0, world_size=1).capture({})
