"""The controller's state machine, on a clock that moves when someone sleeps: no test waits."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from hpc_resume.journal import write_line
from hpc_resume.launch.attempt import Allocation, Times
from hpc_resume.launch.controller import Controller, Plan
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.local import LocalState, process_ticks

CONT, TERM, KILL, USR2 = signal.SIGCONT, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2


class World:
    """Time, and the ranks that were ever started."""

    def __init__(self):
        self.now = 1000.0
        self.ranks = []
        self.plans = []
        self.events = []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()

    def at(self, seconds, call):
        self.events.append((1000.0 + seconds, call))


class Rank:
    """Ends by itself after ``(seconds, code)``, and after a signal as ``on`` says: (delay, code), or not at all."""

    def __init__(self, *, ends=(1e9, 0), on=None):
        self.ends, self.on = ends, {KILL: (0, -9), **(on or {})}

    def start(self, world, state_path, variables):
        self.world, self.state_path, self.variables = world, state_path, variables
        self.began = world.now
        self.end, self.code = world.now + self.ends[0], self.ends[1]
        self.signals = []
        return self

    def poll(self):
        return self.code if self.world.now >= self.end else None

    def send(self, number):
        seen = LocalState.read(self.state_path)
        self.signals.append((round(self.world.now - self.began, 1), number, seen))
        if number in self.on and self.poll() is None:
            delay, code = self.on[number]
            if self.world.now + delay < self.end:
                self.end, self.code = self.world.now + delay, code

    def got(self):
        return [(when, number) for when, number, _ in self.signals]


@pytest.fixture
def world():
    return World()


def play(tmp_path, world, *attempts, more=(), max_idle=3, in_place=0, before=None, **times):
    """Run a job whose attempts are an allocation's fields and the ranks it will have, then ``more`` ranks."""
    plan = Plan(
        job_id="j",
        folder=str(tmp_path),
        run_dir=str(tmp_path / "run"),
        command=("train",),
        allocations=tuple(
            Allocation(name=f"type{i}", ranks=len(ranks), **fields)
            for i, (fields, *ranks) in enumerate(attempts)
        ),
        times=Times(**{"warning_lead_s": 5.0, "warning_signal": "USR2", "kill_wait_s": 3.0, **times}),
        variables={"MINE": "1"},
        max_idle=max_idle,
        restarts_in_place=in_place,
    )
    waiting = [*(rank for _, *ranks in attempts for rank in ranks), *more]

    def spawn(command, variables, log_path):
        assert command == ("train",)
        rank = waiting.pop(0).start(world, plan.state_path, variables)
        rank.log_path = log_path
        world.ranks.append(rank)
        return rank

    controller = Controller(
        plan, inherited={"PATH": "/bin", "MINE": "0"}, clock=world.clock, sleep=world.sleep, spawn=spawn
    )
    if before is not None:
        before(controller)
    state = controller.run()
    assert LocalState.read(plan.state_path) == state
    return state


def test_a_job_that_finishes_is_completed(tmp_path, world):
    state = play(tmp_path, world, ({}, Rank(ends=(2, 0)), Rank(ends=(3, 0))))
    assert (state.state, state.exit_codes, state.restarts) == ("COMPLETED", (0, 0), 0)
    assert [rank.got() for rank in world.ranks] == [[], []]


def test_ranks_are_told_who_they_are(tmp_path, world):
    play(tmp_path, world, ({}, Rank(ends=(1, 75)), Rank(ends=(1, 75))), ({}, Rank(ends=(1, 0))))
    told = [
        {
            name.removeprefix("SUBMITIT_LOCAL_").removeprefix("HPC_RESUME_"): value
            for name, value in rank.variables.items()
        }
        for rank in world.ranks
    ]
    assert [(t["GLOBALID"], t["LOCALID"], t["NTASKS"], t["RESTART_COUNT"], t["NODE_TYPE"]) for t in told] == [
        ("0", "0", "2", "0", "type0"),
        ("1", "1", "2", "0", "type0"),
        ("0", "0", "1", "1", "type1"),
    ]
    assert {t["JOB_ID"] for t in told} == {"j"}
    assert {(t["PATH"], t["MINE"], t["SUBMITIT_EXECUTOR"]) for t in told} == {("/bin", "1", "local")}
    assert Path(told[0]["JOB_STATE"]) == tmp_path / "j_state.json"
    assert [rank.log_path.name for rank in world.ranks] == ["j_0_log.out", "j_1_log.out", "j_0_log.out"]
    assert int(told[0]["OMP_NUM_THREADS"]) >= 1


