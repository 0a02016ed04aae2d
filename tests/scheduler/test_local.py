import dataclasses
import json
import os
import subprocess
import sys

import pytest

from hpc_resume.errors import IntegrityError
from hpc_resume.scheduler.base import JobFacts
from hpc_resume.scheduler.cause import Cause, classify
from hpc_resume.scheduler.local import LocalScheduler, LocalState, process_ticks

RUNNING = LocalState(job_id="a", state="RUNNING", run_dir="/r", node_type="pair", ranks=2, end_time=100.0)


def seen(tmp_path, **changes) -> JobFacts:
    dataclasses.replace(RUNNING, **changes).write(tmp_path / "state.json")
    return LocalScheduler(tmp_path / "state.json").facts()


def test_a_state_survives_the_file(tmp_path):
    state = dataclasses.replace(RUNNING, exit_codes=(75, -9), reason="TimeLimit", why="x", preempt_time=1.5)
    state.write(tmp_path / "state.json")
    assert LocalState.read(tmp_path / "state.json") == state


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2, "job_id": "a"}', '{"schema']
)
def test_a_damaged_state_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=r"state\.json"):
        LocalState.read(path)
    assert LocalScheduler(path).facts().state == "UNKNOWN"
    assert LocalScheduler(path).node_type("n") is None


def test_a_missing_state_is_unknown_not_an_error(tmp_path):
    facts = LocalScheduler(tmp_path / "nix.json").facts()
    assert facts.state == "UNKNOWN"
    assert "nix.json" in facts.evidence


def test_facts_are_the_file(tmp_path):
    facts = seen(tmp_path, restarts=3, preempt_time=7.0, reason="TimeLimit")
    assert (facts.state, facts.reason, facts.restarts) == ("RUNNING", "TimeLimit", 3)
    assert (facts.preempt_time_s, facts.end_time_s) == (7.0, 100.0)
    assert "Restarts=3" in facts.evidence
    scheduler = LocalScheduler(tmp_path / "state.json")
    assert scheduler.node_type("anything") == "pair"
    assert scheduler.requeue() is False


@pytest.mark.parametrize(
    ("signal_name", "changes", "cause"),
    [
        ("SIGUSR2", {}, Cause.TIME_LIMIT),
        ("SIGTERM", {"preempt_time": 90.0}, Cause.PREEMPTION),
        ("SIGTERM", {"state": "COMPLETING", "reason": "TimeLimit"}, Cause.TIME_LIMIT),
        ("SIGTERM", {"state": "COMPLETING"}, Cause.CANCEL),
        ("SIGTERM", {}, Cause.SIGNAL),
        ("SIGTERM", {"state": "COMPLETING", "restarts": 1, "preempt_time": 90.0}, Cause.PREEMPTION),
    ],
)
def test_causes_are_told_apart_by_the_same_rules_as_slurms(tmp_path, signal_name, changes, cause):
    facts = seen(tmp_path, **changes)
    verdict = classify(signal_name, facts, own_restarts=0, now_s=95.0, warning_lead_s=8.0)
    assert verdict.cause is cause


def test_a_job_is_alive_while_its_controller_is():
    here = os.uname().nodename
    mine = {"host": here, "controller_pid": os.getpid(), "controller_ticks": process_ticks(os.getpid())}
    assert dataclasses.replace(RUNNING, **mine).alive()
    assert not dataclasses.replace(RUNNING, **mine, state="COMPLETED").alive()
    assert not dataclasses.replace(RUNNING, **{**mine, "controller_ticks": 1}).alive()
    assert dataclasses.replace(RUNNING, host="elsewhere", controller_pid=1, controller_ticks=1).alive()


def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked yet
    assert process_ticks(child.pid) is None
    child.wait()
    assert process_ticks(child.pid) is None


def test_the_state_file_of_schema_1_stays_readable(tmp_path):
    golden = {
        "schema": 1, "job_id": "20260101-000000-abcd", "state": "CANCELLED", "reason": None, "restarts": 1,
        "preempt_time": None, "end_time": 12.5, "node_type": "pair", "ranks": 2, "host": "h",
        "controller_pid": 7, "controller_ticks": 8, "run_dir": "/r", "exit_codes": [75, 75], "why": "cancelled",
    }  # fmt: skip
    path = tmp_path / "state.json"
    path.write_text(json.dumps(golden))
    assert LocalState.read(path).exit_codes == (75, 75)
    LocalState.read(path).write(path)
    assert json.loads(path.read_text()) == golden
