"""Steps of a run that are micro-batches, on real ranks: a crash in the middle of an accumulation loses nothing."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.journal import read_events
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt

EVERY = 4
STEPS = 16
SETTINGS = {"checkpoint": {"every_steps": 5, "every_s": None}}


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        return x, x.sum(0, keepdim=True).sin()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(8, 16, dtype=torch.float64)
        self.two = torch.nn.Linear(16, 1, dtype=torch.float64)

    def forward(self, x):
        return self.two(self.one(x).tanh())


def train(fail_at=None, *, noisy=True, sharded=False, deterministic=False):
    with hr.Run(**SETTINGS) as run:
        if deterministic:
            run.deterministic()
        with torch.device("meta"):
            net = Net()
        if sharded:
            fully_shard(net)
        run.initialise(net)
        model = net if sharded else DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = run.loader(Samples(), global_batch=12)
        noise = torch.Generator().manual_seed(run.rank)
        run.track(model=model, optimizer=optimizer, data=data, noise=noise)
        for step, (x, y) in run.steps(data, until=STEPS):
            if step == fail_at:
                raise ValueError("something in the script")
            if noisy:
                x = x + 0.1 * torch.randn(x.shape, generator=noise, dtype=x.dtype)  # noqa: PLW2901
            last = step % EVERY == EVERY - 1
            model.require_backward_grad_sync = last  # what no_sync() sets
            ((model(x) - y).square().mean() / EVERY).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()


def quiet(fail_at=None):
    train(fail_at, noisy=False)


def sharded(fail_at=None):
    train(fail_at, sharded=True)


def weights(run_dir):
    with Checkpoint(run_dir) as checkpoint:
        assert checkpoint.step == STEPS
        return checkpoint.load()


def journal(run_dir, attempt, kind):
    path = run_dir / "attempts" / f"{attempt:04d}" / "events.jsonl"
    return [event for event in read_events(path) if event["event"] == kind]


def deterministic(fail_at=None):
    train(fail_at, deterministic=True)


# Noise is each rank's own: other ranks, other noise.
@pytest.mark.parametrize(
    ("function", "sizes"), [(train, (2, 2)), (deterministic, (3, 3)), (quiet, (2, 3)), (sharded, (2, 2))]
)
def test_an_interruption_between_micro_batches(tmp_path, function, sizes):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    first, second = sizes
    assert Attempt(whole, first, function).wait() == [0] * first
    crashed = Attempt(run_dir, first, function, 7)
    assert set(crashed.wait()) == {75}, crashed.log.read_text()
    _, manifest = store.find(RunDirectory(run_dir))
    assert manifest.step == 5  # one micro-batch after the optimizer's step
    assert manifest.environment["numerics"]["float32_matmul_precision"] == "highest"
    resumed = Attempt(run_dir, second, function)
    assert resumed.wait() == [0] * second, resumed.log.read_text()
    expected, found = weights(whole), weights(run_dir)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        if first == second:
            assert torch.equal(tensor, found[key]), key
        else:
            torch.testing.assert_close(tensor, found[key], rtol=1e-10, atol=1e-12)
    told = [event["why"] for event in journal(run_dir, 2, "adjusted")]
    anew = [event["why"] for event in journal(run_dir, 2, "generators_anew")]
    assert told[0].startswith("gradients of 4 parameters that were still to be used were restored")
    assert ("mean over ranks was kept" in told[0]) == (first != second)
    assert anew == ([] if first == second else ["the checkpoint was taken on 2 ranks"])
