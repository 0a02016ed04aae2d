"""How long is left, and what guards the end."""

import signal
import threading
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from hpc_resume.run import stopping
from hpc_resume.run.stopping import Stopping
from hpc_resume.scheduler.base import JobFacts
from hpc_resume.scheduler.cause import DEADLINE, Cause
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.signals import WATCHED


class Told:
    """A scheduler that says what it is told to."""

    def __init__(self, **facts):
        self.facts = lambda: JobFacts(evidence="told", **facts)


def stopped(rank=0, *, now_s=1000.0, ask=True, given_up=None, words=None, **facts):
    words = (
        words
        if words is not None
        else {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "1",
            "SUBMITIT_LOCAL_NTASKS": "2",
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }
    )
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
    each = stopped(ask=False, state="RUNNING", end_time_s=1060.0)
    each._heard()
    each._look_into({"signal": "SIGUSR2", "rank": 0})
    assert each.reached() == 60.0
    step, longer, end = started
    assert (step.interval, longer.interval, end.interval) == (1000.0, 56.0, 60.0)
    assert step.finished.is_set()  # cancelled
    assert longer.finished.is_set()
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


def test_without_a_known_end_no_watchdog_is_needed(monkeypatch):
    started = never_started(monkeypatch)
    each = stopped(state="COMPLETING")
    each._heard()
    assert each.reached() is None
    assert len(started) == 1
    assert started[0].finished.is_set()
    each._heard()  # too late
    assert len(started) == 1


def test_who_leaves_without_the_others_does_not_wait_for_a_signal_that_gives_up(monkeypatch):
    """The signal's thread waits out rank 0's head start; the main thread has its own way out."""
    monkeypatch.setattr(stopping, "_ABANDON_S", 0.01)
    before = {number: signal.getsignal(number) for number in WATCHED}
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
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("last_word", [False, True])
@pytest.mark.parametrize("prompt", [False, True], ids=["no job", "a notebook inside a job"])
def test_whoever_goes_on_in_the_same_process_can_interrupt_it(monkeypatch, prompt, last_word):
    if prompt:
        monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    before = {number: signal.getsignal(number) for number in WATCHED}
    each = stopped(ask=False, state="RUNNING", **({} if prompt else {"words": {}}))
    each.watch()
    assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    each.close(last_word=last_word)
    assert {number: signal.getsignal(number) for number in WATCHED} == before


class FakePeers:
    """What all ranks of an attempt share."""

    def __init__(self):
        self.store = dist.HashStore()

    def apart(self):
        return self


def waiting(monkeypatch, rank=0, *, peers=None, signal="SIGUSR2", given_up=None, **facts):
    """A rank that has heard of a request to stop, and the timers that it has set."""
    monkeypatch.setattr(stopping.time, "monotonic", lambda: 500.0)
    timers = never_started(monkeypatch)
    each = stopped(rank, ask=False, given_up=given_up, **facts)
    each._peers = peers
    each._heard()
    if rank == 0:
        each._look_into({"signal": signal, "rank": 0})
    return each, timers


def later(monkeypatch, monotonic_s):
    monkeypatch.setattr(stopping.time, "monotonic", lambda: monotonic_s)


def fire(timer):
    timer.function(*timer.args)


@pytest.mark.parametrize(
    ("facts", "interval"),
    [
        # The watchdog's setting is 1000 s. Near the end of the job that end counts, sooner or later than that.
        ({"state": "RUNNING", "end_time_s": 1020.0}, 16.0),
        ({"state": "RUNNING", "end_time_s": 1090.0}, 86.0),
        ({"state": "RUNNING", "end_time_s": 3000.0, "preempt_time_s": 1000.0}, 1996.0),
        ({"state": "RUNNING", "end_time_s": 90000.0}, 1000.0),  # by hand: what hangs shall not hang on
        ({"state": "RUNNING"}, 1000.0),
        ({"state": "COMPLETING", "reason": "TimeLimit", "end_time_s": 1000.0}, 1000.0),
        ({"state": "UNKNOWN"}, 1000.0),
    ],
)
def test_how_long_a_step_boundary_is_waited_for(monkeypatch, facts, interval):
    _, timers = waiting(monkeypatch, **facts)
    assert timers[-1].interval == pytest.approx(interval)
    assert [timer.finished.is_set() for timer in timers] == [True] * (len(timers) - 1) + [False]


