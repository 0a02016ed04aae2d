"""When our own clock asks for a stop."""

import dataclasses

import pytest

from hpc_resume.policy.deadline import LAST_WORD_S
from hpc_resume.run.deadline import Deadline, Pace, assumed_end_s
from hpc_resume.scheduler.base import JobFacts
from hpc_resume.scheduler.environment import JobEnvironment


@dataclasses.dataclass
class FakeSaver:
    saves_s: tuple = ()
    held_at_s: float = 1000.0


class World:
    """A clock, a scheduler and a saver that say what they are told to, and a deadline that watches them."""

    def __init__(self, *, assumed_end_s=None, **facts):
        self.now_s = 1000.0
        self.asked = 0
        self.told = facts
        self.saver = FakeSaver()
        self.requests = []
        self.noted = []
        self.pace = Pace(self.saver, warning_lead_s=30.0, clock=lambda: self.now_s)
        self.deadline = Deadline(
            self,
            self.pace,
            self.requests.append,
            lambda event, **fields: self.noted.append((event, fields["ends_at_s"])),
            lambda: self.now_s,
            assumed_end_s,
        )

    def facts(self):
        self.asked += 1
        return JobFacts(evidence="told", **self.told)

    def step(self, seconds):
        self.pace.step_begins()
        self.now_s += seconds
        self.pace.step_ends()

    def run(self, until_s=10_000.0):
        """Look as often as it wants, until it has nothing to look for; the time at which that was."""
        while (wait_s := self.deadline.look()) is not None and self.now_s < until_s:
            self.now_s += wait_s
        return self.now_s


def test_a_stop_is_asked_for_once_at_the_planned_lead():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(2.0)
    world.saver.saves_s = (5.0,) * 5
    lead_s = world.pace.plan_stop(1600.0).lead_s
    assert world.run() == pytest.approx(1600.0 - lead_s, abs=1e-6)
    (why,) = world.requests
    assert why.startswith(f"{lead_s:.1f} s before the end of the job; a save 5 s (sigma ")
    assert world.noted == [("end_of_job", 1600.0)]


def test_what_is_measured_meanwhile_changes_the_plan():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(1.0)
    world.run(until_s=1300.0)
    world.saver.saves_s = (100.0,) * 5
    world.saver.held_at_s = 1300.0
    assert world.run() == pytest.approx(1600.0 - world.pace.plan_stop(1600.0).lead_s, abs=1e-6)
    assert world.now_s < 1500.0


def test_without_a_step_the_end_is_waited_for():
    world = World(state="RUNNING", end_time_s=1600.0)
    assert world.run() == pytest.approx(1600.0 - LAST_WORD_S)


def test_the_scheduler_is_asked_at_the_start_and_just_before_the_stop():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(1.0)
    world.run()
    assert world.asked == 2


def test_a_job_that_was_given_more_time_uses_it():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(1.0)
    world.run(until_s=1400.0)
    world.told["end_time_s"] = 5000.0
    assert world.run() > 4900.0
    assert world.noted == [("end_of_job", 1600.0), ("end_of_job", 5000.0)]
    assert len(world.requests) == 1


def test_a_job_without_an_end_is_not_watched():
    world = World(state="RUNNING")
    assert world.deadline.look() is None
    assert world.asked == 1


def test_a_job_that_is_being_ended_shows_the_present_as_its_end():
    world = World(state="COMPLETING", end_time_s=1000.0)
    assert world.deadline.look() is None
    assert world.deadline.ends_at_s is None


def test_a_scheduler_that_does_not_answer_is_asked_again():
    world = World(state="UNKNOWN")
    assert world.deadline.look() == 60.0
    world.now_s += 60.0
    world.told = {"state": "RUNNING", "end_time_s": 1600.0}
    world.run()
    assert len(world.requests) == 1


def test_what_was_known_holds_where_the_scheduler_does_not_answer_any_more():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.deadline.look()
    world.told = {"state": "UNKNOWN"}
    assert world.run() == pytest.approx(1600.0 - LAST_WORD_S)


def test_an_assumed_end_serves_until_the_scheduler_says_a_better_one():
    world = World(state="UNKNOWN", assumed_end_s=1500.0)
    world.deadline.look()
    assert world.deadline.ends_at_s == 1500.0
    world.now_s += 100.0
    world.told = {"state": "RUNNING", "end_time_s": 1450.0}
    world.run()
    assert world.deadline.ends_at_s == 1450.0


def test_near_the_stop_no_periodic_save_is_wanted():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(1.0)
    world.saver.saves_s = (5.0,) * 5
    plan = world.pace.plan_stop(1600.0)
    world.deadline.look()
    assert not world.deadline.near
    world.now_s = 1600.0 - plan.lead_s - plan.quiet_s + 0.01
    world.deadline.look()
    assert world.deadline.near
    assert world.requests == []


def test_a_step_that_got_no_batch_does_not_count():
    world = World(state="RUNNING", end_time_s=1600.0)
    world.step(2.0)
    world.step(2.0)
    world.pace.step_begins()
    world.now_s += 1000.0
    world.pace.step_ends(counts=False)
    world.pace.step_ends()
    assert world.pace.plan_stop(1600.0).why.endswith("; a step 2 s")


@pytest.mark.parametrize(
    ("environ", "limit_s", "end_s"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1234"}, 600.0, 1234.0),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "Unknown"}, 600.0, 1600.0),
        ({"SLURM_JOB_ID": "1"}, None, None),
        ({}, 600.0, None),  # nobody ends it, and nobody would start it again
    ],
)
def test_the_end_of_a_job_of_slurm_where_it_can_not_be_asked(environ, limit_s, end_s):
    environment = JobEnvironment.detect(environ, hostname="n1", pid=1)
    assert assumed_end_s(environment, environ, 1000.0, limit_s) == end_s