def test_the_last_node_type_is_given_again_and_again(tmp_path, world):
    pair, single = ({}, Rank(ends=(2, 75)), Rank(ends=(2, 75))), ({}, Rank(ends=(2, 75)))
    state = play(tmp_path, world, pair, single, more=[Rank(ends=(2, 75)), Rank(ends=(2, 0))])
    assert [rank.variables["HPC_RESUME_NODE_TYPE"] for rank in world.ranks] == ["type0"] * 2 + ["type1"] * 3
    assert (state.state, state.restarts, state.node_type) == ("COMPLETED", 3, "type1")


def test_the_time_limit_warns_ends_and_kills(tmp_path, world):
    """As Slurm: the warning, SIGTERM at the limit, SIGKILL after the wait; the state always first."""
    stubborn = Rank()
    state = play(tmp_path, world, ({"time_limit_s": 20.0}, stubborn), ({}, Rank(ends=(1, 0))))
    assert stubborn.got() == [(15.0, USR2), (15.0, CONT), (20.0, CONT), (20.0, TERM), (23.0, KILL)]
    warned, _, _, ended, _ = [seen for _, _, seen in stubborn.signals]
    assert (warned.state, warned.reason, warned.end_time) == ("RUNNING", None, 1020.0)
    assert (ended.state, ended.reason, ended.restarts) == ("COMPLETING", "TimeLimit", 0)
    assert (state.state, state.restarts, state.reason) == ("COMPLETED", 1, None)


def test_ranks_that_save_on_the_warning_are_continued_on_the_next_type(tmp_path, world):
    saves = {USR2: (1, 75)}
    state = play(
        tmp_path, world, ({"time_limit_s": 20.0}, Rank(on=saves), Rank(on=saves)), ({}, Rank(ends=(1, 0)))
    )
    assert state.restarts == 1
    assert [rank.got() for rank in world.ranks[:2]] == [[(15.0, USR2), (15.0, CONT)]] * 2


def test_no_limit_means_no_warning(tmp_path, world):
    rank = Rank(ends=(10_000, 0))
    play(tmp_path, world, ({}, rank))
    assert rank.got() == []


def test_preemption_gives_grace(tmp_path, world):
    rank = Rank()
    state = play(
        tmp_path,
        world,
        ({"preempt_after_s": 4.0, "grace_s": 6.0, "time_limit_s": 60.0}, rank),
        ({}, Rank(ends=(1, 0))),
    )
    assert rank.got() == [(4.0, CONT), (4.0, TERM), (10.0, CONT), (10.0, TERM), (13.0, KILL)]
    notice, over = rank.signals[1][2], rank.signals[3][2]
    assert notice.state == "RUNNING"
    assert notice.preempt_time == pytest.approx(1004.0, abs=0.1)
    assert notice.end_time == pytest.approx(1010.0, abs=0.1)
    assert (over.state, over.restarts) == ("COMPLETING", 1)
    assert over.preempt_time is not None
    assert (state.state, state.restarts) == ("COMPLETED", 1)


def test_preemption_without_grace_ends_at_once(tmp_path, world):
    rank = Rank(on={TERM: (0.5, 75)})
    play(tmp_path, world, ({"preempt_after_s": 4.0, "grace_s": 0.0}, rank), ({}, Rank(ends=(1, 0))))
    assert rank.got() == [(4.0, CONT), (4.0, TERM)]
    seen = rank.signals[0][2]
    assert (seen.state, seen.restarts, seen.preempt_time is not None) == ("COMPLETING", 1, True)


def test_a_person_can_preempt_once_per_attempt(tmp_path, world):
    ranks = Rank(on={TERM: (1, 75)}), Rank(ends=(5, 0))
    state = play(
        tmp_path, world, ({"grace_s": 6.0}, ranks[0]), ({"grace_s": 6.0}, ranks[1]),
        before=lambda controller: world.at(2, controller.preempt),
    )  # fmt: skip
    assert ranks[0].got() == [(2.0, CONT), (2.0, TERM)]
    assert ranks[1].got() == []
    assert state.state == "COMPLETED"


