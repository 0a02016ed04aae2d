import dataclasses
import json
import os

import pytest

from hpc_resume.errors import CheckpointNotFound
from hpc_resume.report.status import status
from hpc_resume.report.tables import attempt_sentence, duration_text, size_text, status_table
from hpc_resume.rollbacks import Rollback
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.local import LocalState, process_ticks, state_path

T0 = 1_700_000_000.0


class Story:
    """Writes a run directory as a run would."""

    def __init__(self, root):
        self.run = RunDirectory(root)
        self.run.create("gpt", clock=lambda: T0)

    def attempt(self, number, *events, torn="", metrics=None, **record):
        folder = self.run.attempt(number)
        folder.mkdir()
        base = {
            "schema": 1, "attempt": number, "job_id": "j", "restart_count": number - 1, "kind": "local",
            "rendezvous": f"local-j-{number - 1}", "nodes": ["n1"], "node_type": "pair", "world_size": 2,
            "started": T0 + 100 * number, "config": None, "environment": {},
        }  # fmt: skip
        (folder / "attempt.json").write_text(json.dumps({**base, **record}))
        lines = [
            json.dumps({"t": T0 + 100 * number + 10 * place, **event}) for place, event in enumerate(events)
        ]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n" + torn)
        for rank, steps in (metrics or {}).items():
            lines = [json.dumps({"step": step, "t": T0, "loss": 1.0}) for step in steps]
            (folder / f"metrics-rank-{rank:05d}.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
        return self

    def checkpoint(self, step):
        (self.run.checkpoints / f"{step:010d}-0123abcd").mkdir()
        return self

    def job(self, state, **fields):
        folder = self.run.root / "jobs"
        folder.mkdir(exist_ok=True)
        record = LocalState(
            job_id="j", state=state, run_dir=str(self.run.root), host=os.uname().nodename,
            controller_pid=os.getpid(), controller_ticks=process_ticks(os.getpid()) or 0,
        )  # fmt: skip
        dataclasses.replace(record, **fields).write(state_path(folder, "j"))
        return self

    def status(self, now=T0 + 1000):
        return status(self.run.root, clock=lambda: now)


def fresh():
    return {"event": "fresh", "step": 0}


def restored(step):
    return {"event": "restored", "checkpoint": "x", "step": step, "saved_world_size": 2}


def ended(step, cause, decision="continue", code=75, why="because"):
    return {
        "event": "ended",
        "step": step,
        "cause": cause,
        "decision": decision,
        "exit_code": code,
        "why": why,
    }


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path / "run")


def test_three_attempts_to_the_end(story):
    story.attempt(1, {"event": "begun"}, fresh(), ended(120, "time_limit", why="USR2 before the limit"))
    story.attempt(2, restored(120), ended(200, "preemption"), node_type="single", world_size=1)
    story.attempt(3, restored(200), ended(400, "done", "done", 0), node_type="triple", world_size=3)
    story.checkpoint(120).checkpoint(200).checkpoint(400)
    found = story.status()
    assert (found.name, found.state, found.step, found.steps_lost) == ("gpt", "done", 400, 0)
    assert [(a.node_type, a.world_size, a.cause, a.first_step, a.last_step) for a in found.attempts] == [
        ("pair", 2, "time_limit", 0, 120),
        ("single", 1, "preemption", 120, 200),
        ("triple", 3, "done", 200, 400),
    ]
    assert found.newest == "0000000400-0123abcd"
    assert found.attempts[0].evidence == "USR2 before the limit"
    assert found.attempts[0].ended == T0 + 120
    assert found.attempts[0].exit_code == 75


def test_the_json_has_the_promised_names(story):
    story.attempt(1, fresh(), ended(3, "done", "done", 0)).checkpoint(3)
    record = json.loads(json.dumps(story.status().to_json()))
    assert {
        "run_id",
        "name",
        "state",
        "step",
        "attempts",
        "steps_lost",
        "checkpoints",
        "newest",
    } <= record.keys()
    assert record["attempts"][0].keys() >= {
        "attempt", "job_id", "restart_count", "world_size", "node_type", "nodes", "cause", "evidence", "decision",
        "started", "ended", "first_step", "last_step", "steps_lost", "exit_code",
    }  # fmt: skip


def test_a_killed_attempt_lost_what_its_successor_did_again(story):
    """Kill -9: no last word; how far it got is in the metrics, whose step counts from 0."""
    story.attempt(
        1, fresh(), {"event": "progress", "step": 40}, torn='{"t": 17', metrics={0: [50, 51], 1: [52]}
    )
    story.attempt(2, restored(30), ended(60, "done", "done", 0))
    first, second = story.status().attempts
    assert (first.cause, first.last_step, first.steps_lost, first.decision) == ("unknown", 53, 23, None)
    assert first.ended == T0 + 110
    assert second.steps_lost == 0
    assert story.status().steps_lost == 23