def test_other_ranks_wait_a_little_longer_than_rank_0(monkeypatch):
    peers, given_up = FakePeers(), []
    waiting(monkeypatch, peers=peers, state="RUNNING", end_time_s=3000.0, preempt_time_s=1000.0)
    _, timers = waiting(monkeypatch, 1, peers=peers, given_up=given_up)
    later(monkeypatch, 1500.0)
    fire(timers[-1])
    assert (timers[-1].interval, given_up) == (1003.0, [])
    later(monkeypatch, 2503.0)
    fire(timers[-1])
    assert given_up == ["no step ended within 1000 s of the request to stop"]


def test_no_rank_gives_up_just_before_rank_0_says_that_it_waits_longer(monkeypatch):
    peers, given_up = FakePeers(), []
    first, ours = waiting(monkeypatch, peers=peers, given_up=given_up, state="RUNNING")
    first._agreement = SimpleNamespace(due=lambda _: False)
    later(monkeypatch, 500.0)
    own = ours[-1]
    _, timers = waiting(monkeypatch, 1, peers=peers, given_up=given_up)
    other = timers[-1]
    later(monkeypatch, 1400.0)
    first.breathe(None)
    later(monkeypatch, 1500.0)
    fire(other)  # in the same moment, and a little earlier
    other = timers[-1]
    fire(own)
    own = timers[-1]
    assert (other.interval, own.interval, given_up) == (5.0, 900.0, [])
    later(monkeypatch, 1505.0)
    fire(other)
    assert (timers[-1].interval, given_up) == (900.0, [])  # again 5 s after rank 0


def test_a_rank_that_hears_nothing_of_rank_0_waits_as_configured(monkeypatch):
    given_up = []
    _, timers = waiting(monkeypatch, 1, peers=FakePeers(), given_up=given_up)
    later(monkeypatch, 1505.0)
    fire(timers[-1])
    assert given_up


def test_a_rank_that_has_met_nobody_waits_for_nobody(monkeypatch):
    given_up = []
    _, timers = waiting(monkeypatch, 1, given_up=given_up)
    fire(timers[-1])
    assert given_up


def test_what_breathes_lives_as_long_as_the_job_goes_on(monkeypatch):
    given_up = []
    each, timers = waiting(monkeypatch, given_up=given_up, state="RUNNING", end_time_s=90000.0)
    each._agreement = SimpleNamespace(due=lambda _: False)
    later(monkeypatch, 1400.0)
    assert not each.breathe(None)
    later(monkeypatch, 1500.0)
    fire(timers[-1])
    assert (timers[-1].interval, given_up) == (900.0, [])
    later(monkeypatch, 2400.0)
    fire(timers[-1])
    assert len(given_up) == 1


def test_breathing_does_not_postpone_the_end_of_a_job(monkeypatch):
    given_up = []
    each, timers = waiting(monkeypatch, given_up=given_up, state="COMPLETING", reason="TimeLimit")
    each._agreement = SimpleNamespace(due=lambda _: False)
    later(monkeypatch, 1400.0)
    each.breathe(None)
    later(monkeypatch, 1500.0)
    fire(timers[-1])
    assert len(given_up) == 1


class FakeDeadline:
    """One that knows of a job's end and of what saves took."""

    def __init__(self, ends_at_s=1030.0, saves_s=(5.0,) * 100):
        self.ends_at_s = ends_at_s
        self.pace = SimpleNamespace(saves_s=lambda: saves_s)
        self.near = False

    def start(self):
        pass

    close = start


def test_when_no_save_fits_any_more_all_leave_or_are_made_to(monkeypatch):
    timers = never_started(monkeypatch)
    requests, given_up = [], []
    each = stopped(ask=False, given_up=given_up, state="RUNNING", end_time_s=1030.0)
    each.heed(FakeDeadline())
    each._agreement = SimpleNamespace(request=lambda kind, **_: requests.append(kind))
    each._heard()
    assert timers[-1].interval == 28.0  # the end is known before the scheduler has answered
    each._look_into({"signal": DEADLINE, "rank": 0, "why": "the numbers"})
    assert each.verdict().cause is Cause.TIME_LIMIT
    assert each.verdict().evidence.endswith("30 s before the time limit (the numbers)")
    assert timers[-1].interval == pytest.approx(23.0, abs=1.0)  # a fast save
    assert not each.leaving
    fire(timers[-1])
    assert requests == ["leave"]
    each._requested("leave", {})
    assert (each.leaving, timers[-1].interval) == (True, 10.0)
    fire(timers[-1])
    assert given_up == ["ranks are leaving without a save, and this one did not"]


