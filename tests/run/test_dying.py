"""Ranks that die without a word, on the real kernel: who finds out, and what they find."""

import os
import signal
import threading
from pathlib import Path

import pytest

import hpc_resume as hr
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.journal import read_events
from hpc_resume.run import peers, session
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt
from tests.run.training import train


def events(run_dir, attempt, kind):
    found = read_events(RunDirectory(run_dir).attempt(attempt) / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def ended(run_dir, attempt=1):
    (event,) = events(run_dir, attempt, "ended")
    return event


@pytest.fixture
def narrow():
    """A control group for want of memory; only root may make one."""
    folder = Path(f"/sys/fs/cgroup/memory/hpc-resume-dying-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text("8G")
    except OSError:
        pytest.skip("control groups of version 1 can't be made here")
    yield folder
    folder.rmdir()


def first_time():
    """Whether this is asked for the first time in this run."""
    asked = Path(os.environ["HPC_RESUME_RUN_DIR"]) / "asked"
    if asked.exists():
        return False
    asked.touch()
    return True


def train_too_much(steps, narrow, rank=None):
    """Run out of the host's memory in the fifth step of the first attempt."""
    group = Path(narrow)
    if rank in {None, int(os.environ["SUBMITIT_LOCAL_GLOBALID"])} and first_time():
        (group / "cgroup.procs").write_text("0")
        step = hr.Run.log

        def log(run, **values):
            if run.step == 5:  # little more than it has: to touch a lot takes a slow machine long
                used_bytes = int((group / "memory.usage_in_bytes").read_text())
                (group / "memory.limit_in_bytes").write_text(str(used_bytes + (32 << 20)))
                bytearray(256 << 20)
            step(run, **values)

        hr.Run.log = log
    train(steps, every_steps=2)


def test_a_rank_that_is_killed_for_want_of_memory_is_found_dead_by_the_one_beside_it(tmp_path, narrow):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, train_too_much, 10, str(narrow), 1)
    assert attempt.wait(120) == [75, -signal.SIGKILL], attempt.log.read_text()
    last = ended(run_dir)
    assert (last["cause"], last["decision"]) == ("out_of_memory", "continue"), last
    assert "rank 1 on" in last["evidence"]
    assert "for want of memory" in last["evidence"]


def test_a_rank_that_is_killed_is_found_dead_by_the_one_beside_it(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 3, train_slowly, 1000)
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGKILL, ranks=[2])
    assert attempt.wait() == [75, 75, -signal.SIGKILL], attempt.log.read_text()
    last = ended(run_dir)
    assert (last["cause"], last["decision"], last["nodes"]) == ("crash", "continue", [os.uname().nodename])
    assert f"rank 2 on {os.uname().nodename}: its process" in last["evidence"]


def train_until_killed(steps):
    """On rank 1: never finish writing the first checkpoint, and die at the end of the second step."""
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        step = hr.Run.log

        def log(run, **values):
            step(run, **values)
            if run.step == 1:  # completed, and the second one all but
                os.kill(os.getpid(), signal.SIGKILL)

        hr.Run.log = log
        Staging.write = lambda *_, **__: threading.Event().wait()
    train(steps, every_steps=1)


def test_a_rank_that_is_killed_while_it_writes_is_not_waited_for_at_the_next_save(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_until_killed, 10)
    assert attempt.wait() == [75, -signal.SIGKILL], attempt.log.read_text()
    evidence = ended(tmp_path / "run")["evidence"]
    assert "its process" in evidence
    assert "the shards of ranks 1 of step 1 have not come" in evidence


def train_until_killed_at_the_start(steps):
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        hr.Run.steps = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    train(steps)


def test_a_rank_that_is_killed_before_the_first_step_is_not_waited_for(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_until_killed_at_the_start, 10)
    assert attempt.wait() == [75, -signal.SIGKILL], attempt.log.read_text()
    last = ended(tmp_path / "run")
    assert (last["cause"], last["nodes"]) == ("crash", [os.uname().nodename])
    assert "rank 1 on" in last["evidence"]


def begin_on(rank, what):
    """Fail, or be killed, on one rank where it first looks at its device."""
    if int(os.environ["SUBMITIT_LOCAL_GLOBALID"]) == rank:

        def fails(_):
            if what == signal.SIGKILL:
                os.kill(os.getpid(), what)
            raise RuntimeError(what)

        session.describe_device = fails
    train(4)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gpu_that_is_broken_at_the_beginning_is_told_to_all_and_the_run_goes_on(tmp_path, rank):
    why = "CUDA error: uncorrectable ECC error encountered"
    attempt = Attempt(tmp_path / "run", 2, begin_on, rank, why)
    assert attempt.wait(30) == [75, 75], attempt.log.read_text()
    last = ended(tmp_path / "run")
    node = os.uname().nodename
    assert (last["cause"], last["decision"], last["nodes"]) == ("crash", "continue", [node])
    assert last["evidence"].startswith(f"rank {rank} on {node}: RuntimeError: {why}")