def test_what_a_killed_attempt_lost_is_told_before_anything_has_gone_on(story):
    story.attempt(1, fresh(), {"event": "progress", "step": 40}).checkpoint(30)
    assert [a.steps_lost for a in story.status(T0 + 200).attempts] == [0], "it may live"
    assert [a.steps_lost for a in story.status(T0 + 9e4).attempts] == [10]
    story.attempt(2, {"event": "begun"})
    assert [a.steps_lost for a in story.status(T0 + 9e4).attempts] == [10, 0]


def test_an_attempt_that_died_before_it_restored_loses_nothing_and_hides_nothing(story):
    story.attempt(1, fresh(), {"event": "progress", "step": 40})
    story.attempt(2, {"event": "begun"})
    story.attempt(3, restored(30), ended(60, "done", "done", 0))
    attempts = story.status().attempts
    assert [a.steps_lost for a in attempts] == [10, 0, 0]
    assert (attempts[1].first_step, attempts[1].last_step) == (None, None)


def test_an_attempt_that_left_before_it_restored_counted_from_nowhere(story):
    story.attempt(1, fresh(), ended(300, "time_limit")).checkpoint(300)
    story.attempt(2, {"event": "begun"}, {"event": "stop_agreed", "step": 0}, ended(0, "time_limit"))
    found = story.status()
    assert found.attempts[-1].last_step is None
    assert (found.step, found.steps_lost) == (300, 0)


def test_a_stop_without_a_last_word_keeps_its_cause(story):
    story.attempt(
        1, fresh(), {"event": "stop_requested", "cause": "time_limit", "signal": "SIGUSR2", "evidence": "e"}
    )
    story.attempt(2, fresh())
    first = story.status().attempts[0]
    assert (first.cause, first.evidence) == ("time_limit", "e")


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (ended(3, "done", "done", 0), "done"),
        (ended(3, "cancel", "stop", 1), "cancelled"),
        (ended(3, "no_progress", "stop", 1), "failed"),
        (ended(3, "crash", "stop", 1), "failed"),
    ],
)
def test_the_last_word_decides(story, event, state):
    assert story.attempt(1, fresh(), event).job("COMPLETED").status().state == state


@pytest.mark.parametrize(
    ("job", "fields", "state"),
    [
        ("RUNNING", {}, "running"),
        ("COMPLETING", {}, "running"),
        ("PENDING", {"restarts": 1}, "waiting"),
        ("FAILED", {"why": "rank 0 failed with exit code 1"}, "failed"),
        ("CANCELLED", {}, "cancelled"),
        ("RUNNING", {"controller_ticks": 1}, "interrupted"),
    ],
)
def test_without_a_last_word_the_embedded_schedulers_job_decides(story, job, fields, state):
    found = story.attempt(1, fresh(), {"event": "progress", "step": 7}).job(job, **fields).status()
    assert (found.state, found.step) == (state, 7)
    alive = state == "running"
    assert (found.attempts[0].cause is None) == alive
    assert (found.attempts[0].ended is None) == alive


def test_a_job_between_two_attempts(story):
    story.attempt(1, fresh(), ended(3, "time_limit"))
    assert story.job("PENDING", restarts=1).status().state == "waiting"
    assert story.job("RUNNING", restarts=1).status().state == "running"


def test_an_attempt_that_was_killed_is_over_when_the_next_is_starting(story):
    found = story.attempt(1, fresh(), {"event": "progress", "step": 7}).job("RUNNING", restarts=1).status()
    assert (found.state, found.attempts[0].cause) == ("running", "unknown")


def test_before_the_first_attempt(story):
    assert story.status().state == "waiting"
    assert story.job("RUNNING").status().state == "running"
    assert story.job("FAILED", why="no such program").status().why == "no such program"


def test_an_attempt_that_has_not_said_yet_who_it_is_has_not_ended(story):
    story.attempt(1, fresh(), ended(3, "done", "done", 0)).job("RUNNING", restarts=0)
    story.run.attempt(2).mkdir()
    found = story.status()
    assert (found.state, found.attempts[1].cause) == ("running", None)


