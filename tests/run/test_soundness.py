"""What is not finite is kept, told, and not resumed from."""

import math

import pytest
import torch
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume import cli
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.prune import plan_pruning
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import CheckpointNotFound
from hpc_resume.report.explain import explain
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.ranks import Attempt
from tests.run.test_probing import events
from tests.run.training import GLOBAL_BATCH, Samples


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used = torch.nn.Linear(16, 1)
        self.unused = torch.nn.Parameter(torch.ones(5000), requires_grad=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        return self.used(x).squeeze(-1)


def spoil_weights(net, _):
    net.unused.data[4321] = math.nan


def spoil_moments(_, optimizer):
    next(iter(optimizer.state.values()))["exp_avg"][0, 0] = math.inf


def spoil_mean(net, _):
    net.mean[1] = math.nan


def double_weights(net, _):
    net.unused.data.mul_(6)


def train(steps, spoil=None, at=3, **settings):
    settings.setdefault("checkpoint", {"every_steps": 2, "every_s": None})
    with hr.Run(**settings) as run:
        net = Net()
        optimizer = torch.optim.AdamW(net.used.parameters(), lr=1e-2)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH)
        model = DistributedDataParallel(net)
        run.track(model=model, optimizer=optimizer, data=data)
        for step, (_, x, y) in run.steps(data, until=steps):
            if step == at and spoil:
                spoil(net, optimizer)
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def resumed_ignoring(steps):
    train(steps, validation={"nonfinite": "ignore"})


def stopping_at_once(steps, spoil):
    train(steps, spoil, validation={"nonfinite": "stop"})


def holding_back_jumps(steps, spoil=None, at=None):
    train(steps, spoil, at, validation={"norm_jump": "hold_back"})


def ls(run_dir):
    done = CliRunner().invoke(cli.main, ["ls", str(run_dir)])
    assert done.exit_code == 0
    return done.output


def test_poisoned_checkpoints_are_kept_and_an_older_one_is_resumed_from(tmp_path):
    attempt = Attempt(tmp_path, 2, train, 20, spoil_weights)
    assert attempt.wait() == [1, 1], attempt.log.read_text()
    log = attempt.log.read_text()
    assert "the checkpoint of step 4 is HELD BACK: model/unused (NaN). It is kept" in log
    assert "as in 3 checkpoints in a row" in log
    run = RunDirectory(tmp_path)
    sound, *poisoned = run.checkpoint_names()
    assert [checkpoint_step(name) for name in (sound, *poisoned)] == [2, 4, 6, 8]
    assert [event["step"] for event in events(tmp_path, 1, "held_back")] == [4, 6, 8]
    assert verify_run(tmp_path) == []
    # Whoever asks for the newest gets the sound one.
    assert status(tmp_path).newest == sound
    with Checkpoint(tmp_path) as ckpt:
        assert ckpt.step == 2
    assert "model/unused (NaN)" in ls(tmp_path)
    told = repr(explain(tmp_path))
    assert "step 4 was held back" in told
    plan = plan_pruning(run, keep=1)
    assert sound in plan.keep
    attempt = Attempt(tmp_path, 1, train, 5)
    assert attempt.wait() == [0], attempt.log.read_text()
    (restored,) = events(tmp_path, 2, "restored")
    assert restored["checkpoint"] == sound
    assert [event["step"] for event in events(tmp_path, 2, "passed_over")] == [8, 6, 4]
    assert "step 8 is passed over: model/unused (NaN)" in attempt.log.read_text()
    # The same step is saved again, by its own name.
    assert [checkpoint_step(name) for name in run.checkpoint_names()] == [2, 4, 4, 5, 6, 8]


def test_nothing_sound_is_nothing_to_resume_from(tmp_path):
    assert Attempt(tmp_path, 1, train, 2, spoil_moments, 1).wait() == [0]
    with pytest.raises(CheckpointNotFound, match="not finite"):
        Checkpoint(tmp_path)
    _, manifest = store.find(RunDirectory(tmp_path))
    assert any(name.endswith("exp_avg") for name in manifest.health.poisoned)
    assert not manifest.resumable
    attempt = Attempt(tmp_path, 1, resumed_ignoring, 3)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert events(tmp_path, 2, "restored")[0]["step"] == 2
    assert events(tmp_path, 2, "not_finite")[0]["step"] == 3


def test_it_can_end_the_run_at_once(tmp_path):
    attempt = Attempt(tmp_path, 2, stopping_at_once, 20, spoil_weights)
    assert attempt.wait() == [1, 1], attempt.log.read_text()
    assert [checkpoint_step(name) for name in RunDirectory(tmp_path).checkpoint_names()] == [2, 4]


def test_the_last_checkpoint_counts_too(tmp_path):
    attempt = Attempt(tmp_path, 1, stopping_at_once, 4, spoil_weights)
    assert attempt.wait() == [1], attempt.log.read_text()
    assert [checkpoint_step(name) for name in RunDirectory(tmp_path).checkpoint_names()] == [2, 4]


def test_buffers_may_be_infinite_and_nan_in_them_is_told(tmp_path):
    attempt = Attempt(tmp_path, 1, train, 8, spoil_mean)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert attempt.log.read_text().count("there is NaN in model/mean") == 1
    _, manifest = store.find(RunDirectory(tmp_path))
    assert manifest.resumable
    assert manifest.health.noticed == {"model/mean": "nan"}


def test_norms_are_those_of_the_parameters_and_jumps_are_told(tmp_path):
    attempt = Attempt(tmp_path, 2, holding_back_jumps, 10, double_weights, 7)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (first, *_, last) = RunDirectory(tmp_path).checkpoint_names()
    with Checkpoint(tmp_path / "checkpoints" / first) as ckpt:
        parameters = [
            ckpt[name].double() for name in ("model/used.weight", "model/used.bias", "model/unused")
        ]
        norm = math.sqrt(sum(each.square().sum().item() for each in parameters))
        assert math.isclose(ckpt.manifest.health.norms["model"], norm, rel_tol=1e-6)
    jumps = events(tmp_path, 1, "norm_jumped")
    assert [event["step"] for event in jumps] == [8, 10]
    assert "the norm of model is" in attempt.log.read_text()
    _, manifest = store.find(RunDirectory(tmp_path))
    assert manifest.name == last
    assert manifest.resumable  # of itself: it is the run that asks for more
    assert list(manifest.health.jumped) == ["model"]
    plan = plan_pruning(RunDirectory(tmp_path), keep=1)
    assert [checkpoint_step(name) for name in plan.keep if "refers" not in plan.keep[name]] == [10, 6]
    attempt = Attempt(tmp_path, 1, holding_back_jumps, 11)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert events(tmp_path, 2, "restored")[0]["step"] == 6