def test_a_mistake_at_the_beginning_is_told_to_all_and_repeated_by_none(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, begin_on, 1, "something")
    assert attempt.wait(30) == [1, 1], attempt.log.read_text()
    last = ended(tmp_path / "run")
    assert (last["cause"], last["decision"]) == ("crash", "stop")
    assert "rank 1 on" in last["evidence"]


def test_a_rank_that_is_killed_at_the_beginning_is_not_waited_for(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, begin_on, 1, signal.SIGKILL)
    assert attempt.wait(30) == [75, -signal.SIGKILL], attempt.log.read_text()
    assert "rank 1 on" in ended(tmp_path / "run")["evidence"]


def train_slowly(steps):
    train(steps, step_s=0.02, every_steps=2)


def test_rank_0_that_is_killed_is_found_dead_by_the_others_and_told_by_the_next_attempt(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, train_slowly, 1000)
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGKILL, ranks=[0])
    assert attempt.wait() == [-signal.SIGKILL, 75], attempt.log.read_text()
    assert Attempt(run_dir, 1, train_slowly, 5).wait() == [0]
    (found,) = events(run_dir, 2, "diagnosed")
    assert (found["attempt"], found["cause"]) == (1, "crash")
    assert "rank 0 on" in found["evidence"]


def test_a_mistake_on_one_of_three_ranks_is_repeated_by_none(tmp_path):
    attempt = Attempt(tmp_path / "run", 3, train_with_a_mistake_on_rank_2, 10)
    assert attempt.wait() == [1, 1, 1], attempt.log.read_text()
    assert ended(tmp_path / "run")["decision"] == "stop"


def train_with_a_mistake_on_rank_2(steps):
    train(steps, fail_at=0 if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "2" else None)


def train_that_hangs_on_one_rank(steps):
    hang_at = 3 if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1" else None
    train(steps, hang_at=hang_at, every_steps=2, stop={"watchdog_s": 1})


def test_a_rank_that_hangs_is_no_dead_one(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_that_hangs_on_one_rank, 10)
    attempt.wait_for_step(3)
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    last = ended(tmp_path / "run")
    assert (last["cause"], last["decision"]) == ("hang", "continue")
    assert "no step ended within 1 s" in last["evidence"]


def begin_alone():
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "0":
        peers.JOIN_S = 1.0
        train(10)


def test_ranks_that_do_not_meet_are_silent_not_crashed(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, begin_alone)
    assert attempt.wait() == [75, 0], attempt.log.read_text()
    last = ended(tmp_path / "run")
    assert (last["cause"], last["decision"]) == ("hang", "continue")
    assert "the ranks did not meet" in last["evidence"]


DYING = """
import os, sys
sys.path.insert(0, {root!r})
from tests.run import training, test_dying

def killed():
    if test_dying.first_time():
        training.time.sleep = lambda _: os.kill(os.getpid(), 9)
        training.train(12, hang_at=7, every_steps=2)
    training.train(12)

def starved(narrow):
    test_dying.train_too_much(12, narrow)
"""


def submit(tmp_path, monkeypatch, function, **kwargs):
    root = str(Path(__file__).parents[2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", root)
    (tmp_path / "dying.py").write_text(DYING.format(root=root))
    job = hr.submit(f"dying.py:{function}", **kwargs)
    assert job.wait(120) == "COMPLETED", job.log()
    assert events(job.run_dir, 1, "ended") == []
    (found,) = events(job.run_dir, 2, "diagnosed")
    assert "found out by attempt 2" in repr(job.explain())
    return found


def test_the_only_rank_is_killed_and_its_exit_code_tells(tmp_path, monkeypatch):
    found = submit(tmp_path, monkeypatch, "killed")
    assert (found["cause"], found["nodes"]) == ("crash", [os.uname().nodename])
    assert "rank 0 died of SIGKILL" in found["evidence"]


def test_the_only_rank_is_killed_for_want_of_memory(tmp_path, monkeypatch, narrow):
    found = submit(tmp_path, monkeypatch, "starved", narrow=str(narrow))
    assert (found["cause"], found["nodes"]) == ("out_of_memory", [])
    assert "rank 0 died of SIGKILL" in found["evidence"]