def test_under_slurm_a_continued_run_waits_and_a_silent_one_is_interrupted(story):
    story.attempt(1, fresh(), ended(3, "time_limit"), kind="slurm")
    assert story.status().state == "waiting"
    story.attempt(2, restored(3), {"event": "progress", "step": 7}, kind="slurm")
    assert story.status(now=T0 + 300).state == "running"
    late = story.status(now=T0 + 90_000)
    assert (late.state, late.attempts[1].cause) == ("interrupted", "unknown")
    assert "s old" in late.why


def test_a_plain_process_is_looked_up(story):
    here = {"kind": "plain", "nodes": [os.uname().nodename]}
    story.attempt(1, fresh(), rendezvous=f"plain-{os.getpid()}", **here)
    assert story.status(now=T0 + 90_000).state == "running"
    story.attempt(2, fresh(), rendezvous="plain-999999999", **here)
    assert story.status(now=T0 + 201).state == "interrupted"
    story.attempt(3, fresh(), ended(5, "signal"), rendezvous="plain-999999999", **here)
    found = story.status()
    assert (found.state, "start it again" in found.why) == ("interrupted", True)
    assert status_table(story.checkpoint(5).status()).note.endswith("start it again; it goes on from step 5")


def test_damage_does_not_hide_the_rest(story):
    story.attempt(1, fresh(), ended(3, "time_limit"))
    story.attempt(2, restored(3), ended(9, "done", "done", 0))
    (story.run.attempt(1) / "attempt.json").write_text("{torn")
    (story.run.attempt(1) / "events.jsonl").unlink()
    first, second = story.status().attempts
    assert (first.world_size, first.cause, first.last_step) == (None, "unknown", None)
    assert second.last_step == 9


def test_no_run_directory(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no run directory"):
        status(tmp_path)


def test_the_table_reads_well(story):
    story.attempt(1, fresh(), {"event": "progress", "step": 40})
    story.attempt(2, restored(30), ended(31, "preemption"), node_type=None, world_size=1)
    story.attempt(3, restored(31), kind="slurm")
    lines = status_table(story.status(now=T0 + 400), now_s=T0 + 400).lines()
    assert (
        lines
        == [
            "gpt: running at step 31, 3 attempts, 10 steps lost",
            "attempt  node type  ranks  steps    ended by   lost        took",
            "      1  pair           2  0 → 40   killed       10      10.0 s",
            "      2  n1             1  30 → 31  preempted     0      10.0 s",
            "      3  pair           2  31 → 31  running       0  1 min 40 s",
        ]
        or lines
    )


def test_the_table_says_why_when_it_is_over_early(story):
    story.attempt(1, fresh(), ended(3, "no_progress", "stop", 1, why="no progress in 3 attempts"))
    table = status_table(story.status())
    assert table.note == "no progress in 3 attempts"
    assert "1 attempt," in table.title
    assert "<td>no progress</td>" in table.html()


def test_sentences_differ_when_an_attempt_ends(story):
    story.attempt(1, fresh(), {"event": "progress", "step": 4}).job("RUNNING")
    (began,) = story.status().attempts
    assert attempt_sentence(began) == "attempt 1 on pair, 2 ranks: began"
    (over,) = story.job("CANCELLED").status().attempts
    assert attempt_sentence(over) == "attempt 1 on pair, 2 ranks: step 0 → 4, killed"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.96, "10.0 s"),
        (42.4, "42 s"),
        (60, "1 min 00 s"),
        (3700, "1 h 01 min"),
        (90000, "1 d 01 h"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (3e15, "3.0 PB")]
)
def test_sizes(size, text):
    assert size_text(size) == text


def test_what_a_person_sets_aside_is_not_lost(story):
    """The attempt had done 53 steps and saved 50 when it was killed; then it was rolled back to 20."""
    story.attempt(1, fresh(), {"event": "progress", "step": 53}).checkpoint(20).checkpoint(50)
    done = Rollback(
        number=1, to="0000000020-0123abcd", set_aside=("0000000050-0123abcd",), kept=(), after=1, why="it diverged",
        who="ada", when=T0,
    )  # fmt: skip
    (story.run.root / "rollbacks").mkdir()
    (story.run.root / "rollbacks/0001.json").write_bytes(done.to_bytes())
    found = story.status()
    assert (found.state, found.step, found.newest) == ("interrupted", 20, "0000000020-0123abcd")
    assert found.why == "rolled back from step 50 to step 20 by ada: it diverged; start or submit it again"
    assert found.branching == ("rolled back from step 50 to step 20 by ada: it diverged",)
    story.attempt(2, restored(20), ended(60, "done", "done", 0)).checkpoint(60)
    found = story.status()
    assert (found.state, found.step, found.steps_lost) == ("done", 60, 3)
    assert status_table(found).note == found.branching[0]
