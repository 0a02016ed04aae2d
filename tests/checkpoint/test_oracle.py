"""Real ranks, and PyTorch's own checkpoints as the oracle: what we restore is what they restore, to the bit."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.optimizers import state_of
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.rundir import RunDirectory
from tests.checkpoint.fakes import header, make_run, random_tensor, same_bits, writer
from tests.ranks import run_ranks

WIDTH, HIDDEN = 37, 1030  # 1030 rows: even for tensor parallelism on 2, uneven for FSDP2 on what is left


class Low(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, WIDTH).bfloat16())

    def forward(self, x):
        return x * self.weight.float().sum(0).to(x.dtype)


class Net(torch.nn.Module):
    """Tied, frozen and idle parameters, one of fewer rows than ranks, buffers, bf16."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(41, WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.low = Low()
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.idle = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(WIDTH, 41, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.arange(5) % 2 == 0)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens):
        self.count += 1
        x = self.norm(self.low(self.embed(tokens)))
        return self.head(self.frozen(self.down(self.up(x).relu()))).float().square().mean()


class Odd(torch.nn.Module):
    """Types that no collective knows."""

    def __init__(self, seed):
        super().__init__()
        names = "float16 float8_e4m3fn float8_e5m2 complex64 uint16 int16 float64 bool"
        for index, name in enumerate(names.split()):
            self.register_buffer(name, random_tensor((5, 7), getattr(torch, name), 100 * seed + index))


