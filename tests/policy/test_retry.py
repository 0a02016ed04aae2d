import dataclasses
import json

import pytest

from hpc_resume.policy.retry import History, PastAttempt, avoid, decide, in_vain, why_spent
from hpc_resume.scheduler.cause import Cause
from hpc_resume.settings import BudgetSettings


def attempts(*causes, step=100, **fields):
    """Attempts in a row that began at one step, and so saved nothing new."""
    return [
        PastAttempt(number=n, cause=cause, first_step=step, **fields) for n, cause in enumerate(causes, 1)
    ]


def decision(cause, before=(), *, progressed=False, begun=True, mistake=False, chance=0.5, **given):
    budget = BudgetSettings(**given.pop("budget", {}))
    fields = {name: given.pop(name) for name in ("faulty", "node_type") if name in given}
    now = PastAttempt(number=len(before) + 1, cause=cause, first_step=100, **fields)
    history = History(past=tuple(before), **given)
    return decide(now, history, budget, progressed=progressed, begun=begun, mistake=mistake, chance=chance)


@pytest.mark.parametrize("cause", [c for c in Cause if c not in {Cause.CANCEL, Cause.DONE}])
def test_progress_renews_every_budget_and_needs_no_wait(cause):
    before = attempts(*[cause.value] * 50)
    found = decision(cause.value, before, progressed=True)
    assert (found.action, found.delay_s, found.move_on) == ("continue", 0, False)
    assert found.why == "it has saved something new"


def test_a_cancel_is_for_good_however_much_was_saved():
    assert decision("cancel", progressed=True).action == "stop"


def test_a_mistake_before_the_first_step_is_not_repeated():
    found = decision("crash", mistake=True, begun=False)
    assert found.action == "stop"
    assert "mend the script" in found.why


@pytest.mark.parametrize("cause", ["crash", "hang", "signal", "time_limit", "unknown", "no_progress"])
def test_attempts_in_a_row_without_progress_are_few(cause):
    assert decision(cause, attempts("crash")).action == "continue"
    found = decision(cause, attempts("crash", "time_limit"))
    assert found.action == "stop"
    assert "no progress in 3 attempts in a row (budget.max_idle)" in found.why


@pytest.mark.parametrize("cause", ["preemption", "requeue"])
def test_what_others_take_away_is_given_back_for_ever(cause):
    found = decision(cause, attempts(*[cause] * 500))
    assert found.action == "continue"
    assert found.delay_s == 1800  # the longest wait, at the middle of its range
    assert decision("crash", attempts(*[cause] * 500, "crash")).action == "continue"


@pytest.mark.parametrize(
    ("cause", "setting"),
    [
        ("crash", "crashes"),
        ("hang", "hangs"),
        ("out_of_memory", "out_of_memory"),
        ("node_failure", "node_failures"),
        ("preemption", "preemptions"),
        ("requeue", "preemptions"),
    ],
)
def test_a_budget_of_each_cause(cause, setting):
    budget = {setting: 2, "max_idle": 100}
    assert decision(cause, attempts("signal", "signal"), budget=budget).action == "continue"
    found = decision(cause, attempts("signal", cause, "time_limit"), budget=budget)
    assert found.action == "stop"
    assert f"(budget.{setting})" in found.why
    assert (
        decision(cause, attempts(cause, cause), budget={setting: None, "max_idle": 100}).action == "continue"
    )


def test_nodes_that_fail_five_times_in_a_row_end_the_run():
    assert decision("node_failure", attempts(*["node_failure"] * 3)).action == "continue"
    assert decision("node_failure", attempts(*["node_failure"] * 4)).action == "stop"


def test_waits_double_from_the_second_attempt_in_vain_on():
    budget = {"max_idle": 100}
    waits = [decision("crash", attempts(*["crash"] * n), budget=budget).delay_s for n in range(5)]
    assert waits == [0, 30, 60, 120, 240]
    spread = [decision("crash", attempts("crash"), chance=chance).delay_s for chance in (0.0, 0.999)]
    assert spread == [15, 45]
    assert decision("crash", attempts("crash"), budget={"backoff_s": 0}).delay_s == 0
    assert "so the next one waits 30 s" in decision("crash", attempts("crash")).why


def test_an_attempt_that_lasted_to_its_limit_is_followed_at_once():
    assert decision("time_limit", attempts("time_limit")).delay_s == 0


def test_out_of_memory_moves_on_where_it_can():
    found = decision("out_of_memory", further_types=True, begun=False)
    assert (found.action, found.move_on) == ("continue", True)
    assert decision("out_of_memory", further_types=True, progressed=True).move_on


def test_out_of_memory_with_nowhere_to_go():
    assert decision("out_of_memory", begun=False).action == "stop"
    assert decision("out_of_memory").action == "continue"
    assert decision("out_of_memory", attempts("out_of_memory")).action == "stop"
    # What a smaller node type had too little of is no argument against the larger one.
    small = attempts("out_of_memory", node_type="small")
    assert decision("out_of_memory", small, node_type="large").action == "continue"


def test_a_node_that_failed_twice_is_avoided_with_the_reason():
    faults = {"big1": (1, 4), "big2": (2,), "big3": (3,)}
    found = decision("crash", faults=faults, faulty=("big2",), progressed=True)
    assert found.exclude == ("big1", "big2")
    assert "big1 is avoided: it failed in attempts 1 and 4" in found.why
    assert "big2 is avoided: it failed in attempts 2 and 1" in found.why
    assert decision("crash", faults=faults, budget={"node_faults": None}).exclude == ()
    assert decision("crash", faults=faults, budget={"node_faults": 3}).exclude == ()


def test_an_attempt_leaves_a_bad_node_at_once_but_only_once():
    history = History(past=tuple(attempts("crash", "crash")), faults={"big1": (1, 2), "big2": (1,)})
    found = avoid(["big1", "big2"], history, BudgetSettings())
    assert (found.action, found.exclude) == ("continue", ("big1",))
    assert found.why == "big1 is avoided: it failed in attempts 1 and 2"
    assert avoid(["big2"], history, BudgetSettings()) is None
    assert avoid(["big1"], history, BudgetSettings(node_faults=None)) is None
    again = dataclasses.replace(history, past=(*history.past, *attempts("bad_node")))
    assert avoid(["big1"], again, BudgetSettings()) is None


def test_an_attempt_that_died_before_it_restored_counts():
    past = [
        PastAttempt(number=1, cause="crash", first_step=0),
        PastAttempt(number=2, cause="crash", first_step=100),
        PastAttempt(number=3, cause="unknown"),
    ]
    assert [each.number for each in in_vain(past, 100)] == [2, 3]
    assert in_vain(past, 200) == [
        past[2]
    ]  # where it began is not known: it is not said to have made progress
    assert in_vain([], 0) == []


def test_the_budget_is_spent_for_whoever_starts_the_job_all_the_same():
    assert why_spent(attempts("crash", "crash", "crash"), BudgetSettings()) is not None
    assert why_spent(attempts("crash", "crash", "preemption", "crash"), BudgetSettings()) is not None
    assert why_spent(attempts("crash", "crash", "preemption"), BudgetSettings()) is None
    assert why_spent([], BudgetSettings()) is None


def test_a_history_goes_to_the_other_ranks_as_json():
    history = History(past=tuple(attempts("crash", faulty=("a",))), faults={"a": (1,)}, further_types=True)
    assert History.from_json(json.loads(json.dumps(dataclasses.asdict(history)))) == history
