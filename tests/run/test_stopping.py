"""How long is left, and what guards the end."""

import signal
import threading

import pytest

from hpc_resume.run import stopping
from hpc_resume.run.stopping import Stopping
from hpc_resume.scheduler.base import JobFacts
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.signals import WATCHED


class Told:
    """A scheduler that says what it is told to."""

    def __init__(self, **facts):
        self.facts = lambda: JobFacts(evidence="told", **facts)


def stopped(rank=0, *, now_s=1000.0, ask=True, given_up=None, **facts):
    words = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "1",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
    }
    each = Stopping(
        JobEnvironment.detect(words, hostname="n1", pid=1),
        Told(**facts),
        warning_lead_s=60.0,
        agreement_s=1.0,
        watchdog_s=1000.0,
        clock=lambda: now_s,
        give_up=lambda verdict, reason: given_up.append(reason),
    )
    if ask:
        each._judge({"signal": "SIGUSR2", "rank": 0})
    return each


def never_started(monkeypatch):
    """Collect timers instead of starting them."""
    timers = []

    def start(self):
        timers.append(self)

    monkeypatch.setattr(threading.Timer, "start", start)
    return timers


@pytest.mark.parametrize(
    ("facts", "left_s"),
    [
        ({"state": "RUNNING", "end_time_s": 1060.0}, 60.0),
        ({"state": "SIGNALING", "end_time_s": 1060.0}, 60.0),
        ({"state": "RUNNING", "end_time_s": 990.0}, 0.0),
        ({"state": "RUNNING"}, None),
        (
            {"state": "COMPLETING", "end_time_s": 1000.0},
            None,
        ),  # that is when the end began, not when it comes
        ({"state": "UNKNOWN", "end_time_s": None}, None),
    ],
)
def test_what_is_left_is_what_the_scheduler_says_of_a_living_job(facts, left_s):
    assert stopped(**facts).left_s() == left_s


def test_other_ranks_do_not_wait_for_what_only_rank_0_knows(monkeypatch):
    monkeypatch.setattr(stopping, "_FACTS_S", 1000.0)
    assert stopped(rank=1, ask=False, state="RUNNING", end_time_s=1060.0).left_s() is None


def test_without_an_answer_in_time_nothing_is_known(monkeypatch):
    monkeypatch.setattr(stopping, "_FACTS_S", 0.0)
    assert stopped(ask=False, state="RUNNING", end_time_s=1060.0).left_s() is None


def test_the_watchdog_of_the_step_gives_way_to_one_of_the_end(monkeypatch):
    started = never_started(monkeypatch)
    each = stopped(state="RUNNING", end_time_s=1060.0)
    each._start_watchdog()
    assert each.reached() == 60.0
    step, end = started
    assert (step.interval, end.interval) == (1000.0, 60.0)
    assert step.finished.is_set()  # cancelled
    assert "was not committed before the end of the job" in end.args[0]
    each.abandon()
    assert end.finished.is_set()


def test_a_save_gets_its_chance_whatever_the_clock_says(monkeypatch):
    started, given_up = never_started(monkeypatch), []
    each = stopped(state="RUNNING", end_time_s=1001.0, given_up=given_up)
    assert each.reached() == 1.0
    assert started[-1].interval == 10.0
    started[-1].function(*started[-1].args)
    assert given_up == ["the last checkpoint was not committed before the end of the job"]


def test_without_a_known_end_no_watchdog_is_needed():
    each = stopped(state="COMPLETING")
    each._start_watchdog()
    first = each._watchdog
    assert each.reached() is None
    assert each._watchdog is first
    assert first.finished.is_set()


def test_who_leaves_without_the_others_does_not_wait_for_a_signal_that_gives_up(monkeypatch):
    """The signal's thread waits out rank 0's head start; the main thread has its own way out."""
    monkeypatch.setattr(stopping, "_ABANDON_S", 0.01)
    came, go_on = threading.Event(), threading.Event()
    each = stopped(rank=1, ask=False)

    def give_up(name):
        came.set()
        go_on.wait()

    each._watch._on_signal = give_up
    each.watch()
    thread = each._watch._thread
    signal.raise_signal(signal.SIGUSR2)
    assert came.wait(60)
    each.abandon(last_word=True)
    assert thread.is_alive()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    for number in WATCHED:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
