"""How one rank leaves: who has the last word, and that a log which can't be written has none."""

import dataclasses
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import hpc_resume as hr
from hpc_resume import log
from hpc_resume.journal import Journal, read_events
from hpc_resume.run import leaving as leaving_module
from hpc_resume.run.fault import Fault
from hpc_resume.run.leaving import Leaving, Progress
from hpc_resume.run.metrics import Metrics
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.environment import JobEnvironment

VERDICT = Verdict(cause=Cause.SIGNAL, evidence="e")


class Full:
    """A log on a full disk."""

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = isatty = lambda self: self.write("")


def fill(monkeypatch):
    """Within the test: what captures its output has set the stream anew by then."""
    monkeypatch.setattr(sys, "stderr", Full())


class LeftError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def leaving(monkeypatch):
    """Rank 0, alone, of a job; the process does not end, but says so."""

    def end(code):
        raise LeftError(code)

    monkeypatch.setattr(os, "_exit", end)
    words = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    environment = JobEnvironment.detect({**words, "SLURM_LOCALID": "0"}, hostname="n1", pid=1)
    each = Leaving(environment, Progress(step=3))
    each.peers = Peers(environment, dist.HashStore(), None, "x")
    each.stopping = SimpleNamespace(
        verdict=lambda: VERDICT,
        leaving=False,
        life=SimpleNamespace(saving=False),
        close=lambda **_: None,
        abandon=lambda **_: None,
    )
    fault = Fault(cause=Cause.CRASH, evidence="it failed")
    each.faults = SimpleNamespace(
        of=lambda *_, **__: fault, behind=lambda verdict, *_, **__: verdict, leave=lambda: None
    )
    each.saver = SimpleNamespace(committed_step=0, drain=lambda _: None)
    each.metrics = SimpleNamespace(flush=lambda: None)
    ending = SimpleNamespace(exit_code=75, to_json=lambda: {"exit_code": 75, "why": "because"})
    each.last_word = SimpleNamespace(
        attempt=1, end=lambda *_, **__: ending, fail=lambda *_, **__: 75, note=lambda *_, **__: None
    )
    return each


def test_whatever_writes_into_the_log_goes_on_without_it(monkeypatch, tmp_path):
    fill(monkeypatch)
    log.say("something")
    log.show(ValueError("something"))
    journal = Journal(tmp_path / "events.jsonl")
    os.close(journal._fd)
    journal._fd = os.open("/dev/full", os.O_WRONLY)
    journal.event("kept")
    Metrics(tmp_path / "not there" / "metrics.jsonl", clock=lambda: 0.0).flush()
    metrics = Metrics(tmp_path / "not there" / "metrics.jsonl", clock=lambda: 0.0)
    metrics.log(0, {"loss": 1.0})
    metrics.flush()


def test_without_a_log_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log.say("something")


@pytest.mark.parametrize("fails", [False, True])
def test_who_gives_up_leaves_whatever_happens(monkeypatch, leaving, fails):
    fill(monkeypatch)
    if fails:
        leaving.last_word.end = lambda *_, **__: 1 / 0
    with pytest.raises(LeftError) as left:
        leaving.give_up(VERDICT, "no step ended")
    assert left.value.args == (75,)


def test_a_rank_that_gives_up_is_no_dead_one(monkeypatch, leaving):
    monkeypatch.setattr(leaving_module, "_HEAD_START_S", 0.0)
    leaving._environment = dataclasses.replace(leaving._environment, rank=1)
    with pytest.raises(LeftError):
        leaving.give_up(VERDICT, "no step ended")
    assert leaving.peers.store.check(["leaving/1"])


def test_a_crash_that_cannot_be_told_goes_on_all_the_same(monkeypatch, leaving):
    fill(monkeypatch)
    with pytest.raises(hr.Interrupted):
        leaving.crash(ValueError("something"), None)


def test_a_stop_that_fails_ends_as_a_crash(leaving):
    """In the same thread, which has the last word already."""
    leaving.last_word.end = lambda *_, **__: 1 / 0
    came = []

    def stop():
        try:
            leaving.stop(together=True)
        except ZeroDivisionError as error:
            try:
                leaving.crash(error, None)
            except hr.Interrupted:
                came.append("crash")

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    thread.join(60)
    assert came == ["crash"]


def test_nobody_gives_up_on_a_run_that_is_done(leaving):
    leaving.done()
    came = []

    def give_up():
        leaving.give_up(VERDICT, "no step ended")
        came.append("nothing happened")

    thread = threading.Thread(target=give_up, daemon=True)
    thread.start()
    thread.join(60)
    assert came == ["nothing happened"]


TRAINING = """
import os, signal, sys
import torch
import hpc_resume as hr

with hr.Run({run_dir!r}, checkpoint={{"every_steps": 1, "every_s": None}}) as run:
    run.track(net=torch.nn.Linear(1, 1))
    write = run._session.saver._staging.write
    def write_or_fail(header, *args, **options):
        if header.step == 2:
            raise OSError(28, "No space left on device")
        return write(header, *args, **options)
    run._session.saver._staging.write = write_or_fail
    for step, _ in run.steps(range(100), until=100):
        print("this fails at the end of the process", end="")
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR2)
"""


def test_a_run_whose_log_lies_on_a_full_disk_goes_on_and_is_continued(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINING.format(run_dir=str(tmp_path / "run")))
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "1", "SUBMITIT_LOCAL_NTASKS": "1"}
    environ = {**os.environ, **job, "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_LOCALID": "0"}
    environ.pop("PYTHONUNBUFFERED", None)
    environ["PYTHONPATH"] = str(Path(hr.__file__).parents[1])
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(script)], env=environ, stdout=full, stderr=full, check=False
        )
    events = read_events(tmp_path / "run" / "attempts" / "0001" / "events.jsonl")
    (ended,) = [event for event in events if event["event"] == "ended"]
    assert (ended["cause"], ended["decision"]) == (Cause.SIGNAL.value, "continue")
    assert ended["step"] > 2
    assert [event["step"] for event in events if event["event"] == "save_failed"] == [2]
    assert done.returncode == 75  # not 120, which would end the run for good
