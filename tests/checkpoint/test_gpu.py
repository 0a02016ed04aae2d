"""Snapshots and restores of tensors on a GPU."""

import pytest
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.rundir import RunDirectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


def header(run, step):
    return Header(
        run_id=run.identity()["run_id"],
        attempt=1,
        step=step,
        samples=0,
        reason="cadence",
        world_size=1,
        node_type=None,
        config=None,
        environment={},
    )


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path)
    run.create("gpu")
    claim_attempt(run)
    return run


def state():
    return {
        "big": torch.randn(4096, 4096, device="cuda"),
        "half": torch.randn(1000, 37, device="cuda").bfloat16(),
        "turned": torch.randn(64, 256, device="cuda").t(),
        "count": torch.tensor(3),
    }


@pytest.mark.parametrize("stage", [True, False])
def test_a_snapshot_is_what_was_there_when_it_was_taken(run, stage):
    live = state()
    before = {name: tensor.cpu().clone() for name, tensor in live.items()}
    tracked = TrackedState({"state": live}, rank=0, world_size=1)
    staging = Staging(run, 1, 0, "node")
    snapshot = Camera().take(tracked.capture({}), stage=stage)
    for tensor in live.values():
        tensor.mul_(0)  # training goes on at once: queued behind the copies on the GPU
    if snapshot.arena is not None:
        assert snapshot.arena.pinned
    staging.write(header(run, 1), snapshot)
    staging.commit(1)
    name, manifest = store.find(run)
    into = {}
    restored = TrackedState({"state": into}, rank=0, world_size=1)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        restored.restore(reader)
    assert all(torch.equal(before[key], into[key]) for key in before)


def test_a_model_and_its_optimizer_come_back_on_the_gpu(run):
    def build(seed):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(300, 700), torch.nn.ReLU(), torch.nn.Linear(700, 10)).cuda()
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    def train(net, optimizer, steps):
        for step in range(steps):
            torch.manual_seed(step)
            net(torch.randn(8, 300, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    net, optimizer = build(1)
    train(net, optimizer, 3)
    tracked = TrackedState({"model": net, "optimizer": optimizer}, rank=0, world_size=1)
    staging = Staging(run, 1, 0, "node")
    snapshot = Camera().take(tracked.capture({}), stage=True)
    staging.write(header(run, 3), snapshot)
    staging.commit(3)
    name, manifest = store.find(run)
    other, its_optimizer = build(2)
    restored = TrackedState({"model": other, "optimizer": its_optimizer}, rank=0, world_size=1)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        restored.restore(reader)
    train(net, optimizer, 3)
    train(other, its_optimizer, 3)
    assert all(p.device.type == "cuda" for p in other.parameters())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
