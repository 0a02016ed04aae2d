import json

import pytest

from hpc_resume.report.explain import explain
from hpc_resume.scheduler.base import JobFacts
from tests.report.test_status import T0, Story, ended, fresh, restored

SLURM = {"kind": "slurm", "job_id": "12"}


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path / "run")


def tell(story, *, now=T0 + 1000, state="UNKNOWN", **facts):
    def look_up(job_id):
        assert job_id == "12"
        return JobFacts(state=state, evidence="there is no scontrol here", **facts)

    return explain(story.run.root, clock=lambda: now, look_up=look_up)


def last_word(step, cause, decision="continue", **fields):
    return {
        **ended(step, cause, decision, 75 if decision == "continue" else 1),
        "evidence": f"facts of {cause}", "because": "it has saved something new", **fields,
    }  # fmt: skip


def met(**ranks):
    return {"event": "met", "ranks": ranks}


def test_an_attempt_says_where_how_far_why_and_what_next(story):
    story.attempt(
        1, met(big1=[0, 1], big2=[2, 3]), fresh(),
        last_word(120, "crash", delay_s=41.2, exclude=["big2"], move_on=True, because="big2 is avoided"),
        **SLURM,
    )  # fmt: skip
    story.attempt(2, restored(110), ended(200, "done", "done", 0), **SLURM)
    first, second = tell(story).attempts
    assert first.title.startswith("attempt 1: began 2023-11-1")
    assert first.title.endswith(", took 20 s")
    assert first.lines == (
        "2 ranks on big1, big2 (pair), job 12",
        "from step 0 to step 120, of which the next attempt did 10 again",
        "ended by a rank that crashed",
        "as told by: facts of crash",
        "decided to go on after 41 s without big2 on the next node type: big2 is avoided",
    )
    assert second.lines == (
        "2 ranks on n1 (pair), job 12, restart 1",
        "from step 110 to step 200",
        "ended by itself: all steps are done",
    )


def test_what_was_found_out_afterwards_counts_more(story):
    story.attempt(1, met(n1=[0, 1]), fresh(), {"event": "progress", "step": 40})
    diagnosed = {"event": "diagnosed", "attempt": 1, "cause": "node_failure", "evidence": "n1 is down"}
    story.attempt(2, diagnosed, restored(30), ended(60, "done", "done", 0))
    assert tell(story).attempts[0].lines[2:] == (
        "ended by a node that failed",
        "as told by: n1 is down",
        "found out by attempt 2",
        "decided nothing: it had no time for a last word; what was saved by then is what the next one goes on from",
    )


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("time_limit", "its time limit"),
        ("preemption", "a preemption"),
        ("requeue", "an administrator"),
        ("out_of_memory", "a lack of memory"),
        ("hang", "a hang"),
        ("no_progress", "made no progress"),
        ("unknown", "something unknown"),
        ("a later version's", "a later version's"),
    ],
)
def test_each_cause_in_words(story, cause, words):
    story.attempt(1, fresh(), last_word(3, cause))
    assert words in tell(story).attempts[0].lines[2]


def test_done(story):
    story.attempt(1, fresh(), ended(3, "done", "done", 0))
    assert tell(story).outlook.title == "gpt is done"
    assert tell(story).outlook.lines == ("nothing is left to do",)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"state": "PENDING", "reason": "BeginTime"},
            "job 12 is in the queue (BeginTime); it begins by itself",
        ),
        ({"state": "RUNNING"}, "job 12 is RUNNING"),
        ({"state": "FAILED"}, "job 12 is FAILED, so nothing continues it: submit it again"),
        ({"state": "UNKNOWN"}, "if squeue does not show it, submit it again"),
    ],
)
def test_a_run_of_slurm_that_waits(story, facts, words):
    story.attempt(1, fresh(), last_word(3, "time_limit"), **SLURM).checkpoint(3)
    found = tell(story, **facts).outlook
    assert found.title == "gpt is waiting for its next attempt"
    assert words in "\n".join(found.lines)
    assert "it goes on from step 3 (0000000003-0123abcd)" in found.lines[-1]


def test_what_a_person_has_to_do(story):
    story.attempt(1, fresh(), last_word(3, "cancel", "stop", because="a cancel is for good"))
    assert (
        "submit it again: no checkpoint is there to go on from, so it begins anew"
        in tell(story).outlook.lines[0]
    )
    story.attempt(2, fresh(), last_word(3, "crash", "stop", why="no progress in 3 attempts")).checkpoint(2)
    found = tell(story).outlook
    assert found.title == "gpt is stopped"
    assert found.lines == (
        "no progress in 3 attempts",
        "when it is mended, submit it again: it goes on from step 2 (0000000002-0123abcd)",
    )
    story.attempt(3, fresh(), last_word(3, "signal"), kind="plain", job_id=None)
    assert "nobody continues it by itself" in tell(story).outlook.lines[0]


def test_while_it_runs_nothing_has_ended_it(story):
    story.attempt(1, fresh(), {"event": "progress", "step": 7}).job("RUNNING")
    found = tell(story, now=T0 + 200)
    assert found.attempts[0].title.endswith(", runs for 1 min 40 s")
    assert found.attempts[0].lines[1:] == ("from step 0 to step 7",)
    assert found.outlook.title == "gpt is running"
    assert "waits" not in repr(found)


def test_before_the_first_attempt(story):
    assert tell(story).attempts == ()
    assert "it begins by itself, and no checkpoint is there" in tell(story).outlook.lines[0]


def test_text_and_html_and_json(story):
    story.attempt(1, fresh(), last_word(3, "crash", "stop", evidence="<b>\x1b[2J\nnext\n"))
    found = tell(story)
    assert "    as told by: <b>\\x1b[2J | next" in repr(found).splitlines()
    assert "&lt;b&gt;" in found._repr_html_()
    record = json.loads(json.dumps(found.to_json()))
    assert record["state"] == "failed"
    assert record["attempts"][0]["cause"] == "crash"
    assert record["attempts"][0]["told"][2] == "ended by a rank that crashed"
    assert record["next"][-1].startswith("when it is mended")


def test_what_is_made_up_is_told_as_far_as_it_makes_sense(story):
    story.attempt(
        1, {"event": "met", "ranks": 7}, fresh(),
        {"event": "ended", "cause": "crash", "decision": "continue", "delay_s": "x", "exclude": 5, "move_on": 1},
    )  # fmt: skip
    story.attempt(2, {"event": "diagnosed", "attempt": [], "cause": 1})
    assert tell(story).attempts[0].lines[-1] == "decided to go on"


def test_what_an_attempt_found_is_told_in_numbers_that_can_be_read(story):
    jump = {
        "event": "norm_jumped",
        "step": 80,
        "module": "model",
        "norm": 0.0034688181,
        "before": 15.650607597,
    }
    story.attempt(1, fresh(), jump, last_word(90, "signal")).checkpoint(90)
    lines = explain(story.run.root).attempts[0].lines
    assert "at step 80 the norm of model was 0.003469, after 15.65 before; look at the loss" in lines
    story.attempt(2, fresh(), {"event": "norm_jumped", "norm": "x"}, last_word(90, "signal"))
    assert (
        "at step ? the norm of ? was x, after ? before; look at the loss"
        in explain(story.run.root).attempts[1].lines
    )
