"""State → shards → manifest → state, on any number of ranks, in DDP, FSDP2 and a single process."""

import random
from collections import Counter, OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import MismatchError, StateError
from hpc_resume.rundir import RunDirectory
from tests.commits import commit_state
from tests.ranks import run_ranks


class Low(torch.nn.Module):
    """A bf16 parameter of its own: FSDP2 wants one type in a group."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(130, 300).bfloat16())

    def forward(self):
        return self.weight.float().sum() * 1e-3


class Net(torch.nn.Module):
    """Uneven on purpose: 257 rows, a 0-d parameter's worth of oddities, a buffer, a tied weight."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(33, 257)
        self.norm = torch.nn.BatchNorm1d(257)
        self.down = torch.nn.Linear(257, 33, bias=False)
        self.low = Low()
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return self.down(self.norm(self.up(x))).sum() + self.low()


def build(kind, size, seed):
    torch.manual_seed(seed)
    net = Net()
    if kind == "ddp":
        net = DistributedDataParallel(net)
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(net.low, mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    return net, optimizer, scheduler


def train(net, optimizer, scheduler, steps, rank):
    for step in range(steps):
        torch.manual_seed(1000 + step)
        net(torch.randn(8, 33)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def header(run, size, step=7):
    return Header(
        run_id=run.identity()["run_id"],
        attempt=max(run.attempt_numbers()),
        step=step,
        samples=70,
        reason="cadence",
        world_size=size,
        node_type="cpu",
        config=None,
        environment={},
    )


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fingerprint(net, optimizer, scheduler):
    """Everything, gathered, as plain tensors by name."""
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    tensors = {name: full(tensor).clone() for name, tensor in inner.state_dict().items()}
    names = [name for name, _ in inner.named_parameters()]
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"{names[index]}.{key}"] = full(value).clone()
    return tensors, scheduler.state_dict()


def save(rank, size, folder, kind, steps=2):
    run = RunDirectory(Path(folder))
    if rank == 0:
        run.create("test")
        claim_attempt(run)
    dist.barrier()
    net, optimizer, scheduler = build(kind, size, seed=1)
    train(net, optimizer, scheduler, steps, rank)
    extra = {"best": float("inf"), "when": (1, 2), "name": b"\x00x", 3: Counter("ab"), "np": np.arange(5)}
    state = TrackedState(
        {"model": net, "optimizer": optimizer, "scheduler": scheduler, "extra": extra},
        rank=rank,
        world_size=size,
    )
    captured = state.capture({"rng": torch.arange(rank + 3, dtype=torch.uint8)})
    staging = Staging(run, max(run.attempt_numbers()), rank, f"node{rank}")
    staging.write(header(run, size, 7), Camera().take(captured, stage=kind == "fsdp"))
    dist.barrier()
    if rank == size - 1:
        staging.commit(7)
    dist.barrier()
    return fingerprint(net, optimizer, scheduler), sum(piece.length for piece in captured.pieces)


def load(rank, size, folder, kind):
    net, optimizer, scheduler = build(kind, size, seed=2)
    extra = {}
    state = TrackedState(
        {"model": net, "optimizer": optimizer, "scheduler": scheduler, "extra": extra},
        rank=rank,
        world_size=size,
    )
    run = RunDirectory(Path(folder))
    name, manifest = store.find(run)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        state.restore(reader)
        private = state.private(reader, 0)
    assert private["rng"].tolist() == [0, 1, 2]
    assert extra["best"] == float("inf")
    assert extra["when"] == (1, 2)
    assert extra["name"] == b"\x00x"
    assert extra[3] == Counter("ab")
    assert extra["np"].tolist() == [0, 1, 2, 3, 4]
    return fingerprint(net, optimizer, scheduler)


def assert_same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name, tensor in a[0].items():
        assert torch.equal(tensor, b[0][name]), name


@pytest.mark.parametrize(
    ("kind", "size", "others"),
    [
        ("ddp", 2, [("ddp", 3), ("fsdp", 2), ("plain", 1)]),
        ("fsdp", 3, [("fsdp", 2), ("fsdp", 4), ("ddp", 2), ("plain", 1)]),
        ("plain", 1, [("fsdp", 3), ("plain", 1)]),
    ],
)
def test_restores_on_any_number_of_ranks_and_kinds(tmp_path, kind, size, others):
    saved = run_ranks(save, size, str(tmp_path), kind)
    assert verify_run(tmp_path) == []
    for other_kind, other_size in others:
        for restored in run_ranks(load, other_size, str(tmp_path), other_kind):
            assert_same(saved[0][0], restored)


def test_replicas_are_split_and_stored_once(tmp_path):
    saved = run_ranks(save, 2, str(tmp_path), "ddp")
    shares = [size_bytes for _, size_bytes in saved]
    _, manifest = store.find(RunDirectory(tmp_path))
    stored = sum(t.size_bytes for name, t in manifest.tensors.items() if not name.startswith("ranks/"))
    unique = sum(tensor.nbytes for name, tensor in saved[0][0][0].items())
    assert stored == unique + manifest.tensors["extra/np"].size_bytes
    assert abs(shares[0] - shares[1]) < 80_000  # a small tensor, the ranks' own state, rank 0's buffers


def test_plain_readers_see_the_tensors(tmp_path):
    ((saved, _),) = run_ranks(save, 1, str(tmp_path), "plain")
    name, _ = store.find(RunDirectory(tmp_path))
    with h5py.File(tmp_path / "checkpoints" / name / "rank-00000-of-00001.h5") as file:
        for tensor in ("up.weight", "low.weight"):
            dataset = file[f"tensors/model/{tensor}"]
            assert dataset.attrs["global_shape"].tolist() == list(saved[0][tensor].shape)
            assert np.array_equal(dataset[:].astype("f4"), saved[0][tensor].float().numpy())


def mismatch(rank, size, folder):
    run = RunDirectory(Path(folder))
    name, manifest = store.find(run)
    net = torch.nn.ModuleDict({"up": torch.nn.Linear(33, 256), "other": torch.nn.Linear(2, 2)})
    before = net["up"].weight.clone()
    state = TrackedState({"model": net, "sampler": {}}, rank=0, world_size=1)
    with CheckpointReader(run.checkpoints / name, manifest) as reader, pytest.raises(MismatchError) as caught:
        state.restore(reader)
    assert torch.equal(before, net["up"].weight)
    return str(caught.value)


def test_every_difference_is_listed_at_once(tmp_path):
    run_ranks(save, 1, str(tmp_path), "plain")
    (message,) = run_ranks(mismatch, 1, str(tmp_path))
    for expected in (
        "model/up.weight: shape [256, 33], in the checkpoint [257, 33]",
        "model/other.weight: in the model, not in the checkpoint",
        "model/low.weight: in the checkpoint, not in the model",
        "optimizer: in the checkpoint, not tracked now",
        "sampler: tracked now, not in the checkpoint",
    ):
        assert expected in message


def test_what_cannot_be_stored_is_refused_by_its_path():
    meta = {"a": [1, {"b": random.Random()}]}
    refused = pytest.raises(StateError, match=r"meta\['a'\]\['1'\]\['b'\].*random.Random")
    with refused:
        TrackedState({"meta": meta}, rank=0, world_size=1)  # before training
    state = TrackedState({"meta": (later := {})}, rank=0, world_size=1)
    later.update(meta)
    with refused:
        state.capture({})


def test_an_untracked_model_of_an_optimizer_is_refused():
    net = torch.nn.Linear(2, 2)
    with pytest.raises(StateError, match="track the module with it"):
        TrackedState({"optimizer": torch.optim.SGD(net.parameters())}, rank=0, world_size=1)


def test_ordered_dicts_stay_what_they_are():
    state = TrackedState({"meta": {"a": OrderedDict(x=1)}}, rank=0, world_size=1)
    assert state.capture({}).objects == {"meta": {"a": {"$ordereddict": [["x", 1]]}}}


def test_a_parameter_that_never_had_a_gradient_has_no_optimizer_state(tmp_path):
    def made():
        net = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
        return net, torch.optim.AdamW(net.parameters())

    net, optimizer = made()
    net["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = commit_state(tmp_path, model=net, optimizer=optimizer)
    other, restored = made()
    state = TrackedState({"model": other, "optimizer": restored}, rank=0, world_size=1)
    with CheckpointReader(folder, read_manifest(folder)) as reader:
        state.restore(reader)
    assert [len(s) for s in restored.state.values()] == [3, 3]
    before, after = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert before.keys() == after.keys()
    assert torch.equal(before[0]["exp_avg"], after[0]["exp_avg"])