@pytest.mark.parametrize("on", [{TERM: (1, 75)}, {TERM: (1, 0)}, {TERM: (0, -15)}, {}])
def test_a_cancelled_job_is_never_continued_whatever_its_ranks_say(tmp_path, world, on):
    rank = Rank(on=on)
    state = play(tmp_path, world, ({}, rank), before=lambda controller: world.at(2, controller.cancel))
    assert rank.got()[:2] == [(2.0, CONT), (2.0, TERM)]
    seen = rank.signals[0][2]
    assert (seen.state, seen.reason, seen.restarts, seen.preempt_time) == ("COMPLETING", None, 0, None)
    assert (state.state, len(world.ranks)) == ("CANCELLED", 1)
    if not on:
        assert rank.got()[-1] == (5.0, KILL)


def test_a_cancel_in_the_grace_of_a_preemption_wins(tmp_path, world):
    rank = Rank(on={TERM: (3, 75)})
    state = play(
        tmp_path, world, ({"preempt_after_s": 2.0, "grace_s": 9.0}, rank),
        before=lambda controller: world.at(4, controller.cancel),
    )  # fmt: skip
    assert (state.state, len(world.ranks)) == ("CANCELLED", 1)
    assert rank.signals[-1][2].state == "COMPLETING"


def test_a_cancel_between_two_attempts_counts(tmp_path, world):
    state = play(
        tmp_path,
        world,
        ({}, Rank(ends=(0.2, 75))),
        before=lambda controller: world.at(0.5, controller.cancel),
    )
    assert (state.state, len(world.ranks)) == ("CANCELLED", 1)


def test_a_job_cancelled_before_it_began_starts_nothing(tmp_path, world):
    state = play(tmp_path, world, ({}, Rank()), before=lambda controller: controller.cancel())
    assert (state.state, world.ranks) == ("CANCELLED", [])


def test_one_rank_that_fails_takes_the_others_down_and_fails_the_job(tmp_path, world):
    """The code that tells is the failing rank's, not those of the ranks that were ended because of it."""
    other = Rank(on={TERM: (1, -15)})
    state = play(tmp_path, world, ({}, Rank(ends=(2, 3)), other))
    assert other.got() == [(2.0, CONT), (2.0, TERM)]
    assert (other.signals[0][2].state, other.signals[0][2].preempt_time) == ("RUNNING", None)
    assert (state.state, state.exit_codes) == ("FAILED", (3, -15))
    assert "rank 0 failed with exit code 3" in state.why


def test_one_rank_that_is_killed_takes_the_others_down_and_the_job_goes_on(tmp_path, world):
    state = play(tmp_path, world, ({}, Rank(), Rank(ends=(2, -9))), ({}, Rank(ends=(1, 0))))
    assert world.ranks[0].got() == [(2.0, CONT), (2.0, TERM), (5.0, KILL)]
    assert (state.state, state.restarts) == ("COMPLETED", 1)


def test_a_rank_that_saved_does_not_end_the_others(tmp_path, world):
    slow = Rank(ends=(9, 75))
    state = play(tmp_path, world, ({}, Rank(ends=(1, 75)), slow), ({}, Rank(ends=(1, 0))))
    assert slow.got() == []
    assert state.state == "COMPLETED"


def test_a_failure_that_the_time_limit_provoked_is_no_failure(tmp_path, world):
    rank = Rank(on={TERM: (0, 1)})
    state = play(tmp_path, world, ({"time_limit_s": 9.0}, rank), ({}, Rank(ends=(1, 0))))
    assert (state.state, state.restarts) == ("COMPLETED", 1)


def test_a_program_that_only_gets_killed_is_given_up(tmp_path, world):
    state = play(tmp_path, world, *[({}, Rank(ends=(2, -9))) for _ in range(5)], max_idle=3)
    assert (state.state, len(world.ranks)) == ("FAILED", 3)
    assert (
        "killed by signal 9 (SIGKILL); no new checkpoint in 3 attempts (budget.max_idle); the last"
        in state.why
    )
    assert "before hr.Run began" in state.why


