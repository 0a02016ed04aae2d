"""Stops that arrive where no step ends: during preparation, evaluation and the loading of data."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.run import leaving, stopping
from tests.ranks import Attempt
from tests.run.test_interruptions import (
    committed_step,
    ended,
    events,
    losses,
    samples_by_step,
    tensors,
)
from tests.run.training import GLOBAL_BATCH, Samples
from tests.run.training import train as usual_training

EPOCH = 10


class Phase:
    """A long phase of one rank: it says when it has begun, and goes on until it is told to end."""

    def __init__(self, run, *, breathes=True, **how):
        self.run, self.breathes, self.how = run, breathes, how
        self.folder = run.directory.root

    def __call__(self, name):
        (self.folder / f"{name}-{self.run.rank}").touch()
        while not (self.folder / "go-on").exists():
            if self.breathes:
                self.run.breathe(**self.how)
            time.sleep(0.01)


def begun(attempt, name, ranks=(0, 1)):
    attempt.wait_until(lambda: all((attempt.run_dir / f"{name}-{rank}").exists() for rank in ranks))


class SlowSamples(Samples):
    """Samples of which one takes as long as a phase."""

    def __init__(self, phase):
        self.phase = phase

    def __getitem__(self, index):
        if self.phase is not None:
            self.phase("loading")
        return super().__getitem__(index)


def train(steps=2 * EPOCH, *, where=None, breathes=True, every=None, step_done=False, at=None, **settings):
    """Train two epochs, with a long phase where it is said; each epoch ends with an evaluation."""
    settings = {"warning_lead_s": 0, "checkpoint": {"every_steps": every, "every_s": None}, **settings}
    with hr.Run(**settings) as run:
        phase = Phase(run, breathes=breathes)
        if where == "preparing":
            phase("preparing")
        net = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 1)))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        dataset = SlowSamples(None)
        data = run.loader(dataset, global_batch=GLOBAL_BATCH)
        run.track(model=net, optimizer=optimizer, data=data)
        evaluated = run.directory.root / f"evaluated-{run.rank}.txt"
        for until in range(EPOCH, steps + 1, EPOCH):
            for step, (index, x, y) in run.steps(data, until=until):
                with (run.directory.root / f"samples-{run.attempt}-{run.rank}.txt").open("a") as file:
                    file.write(f"{step} {' '.join(map(str, index.tolist()))}\n")
                loss = (net(x).squeeze(-1) - y).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.log(loss=loss)
                if step == at and where == "step":
                    Phase(run, breathes=breathes, step_done=step_done)("step")
                if step == at and where == "loading":
                    dataset.phase = phase
            if until == EPOCH and where == "between":
                phase("between")
            elif until == EPOCH and where == "between, on rank 0":
                if run.rank == 0:
                    phase("between")
                dist.barrier()
            with evaluated.open("a") as file:
                file.write(f"{until}\n")


def attempt_of(run_dir, ranks=2, job="job-1", **how):
    return Attempt(run_dir, ranks, call, how, job=job)


def call(how):
    for name, seconds in how.pop("patch", {}).items():
        setattr(leaving if name == "_HEAD_START_S" else stopping, name, seconds)
    train(**how)


def goes_on_as_if_nothing_had_been(tmp_path, run_dir):
    """Finish a run, and compare it with one that nothing interrupted."""
    last = attempt_of(run_dir)
    assert last.wait() == [0, 0], last.log.read_text()
    whole = tmp_path / "whole"
    assert attempt_of(whole).wait() == [0, 0]
    (one, expected), (two, found) = tensors(whole), tensors(run_dir)
    assert one.objects == two.objects
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert samples_by_step(whole) == samples_by_step(run_dir)
    assert losses(whole).tolist() == losses(run_dir).tolist()
    assert verify_run(run_dir) == []


def test_a_stop_during_preparation_leaves_at_once_and_touches_nothing(tmp_path):
    run_dir = tmp_path / "run"
    first = attempt_of(run_dir, where="between")
    begun(first, "between")
    first.signal(signal.SIGUSR2)
    assert first.wait() == [75, 75]
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/**/*")}
    second = attempt_of(run_dir, where="preparing")
    begun(second, "preparing")
    second.signal(signal.SIGUSR2, ranks=[1])
    assert second.wait() == [75, 75], second.log.read_text()
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoints/**/*")}
    assert events(run_dir, 2, "restored") == []
    assert ended(run_dir, 2)["decision"] == "continue"
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)


def test_a_stop_between_steps_is_one_after_the_completed_step(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="between")
    begun(attempt, "between")
    attempt.signal(signal.SIGUSR2, ranks=[0])
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert ended(run_dir, 1)["step"] == committed_step(run_dir) == EPOCH
    assert not (run_dir / "evaluated-0.txt").exists()
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)
    assert (run_dir / "evaluated-0.txt").read_text().split() == ["10", "20"]  # done again, as a whole


def test_a_rank_that_waits_for_one_that_breathes_hangs_nobody(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="between, on rank 0")
    begun(attempt, "between", ranks=[0])
    attempt.signal(signal.SIGUSR2)
    codes = attempt.wait()
    assert codes == [75, 75], attempt.log.read_text()
    assert ended(run_dir, 1)["step"] == committed_step(run_dir) == EPOCH


def test_an_evaluation_inside_a_step_that_is_done_is_not_waited_for(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="step", at=4, step_done=True)
    begun(attempt, "step")
    attempt.signal(signal.SIGUSR2, ranks=[1])
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert ended(run_dir, 1)["step"] == committed_step(run_dir) == 5
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)
    assert events(run_dir, 2, "restored")[0]["step"] == 5


def test_inside_a_step_the_run_goes_on_to_its_end(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="step", at=4)
    attempt.tell(end_time=time.time() + 3600)
    begun(attempt, "step")
    attempt.signal(signal.SIGUSR2)
    attempt.wait_until(lambda: events(run_dir, 1, "stop_requested"))
    time.sleep(0.5)
    assert all(process.is_alive() for process in attempt.processes)
    (run_dir / "go-on").touch()
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert ended(run_dir, 1)["step"] == committed_step(run_dir) == 5
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)


def leaves_before(attempt, end_s):
    """A phase inside a step lasts beyond the end of the job: the last checkpoint serves."""
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert time.time() < end_s
    last = ended(attempt.run_dir, 1)
    assert (last["cause"], last["decision"]) == ("time_limit", "continue")
    assert committed_step(attempt.run_dir) == 4
    return last


def test_inside_a_step_that_does_not_end_the_last_checkpoint_serves(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="step", at=5, every=4)
    end_s = time.time() + 25
    attempt.tell(end_time=end_s)
    begun(attempt, "step")
    why = leaves_before(attempt, end_s)["why"]
    assert "no step ended in time" not in why  # it breathes
    assert "this one did not" not in why
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)


def test_loading_data_that_does_not_end_is_left(tmp_path):
    run_dir = tmp_path / "run"
    attempt = attempt_of(run_dir, where="loading", at=5, every=4)
    end_s = time.time() + 25
    attempt.tell(end_time=end_s)
    begun(attempt, "loading")
    leaves_before(attempt, end_s)
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)


def test_what_does_not_breathe_is_left_before_the_job_is_killed(tmp_path):
    run_dir = tmp_path / "run"
    patch = {"_LEAVE_S": 0.5, "_HEAD_START_S": 0.5}
    attempt = attempt_of(run_dir, where="loading", at=5, every=4, breathes=False, patch=patch)
    end_s = time.time() + 25
    attempt.tell(end_time=end_s)
    begun(attempt, "loading")
    why = leaves_before(attempt, end_s)["why"]
    assert "no step ended in time for a save" in why or "this one did not" in why
    goes_on_as_if_nothing_had_been(tmp_path, run_dir)


def test_a_rank_that_does_not_breathe_is_not_waited_for(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, prepare_on_rank_0)
    begun(attempt, "preparing")
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait(30) == [75, 75], attempt.log.read_text()


def prepare_on_rank_0():
    stopping._LEAVE_S = leaving._HEAD_START_S = 1.0
    with hr.Run() as run:
        Phase(run, breathes=run.rank == 0)("preparing")


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_workers_that_breathe_and_get_the_jobs_signals_go_on_loading(tmp_path, number):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 1, train_with_workers_that_breathe)
    attempt.wait_until((run_dir / "step").exists)
    workers = children(attempt.processes[0].pid)
    assert len(workers) == 2
    for pid in workers:  # as Slurm does
        os.kill(pid, number)
    time.sleep(0.3)
    attempt.signal(number)
    assert attempt.wait() == [75], attempt.log.read_text()
    assert (ended(run_dir, 1)["cause"], committed_step(run_dir)) == ("signal", ended(run_dir, 1)["step"])
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


class Breathing(Samples):
    def __init__(self, run):
        self.run = run

    def __getitem__(self, index):
        self.run.breathe()
        return super().__getitem__(index)


def train_with_workers_that_breathe():
    with hr.Run(checkpoint={"every_s": None}) as run:
        data = run.loader(Breathing(run), global_batch=4, num_workers=2, multiprocessing_context="fork")
        run.track(data=data)
        for step, _ in run.steps(data, until=1_000_000):
            (run.directory.root / "step").write_text(str(step))


def test_our_own_clock_ends_an_attempt_without_any_signal(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, train_without_warning)
    end_s = time.time() + 20
    attempt.tell(end_time=end_s)
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert time.time() < end_s
    last = ended(run_dir, 1)
    assert (last["cause"], last["decision"]) == ("time_limit", "continue")
    assert committed_step(run_dir) == last["step"] > 0
    (asked,) = events(run_dir, 1, "stop_requested")
    assert (asked["signal"], asked["rank"]) == ("DEADLINE", 0)
    assert "s before the end of the job; no save was measured, so a lead of " in asked["evidence"]


def train_without_warning():
    usual_training(100_000, step_s=0.02, warning_lead_s=0)


def test_measured_saves_shorten_the_lead_of_this_attempt_and_the_next(tmp_path):
    run_dir = tmp_path / "run"
    for number, measured in ((1, "measured"), (2, "1 measured")):
        attempt = Attempt(run_dir, 1, train_with_saves if number == 1 else train_without_warning)
        end_s = time.time() + 20
        attempt.tell(end_time=end_s)
        assert attempt.wait() == [75], attempt.log.read_text()
        (asked,) = events(run_dir, number, "stop_requested")
        assert f"{measured}), so a lead of" in asked["evidence"]
        assert 2.0 < end_s - asked["t"] < 15.0
        assert committed_step(run_dir) == ended(run_dir, number)["step"]
    saved = [event for event in events(run_dir, 1, "saved") if event["reason"] == "cadence"]
    assert all(0 < event["took_s"] < 20 for event in saved)


def train_with_saves():
    usual_training(100_000, step_s=0.02, checkpoint={"every_s": 1.0}, warning_lead_s=0)


SLOW_IMPORT = """
import os, pathlib, sys, time
begun = pathlib.Path({folder!r}) / f"begun-{{os.environ['HPC_RESUME_RESTART_COUNT']}}"
begun.touch()
while begun.name == "begun-0":
    time.sleep(0.01)
import torch
sys.path.insert(0, {root!r})
from tests.run.training import train
train(20)
"""


def test_a_signal_during_import_costs_an_attempt_and_nothing_else(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SLOW_IMPORT.format(folder=str(tmp_path), root=str(Path(__file__).parents[2])))
    config = {
        "scheduler": "local",
        "warning_lead_s": 58,  # two seconds after the start
        "node_types": [
            {"ranks": 2, "time_limit_s": 60},
            {"name": "longer", "ranks": 2, "time_limit_s": 3600},
        ],
    }
    job = hr.submit([sys.executable, str(script)], config=config, run_dir=tmp_path / "run")
    job.wait()
    assert job.state == "COMPLETED", job.log()
    state = json.loads(next((tmp_path / "run" / "jobs").glob("*_state.json")).read_text())
    assert state["restarts"] == 1
    assert committed_step(tmp_path / "run") == 20