def test_the_end_that_is_known_serves_where_the_scheduler_does_not_answer():
    each = stopped(ask=False, state="UNKNOWN")
    each.heed(FakeDeadline())
    each._look_into({"signal": DEADLINE, "rank": 0})
    assert each.verdict().cause is Cause.TIME_LIMIT
    assert each.left_s() == 30.0
    each.abandon()


def test_the_clock_asks_for_nothing_that_was_asked_for_before():
    requests = []
    each = stopped(ask=False, state="RUNNING")
    each._agreement = SimpleNamespace(request=lambda kind, **details: requests.append(details["signal"]))
    each.due("the numbers")
    each.pending = True
    each.due("the numbers")
    assert requests == [DEADLINE]


def test_a_save_that_is_under_way_is_no_step_that_hangs(monkeypatch):
    """As after the last step, where nothing is left to stop, or in a periodic one that waits for the one before."""
    given_up = []
    each, timers = waiting(monkeypatch, given_up=given_up, state="RUNNING")
    with each.life.while_saving():
        later(monkeypatch, 1500.0)
        fire(timers[-1])
        assert (timers[-1].interval, given_up) == (1000.0, [])
        later(monkeypatch, 2100.0)
    later(monkeypatch, 2500.0)
    fire(timers[-1])  # what follows it gets its time, too
    assert (timers[-1].interval, given_up) == (600.0, [])
    later(monkeypatch, 3100.0)
    fire(timers[-1])
    assert given_up == ["no step ended within 1e+03 s of the request to stop"]


@pytest.mark.parametrize(("saves_s", "limit_s"), [((), 3600.0), ((30.0, 50.0), 620.0)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_does_not_end_is_left(monkeypatch, rank, saves_s, limit_s):
    given_up, peers = [], FakePeers()
    each, timers = waiting(monkeypatch, rank, peers=peers, given_up=given_up, state="RUNNING")
    if rank == 0:
        each._deadline = FakeDeadline(ends_at_s=None, saves_s=saves_s)
    limit_s = limit_s if rank == 0 else 3600.0  # the others follow rank 0, which knows
    with each.life.while_saving():
        now_s = 500.0
        while not given_up:
            now_s += timers[-1].interval
            later(monkeypatch, now_s)
            fire(timers[-1])
    assert now_s - 500.0 == pytest.approx(max(limit_s, 1000.0))
    assert given_up == ["the save that was under way did not end in time"]


def test_a_save_that_began_before_the_warning_has_the_time_until_the_end(monkeypatch):
    """A usual one takes 100 s. Five seconds into the last one the warning comes, 120 s before the end."""
    requests, given_up, now = [], [], SimpleNamespace(s=1000.0)
    timers = never_started(monkeypatch)
    each = stopped(ask=False, given_up=given_up, state="RUNNING", end_time_s=1120.0)
    each._clock = lambda: now.s
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now.s)
    each.heed(FakeDeadline(ends_at_s=1120.0, saves_s=(100.0,) * 20))
    each._agreement = SimpleNamespace(request=lambda kind, **_: requests.append(kind))
    now.s = 995.0
    with each.life.while_saving():
        now.s = 1000.0
        each._heard()
        each._look_into({"signal": DEADLINE, "rank": 0})
        while now.s + timers[-1].interval < 1118.0 - 1e-6:
            now.s += timers[-1].interval
            fire(timers[-1])
            assert (requests, given_up) == ([], [])
        assert now.s > 1100.0
    fire(timers[-1])
    assert requests == ["leave"]  # it is over, and no other one fits


def test_a_save_that_began_too_late_gets_its_chance(monkeypatch):
    given_up, now = [], SimpleNamespace(s=1000.0)
    timers = never_started(monkeypatch)
    each = stopped(ask=False, given_up=given_up, state="RUNNING", end_time_s=1005.0)
    each._clock = lambda: now.s
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now.s)
    each._agreement = SimpleNamespace(request=lambda *_, **__: None)
    each.heed(FakeDeadline(ends_at_s=1005.0))
    with each.life.while_saving():
        each._heard()
        each._look_into({"signal": DEADLINE, "rank": 0})
        while not given_up:
            now.s += timers[-1].interval
            fire(timers[-1])
    assert now.s == pytest.approx(1010.0)
    assert given_up == ["the save that was under way did not end in time"]