def test_a_new_checkpoint_renews_the_budget(tmp_path, world):
    attempts = [({}, Rank(ends=(2, -9))) for _ in range(5)]
    folder = tmp_path / "run" / "checkpoints" / "0000000007-0123abcd"
    world.at(3, lambda: folder.mkdir(parents=True))  # during the second attempt
    state = play(tmp_path, world, *attempts, max_idle=3)
    assert (state.state, len(world.ranks)) == ("FAILED", 5)


def test_exit_code_75_is_trusted(tmp_path, world):
    attempts = [({}, Rank(ends=(2, 75))) for _ in range(9)]
    assert play(tmp_path, world, *attempts, ({}, Rank(ends=(1, 0))), max_idle=2).state == "COMPLETED"


def test_a_program_that_asks_at_once_to_be_continued_does_not_take_the_machine(tmp_path, world):
    attempts = [({}, Rank(ends=(0, 75))) for _ in range(9)]
    play(tmp_path, world, *attempts, ({}, Rank(ends=(0, 0))))
    starts = [rank.began for rank in world.ranks]
    assert all(later - earlier >= 0.99 for earlier, later in itertools.pairwise(starts))


def test_results_of_an_earlier_attempt_are_removed(tmp_path, world):
    stale = [
        tmp_path / "j_0_result.pkl",
        tmp_path / "j_1_result.pkl.save_tmp",
        tmp_path / "other_0_result.pkl",
    ]
    for path in stale:
        path.touch()
    play(tmp_path, world, ({}, Rank(ends=(1, 0))))
    assert [path.exists() for path in stale] == [False, False, True]


def test_a_rank_that_can_not_be_started_fails_the_job_and_leaves_none_behind(tmp_path, world):
    class Unstartable(Rank):
        def start(self, *_):
            raise OSError("no such program")

    first = Rank()
    with pytest.raises(OSError, match="no such program"):
        play(tmp_path, world, ({}, first, Unstartable(), Rank()))
    assert first.got() == [(0.0, KILL)]
    state = LocalState.read(tmp_path / "j_state.json")
    assert state.state == "FAILED"
    assert "no such program" in state.why


def test_the_state_names_its_controller(tmp_path, world):
    state = play(tmp_path, world, ({}, Rank(ends=(1, 0))))
    assert (state.controller_pid, state.controller_ticks) == (os.getpid(), process_ticks(os.getpid()))


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan(
        job_id="j", folder="/f", run_dir="/r", command=("a", "b"), variables={"A": "1"}, max_idle=2, restarts_in_place=1,
        allocations=(Allocation(name="x", ranks=2, grace_s=1.0), Allocation(name="y", ranks=1, time_limit_s=3.0)),
        times=Times(warning_lead_s=1.0, warning_signal="USR1", kill_wait_s=2.0),
    )  # fmt: skip
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("ranks", "codes"),
    [
        ([Rank(ends=(2, 0)), Rank(ends=(2, -9), on={TERM: (1, 75)})], {"1": -9, "0": 0}),
        ([Rank(on={TERM: (1, 75)}), Rank(ends=(2, -9))], {"1": -9}),  # the other one was ended because of it
    ],
)
def test_how_the_ranks_ended_is_left_for_the_next_attempt(tmp_path, world, ranks, codes):
    run = RunDirectory(tmp_path / "run")
    run.create("run")
    play(tmp_path, world, ({}, *ranks), ({}, Rank(ends=(1, 0))))
    assert json.loads(run.exit_codes_path("j", 0).read_bytes()) == codes
    assert json.loads(run.exit_codes_path("j", 1).read_bytes()) == {"0": 0}


def test_a_time_limit_can_be_brought_once_per_attempt(tmp_path, world):
    stubborn, second = Rank(), Rank(ends=(5, 0))
    state = play(
        tmp_path, world, ({"time_limit_s": 600.0}, stubborn), ({}, second),
        before=lambda controller: world.at(2, controller.expire),
    )  # fmt: skip
    assert stubborn.got() == [(2.0, USR2), (2.0, CONT), (7.0, CONT), (7.0, TERM), (10.0, KILL)]
    warned, ended = stubborn.signals[0][2], stubborn.signals[3][2]
    assert (warned.state, warned.end_time) == ("RUNNING", pytest.approx(1007.0, abs=0.1))
    assert (ended.state, ended.reason) == ("COMPLETING", "TimeLimit")
    assert (second.got(), state.state) == ([], "COMPLETED")