class Factored(torch.optim.Optimizer):
    """Keeps the second moment of a matrix as a column and a row, as Adafactor does (PyTorch's own knows no DTensor)."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            square = parameter.grad.square() + 1e-6
            if parameter.ndim < 2:
                state["square"] = square
                continue
            row = square.sum(0, keepdim=True)
            if isinstance(row, DTensor):
                row = row.redistribute(placements=[Replicate()] * row.device_mesh.ndim)
            state["column"], state["row"] = square.sum(1, keepdim=True), row
            parameter.sub_(self.param_groups[0]["lr"] * parameter.grad / state["column"].sqrt())


def build(kind, size, seed):
    """Make a network of one of the kinds; returns what is tracked, and what is trained."""
    torch.manual_seed(seed)
    net = Net()
    if kind == "fsdp":
        fully_shard(net.low)
        fully_shard(net)
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(net.low, mesh=mesh)
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(net, mesh=mesh, mp_policy=mixed)
    elif kind in {"tp", "fsdp_tp"}:
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if kind == "fsdp_tp":
            fully_shard(net.low, mesh=mesh["dp"])
            fully_shard(net, mesh=mesh["dp"])
    elif kind == "ddp":
        net = DistributedDataParallel(net, find_unused_parameters=True)
    elif kind == "compiled":
        return torch.compile(net), net
    elif kind == "ddp_compiled":
        return DistributedDataParallel(torch.compile(net)), net
    return net, net


def optimizer_of(name, net):
    matrices = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    if name == "adamw":
        return torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=0.01)
    if name == "momentum":
        return torch.optim.SGD(matrices + rest, lr=0.01, momentum=0.9)
    if name == "factored":
        return Factored(matrices + rest)
    return torch.optim.Adagrad(matrices + rest)


class Training:
    def __init__(self, kind, optimizer, rank, size, seed):
        self.kind, self.rank, self.size = kind, rank, size
        self.net, self.trained = build(kind, size, seed)
        self.optimizer = optimizer_of(optimizer, self.net)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.1, total_steps=50, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
        self.odd = Odd(seed)
        self.tracked = {
            "net": self.net,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "odd": self.odd,
        }

    def train(self, steps):
        for step in range(steps):
            tokens = torch.randint(0, 41, (2, 5), generator=torch.Generator().manual_seed(step))
            if self.kind == "tp":  # where there are plain tensors beside DTensors, the scaler can't do it
                self.trained(tokens).backward()
                self.optimizer.step()
            else:
                self.scaler.scale(self.trained(tokens)).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def save(self, folder):
        run = RunDirectory(folder)
        if self.rank == 0:
            make_run(folder)
        dist.barrier()
        captured = TrackedState(self.tracked, rank=self.rank, world_size=self.size).capture({})
        staging, camera = writer(run, 1, self.rank), Camera(threads=1)
        staging.write(header(run, self.size), camera.take(captured, stage=True))
        dist.barrier()
        if self.rank == 0:
            staging.commit(1)
        staging.close()
        camera.close()
        dcp.save(self.for_dcp(), checkpoint_id=folder / "dcp")
        return self.plain_state()

    def for_dcp(self):
        return {
            "net": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
            "odd": get_model_state_dict(self.odd),
        }

    def plain_state(self):
        return self.scheduler.state_dict(), self.scaler.state_dict()

    def restore(self, folder):
        run = RunDirectory(folder)
        name, manifest = store.find(run)
        with CheckpointReader(run.checkpoints / name, manifest) as reader:
            TrackedState(self.tracked, rank=self.rank, world_size=self.size).restore(reader)

    def restore_by_dcp(self, folder):
        state = self.for_dcp()
        # Parameters that never had a gradient are in no checkpoint; it would refuse them.
        dcp.load(state, checkpoint_id=folder / "dcp", planner=DefaultLoadPlanner(allow_partial_load=True))
        set_model_state_dict(self.net, state["net"])
        set_model_state_dict(self.odd, state["odd"])
        loose = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"], options=loose)

    def look(self):
        """What this rank holds, by name, and the parameter groups."""
        found = {**get_model_state_dict(self.net), **self.odd.state_dict()}
        state = state_of(self.net, self.optimizer)
        for name, values in state["state"].items():
            found.update({f"{name}/{key}": value for key, value in values.items()})
        local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in found.items()}
        return local, state["param_groups"]


def compare(rank, size, folder, source, kind, optimizer):
    ours, theirs = (Training(kind, optimizer, rank, size, seed) for seed in (2, 3))
    ours.restore(folder / source)
    theirs.restore_by_dcp(folder / source)
    (tensors, groups), (expected, expected_groups) = ours.look(), theirs.look()
    assert groups == expected_groups
    extra = {name for name in expected.keys() - tensors.keys() if not name.startswith("idle.")}
    assert not extra
    if optimizer != "adagrad":  # which makes its state at once
        assert not any(name.startswith("idle.") and "/" in name for name in tensors)
    for name, tensor in tensors.items():
        assert same_bits(tensor, expected[name]), (source, kind, size, rank, name)
    inner = getattr(ours.trained, "module", ours.trained)
    assert inner.head.weight is inner.embed.weight
    assert not any("_orig_mod" in name or "module." in name for name in tensors)
    return ours


#: Size; from where; as what; and under which name it is trained on and saved again.
STAGES = [
    (
        4,
        [
            (None, "fsdp", "adamw", "fsdp4"),
            (None, "fsdp", "factored", "factored4"),
            (None, "hsdp", "momentum", "hsdp4"),
            (None, "fsdp_tp", "adagrad", "fsdp_tp4"),
        ],
    ),
    (
        2,
        [
            ("fsdp4", "ddp", "adamw", "ddp2"),
            ("factored4", "ddp", "factored", "factored2"),
            ("hsdp4", "tp", "momentum", "tp2"),
            ("fsdp_tp4", "fsdp", "adagrad", "fsdp2"),
        ],
    ),
    (
        1,
        [
            ("ddp2", "plain", "adamw", "plain1"),
            ("tp2", "compiled", "momentum", "compiled1"),
            ("fsdp_tp4", "plain", "adagrad", None),
        ],
    ),
    (
        3,
        [
            ("plain1", "fsdp", "adamw", None),
            ("factored2", "fsdp", "factored", None),
            ("compiled1", "ddp_compiled", "momentum", None),
            ("fsdp2", "fsdp", "adagrad", None),
        ],
    ),
]


def stage(rank, size, folder, jobs):
    warnings.simplefilter("ignore")
    folder, states = Path(folder), {}
    for source, kind, optimizer, target in jobs:
        if source is None:
            training = Training(kind, optimizer, rank, size, seed=1)
            training.train(2)
        else:
            training = compare(rank, size, folder, source, kind, optimizer)
            states[source] = training.plain_state()
            if target is not None:
                training.train(1)
        if target is not None:
            states[target] = training.save(folder / target)
    return states


def test_what_we_restore_is_what_torch_restores(tmp_path):
    saved = {}
    for size, jobs in STAGES:
        for states in run_ranks(stage, size, str(tmp_path), jobs):
            for name, state in states.items():
                assert saved.setdefault(name, state) == state, name
    for name in ("fsdp4", "hsdp4", "fsdp_tp4", "ddp2", "tp2", "fsdp2", "plain1", "compiled1"):
        assert verify_run(tmp_path / name) == []
        _, manifest = store.find(RunDirectory(tmp_path / name))
        assert "net/embed.weight" in manifest.tensors
        assert "net/head.weight" not in manifest.tensors, "tied weights are stored once"
        # Every element once, however many ranks have it.
        stored = sum(tensor.size_bytes for tensor in manifest.tensors.values() if tensor.shape)
        written = manifest.costs["state_bytes"]
        assert stored <= written <= stored + 40_000, name  # the ranks' own non-tensor state, scalars
