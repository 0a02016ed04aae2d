"""The embedded scheduler's waiting list, with controllers that are no processes."""

import os

import pytest

from hpc_resume.launch.attempt import Allocation, Times
from hpc_resume.launch.controller import Plan, initial_state
from hpc_resume.launch.waitlist import Waitlist
from hpc_resume.scheduler.local import LocalState, cancel_path


class World:
    """Controllers that end after a number of rounds; notes who runs together."""

    def __init__(self, rounds=3, code=0, takes_over=True):
        self.rounds, self.code, self.takes_over = rounds, code, takes_over
        self.running, self.together, self.started = {}, [], []
        self.each_round = lambda: None

    def start(self, plan):
        self.started.append(plan.job_id)
        self.running[plan.job_id] = self.rounds
        return Controller(self, plan)

    def sleep(self, seconds):
        assert seconds > 0
        self.together.append(len([left for left in self.running.values() if left > 0]))
        self.running = {job: left - 1 for job, left in self.running.items()}
        self.each_round()


class Controller:
    def __init__(self, world, plan):
        self.world, self.plan = world, plan
        if world.takes_over:
            initial_state(plan, pid=1).write(plan.state_path)

    def poll(self):
        return None if self.world.running[self.plan.job_id] > 0 else self.world.code


@pytest.fixture
def plans(tmp_path):
    return [
        Plan(
            job_id=f"j_{number}", folder=str(tmp_path), run_dir=str(tmp_path), command=("a",), variables={},
            max_idle=3, allocations=(Allocation(name="x", ranks=1),),
            times=Times(warning_lead_s=0.0, warning_signal="USR2", kill_wait_s=1.0),
        )
        for number in range(5)
    ]  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_so_many_run_at_once_and_in_turn(plans, at_once):
    world = World()
    Waitlist(plans, at_once=at_once, start=world.start, sleep=world.sleep).run()
    assert world.started == [plan.job_id for plan in plans]
    assert max(world.together) == min(at_once, 5)


def test_who_waits_is_pending_and_alive(plans):
    Waitlist(plans, at_once=1, start=None, sleep=None)
    states = [LocalState.read(plan.state_path) for plan in plans]
    assert {(state.state, state.controller_pid, state.alive()) for state in states} == {
        ("PENDING", os.getpid(), True)
    }


def test_one_that_is_cancelled_while_it_waits_never_begins(plans, tmp_path):
    world = World()
    world.each_round = lambda: cancel_path(tmp_path, "j_3").touch()
    Waitlist(plans, at_once=2, start=world.start, sleep=world.sleep).run()
    assert world.started == ["j_0", "j_1", "j_2", "j_4"]
    state = LocalState.read(plans[3].state_path)
    assert (state.state, state.why) == ("CANCELLED", "cancelled before it began")


def test_a_controller_that_does_not_come_up_is_a_failure(plans):
    world = World(takes_over=False, code=1)
    Waitlist(plans, at_once=5, start=world.start, sleep=world.sleep).run()
    states = [LocalState.read(plan.state_path) for plan in plans]
    assert {(state.state, state.why) for state in states} == {
        ("FAILED", "embedded scheduler: it did not start (exit code 1)")
    }