def declines(run_dir, number):
    """What an attempt leaves that can't go on on what it got."""
    run = RunDirectory(run_dir)
    run.attempt(number).mkdir(parents=True)
    (run.attempt(number) / "events.jsonl").write_bytes(
        write_line({"t": 1, "event": "ended", "cause": "declined"})
    )


def test_a_declined_node_type_is_followed_by_the_next_in_a_ring(tmp_path, world):
    world.at(3, lambda: declines(tmp_path / "run", 2))
    ranks = [Rank(ends=(2, 75)) for _ in range(3)]
    state = play(tmp_path, world, ({}, ranks[0]), ({}, ranks[1]), more=[ranks[2], Rank(ends=(1, 0))])
    given = [rank.variables["HPC_RESUME_NODE_TYPE"] for rank in world.ranks]
    assert given == ["type0", "type1", "type0", "type1"]
    assert state.state == "COMPLETED"


# -- started again in place -------------------------------------------------------------------------------


def commit(tmp_path, step):
    (tmp_path / f"run/checkpoints/{step:010d}-0123abcd").mkdir(parents=True)


def write_journal(tmp_path, *events):
    """What an attempt that begins now leaves behind."""
    run = RunDirectory(tmp_path / "run")
    folder = run.attempt(len(run.attempt_numbers()) + 1)
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_bytes(b"".join(map(write_line, events)))


def steps(world):
    return [
        (rank.variables["HPC_RESUME_RESTART_COUNT"], rank.variables["HPC_RESUME_STEP"])
        for rank in world.ranks
    ]


def test_killed_ranks_are_started_again_in_the_same_allocation(tmp_path, world):
    limits = {"time_limit_s": 60}
    state = play(tmp_path, world, (limits, Rank(ends=(10, -9))), more=[Rank(ends=(4, 0))], in_place=2)
    assert (state.state, state.restarts, state.node_type) == ("COMPLETED", 0, "type0")
    assert steps(world) == [("0", "0"), ("0", "1")]
    assert state.end_time == 1060  # the allocation is no longer for it


def test_after_so_many_times_without_a_checkpoint_the_next_allocation_follows(tmp_path, world):
    dead = [Rank(ends=(1, -9)) for _ in range(3)]
    state = play(tmp_path, world, ({}, dead[0]), ({}, dead[1]), more=[dead[2], Rank(ends=(1, 0))], in_place=1)
    assert (state.state, state.restarts) == ("COMPLETED", 1)
    assert steps(world) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]


def test_a_new_checkpoint_renews_the_count(tmp_path, world):
    for seconds in (1, 4, 7):
        world.at(seconds, lambda seconds=seconds: commit(tmp_path, seconds))
    dead = [Rank(ends=(3, -9)) for _ in range(3)]
    state = play(tmp_path, world, ({}, dead[0]), more=[*dead[1:], Rank(ends=(1, 0))], in_place=1)
    assert (state.state, state.restarts) == ("COMPLETED", 0)
    assert steps(world)[-1] == ("0", "3")


@pytest.mark.parametrize(
    ("events", "restarts"),
    [
        ([{"event": "ended", "cause": "crash", "decision": "continue"}], 0),
        ([{"event": "ended", "cause": "signal", "decision": "continue"}], 1),
        ([{"event": "stop_requested", "cause": "signal"}], 1),
        ([], 1),  # it left with 75 without a word: another allocation may have better luck
    ],
)
def test_a_stop_is_no_crash(tmp_path, world, events, restarts):
    world.at(1, lambda: write_journal(tmp_path, *events))
    attempts = [({}, Rank(ends=(2, 75))), ({}, Rank(ends=(1, 0)))]
    assert play(tmp_path, world, *attempts, in_place=2).restarts == restarts


def test_what_was_warned_preempted_or_has_no_time_left_gives_its_allocation_up(tmp_path, world):
    attempts = [
        ({"time_limit_s": 10}, Rank(on={USR2: (0, -9)})),
        ({"preempt_after_s": 1, "grace_s": 5}, Rank(on={TERM: (1, -9)})),
        ({"time_limit_s": 10}, Rank(ends=(4.99, -9))),
        ({}, Rank(ends=(1, 0))),
    ]
    state = play(tmp_path, world, *attempts, in_place=2, max_idle=9)
    assert (state.state, state.restarts) == ("COMPLETED", 3)
