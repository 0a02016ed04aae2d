"""Runs that end before their last step: on purpose, or because one rank refuses to go on."""

import os
import signal
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume import cli
from hpc_resume.errors import SaveError, UsageError
from hpc_resume.journal import read_events
from hpc_resume.run.history import FAULT
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt
from tests.run.training import train


def ended(run_dir, number=1):
    return read_events(RunDirectory(run_dir).attempt(number) / "events.jsonl", {"ended"})


def test_a_last_save_that_fails_after_the_loop_was_left_has_its_last_word(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SaveError("the disk is full")

    with pytest.raises(SaveError), hr.Run(tmp_path / "run") as run:  # noqa: PT012 - it is the end that fails
        run.track(net=torch.nn.Linear(1, 1))
        for _ in run.steps(range(9), until=9):
            break
        monkeypatch.setattr(run._session.saver, "save", full)
    (last,) = ended(tmp_path / "run")
    assert (last["cause"], last["decision"]) == ("crash", "stop")
    assert "the disk is full" in last["evidence"]


def refuse_on(rank, tracked):
    """Refuse on one rank, while the other waits for it in ``run.track``."""

    def refusing(*_):
        raise UsageError("not with me")

    with hr.Run(checkpoint={"every_steps": 1, "every_s": None}) as run:
        net = DistributedDataParallel(torch.nn.Linear(1, 1))
        if run.rank == rank:
            if not tracked:
                refusing()
            run._session.fitness.look_at = refusing
        run.track(net=net)
        for _ in run.steps(range(2), until=2):
            pass


@pytest.mark.parametrize("tracked", [False, True], ids=["before", "in track"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_ends_all_of_them_for_good(tmp_path, rank, tracked):
    whole = Attempt(tmp_path, 2, refuse_on, -1, False)
    assert whole.wait() == [0, 0], whole.log.read_text()
    attempt = Attempt(tmp_path, 2, refuse_on, rank, tracked, job="job-2")
    began = time.monotonic()
    assert attempt.wait() == [2, 2], attempt.log.read_text()
    assert time.monotonic() - began < 20
    (last,) = ended(tmp_path, 2)
    assert (last["cause"], last["decision"]) == ("refused", "stop")
    assert f"rank {rank} on" in last["evidence"]
    assert "not with me" in last["evidence"]


def test_damaged_rollbacks_end_all_ranks_for_good(tmp_path):
    first = Attempt(tmp_path, 2, short, 4)
    assert first.wait() == [0, 0], first.log.read_text()
    done = CliRunner().invoke(cli.main, ["rollback", str(tmp_path), "--to", "2", "--why", "the loss went up"])
    assert done.exit_code == 0, done.output
    record = tmp_path / "rollbacks" / "0001.json"
    record.write_bytes(record.read_bytes().replace(b"went up", b"came up"))
    second = Attempt(tmp_path, 2, short, 6, job="job-2")
    assert second.wait() == [4, 4], second.log.read_text()
    assert [ended(tmp_path, 2)[0][key] for key in ("cause", "decision")] == ["refused", "stop"]


def exit_with(code, ranks, at):
    """Call ``sys.exit`` on some ranks before ``run.track``, or in a step."""
    with hr.Run(checkpoint={"every_steps": 2, "every_s": None}) as run:
        net = DistributedDataParallel(torch.nn.Linear(1, 1))
        if run.rank in ranks and at is None:
            sys.exit(code)
        run.track(net=net)
        for step, _ in run.steps(range(9), until=9):
            if run.rank in ranks and step == at:
                sys.exit(code)
            net(torch.ones(1, 1)).sum().backward()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_script_that_exits_on_one_rank_before_the_first_step_is_not_repeated(tmp_path, rank):
    attempt = Attempt(tmp_path, 2, exit_with, 3, [rank], None)
    codes = attempt.wait(30)
    assert (codes[rank], codes[1 - rank]) == (3, 1), attempt.log.read_text()
    told = f"rank {rank} on {os.uname().nodename}: the script called sys.exit(3)"
    assert told in (RunDirectory(tmp_path).attempt(1) / FAULT).read_text()
    endings = [(last["cause"], last["decision"]) for last in ended(tmp_path) if told in last["evidence"]]
    assert endings == ([("crash", "stop")] if rank == 1 else [])  # rank 0 alone writes them


def test_a_script_that_exits_on_one_rank_in_training_is_a_crash_that_says_why(tmp_path):
    attempt = Attempt(tmp_path, 2, exit_with, 3, [1], 4)
    assert attempt.wait(30) == [75, 3], attempt.log.read_text()
    (last,) = ended(tmp_path)
    assert (last["cause"], last["decision"], last.get("nodes")) == ("crash", "continue", None)
    assert "the script called sys.exit(3)" in last["evidence"]


@pytest.mark.parametrize(("code", "left"), [(0, 0), (None, 0), (3, 3)])
def test_a_script_that_exits_on_all_ranks_leaves_with_its_code_and_no_last_word(tmp_path, code, left):
    attempt = Attempt(tmp_path, 2, exit_with, code, [0, 1], 4)
    assert attempt.wait(30) == [left, left], attempt.log.read_text()
    assert ended(tmp_path) == []
    assert (RunDirectory(tmp_path).attempt(1) / FAULT).exists() == bool(code)


def short(steps):
    train(steps, every_steps=2)


def be_warned(step):
    """Train until a warning in a step; with None, be warned before anything is restored."""
    with hr.Run(budget={"max_idle": 3}) as run:
        model = torch.nn.Linear(1, 1)
        if step is None:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.3)  # a thread hears it
        run.track(model=model)
        for at, _ in run.steps(iter(int, None), until=100):
            if at == step:
                os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.02)


def test_a_stop_before_the_restore_does_not_make_earlier_progress_vain(tmp_path):
    for step in (3, 20, 40, None, None):
        attempt = Attempt(tmp_path / "run", 1, be_warned, step)
        assert attempt.wait() == [75], attempt.log.read_text()
    attempt = Attempt(tmp_path / "run", 1, be_warned, None)  # the third in a row that saves nothing
    assert attempt.wait() == [1], attempt.log.read_text()
    assert "no progress in 3 attempts in a row" in attempt.log.read_text()


def test_if_rank_0_can_not_begin_no_rank_waits_for_it(tmp_path):
    first = Attempt(tmp_path, 2, short, 2)
    assert first.wait() == [0, 0], first.log.read_text()
    identity = tmp_path / "run.json"
    identity.write_bytes(identity.read_bytes().replace(b"run_id", b"run-id"))
    second = Attempt(tmp_path, 2, short, 4, job="job-2")
    began = time.monotonic()
    codes = second.wait()
    assert time.monotonic() - began < 30
    log = second.log.read_text()
    assert codes == [1, 1], log
    assert "HpcResumeError: the run could not begin: rank 0 on " in log
