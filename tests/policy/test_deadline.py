import math
import random

import pytest

from hpc_resume.policy.deadline import (
    LAST_WORD_S,
    SaveTime,
    StepTimes,
    best_lead_s,
    patience,
    plan_stop,
)
from hpc_resume.policy.saving import SAFE_PART


def kept_s(lead_s, work_s, save):
    return (work_s - lead_s) * save.chance(lead_s)


def test_the_known_answer():
    save = SaveTime(median_s=5.0, sigma=0.35)
    lead_s = best_lead_s(60.0, save)
    assert round(lead_s, 1) == 9.7
    assert round(kept_s(lead_s, 60.0, save), 1) == 48.8
    mean_s = 5.0 * math.exp(0.35**2 / 2)
    assert round(kept_s(mean_s, 60.0, save), 0) == 31
    assert round(kept_s(20.0, 60.0, save), 1) == 40.0


@pytest.mark.parametrize("seed", range(30))
def test_no_other_lead_keeps_more(seed):
    chance = random.Random(seed)
    save = SaveTime(median_s=math.exp(chance.uniform(-3, 6)), sigma=chance.uniform(0.05, 1.5))
    work_s = save.median_s * math.exp(chance.uniform(-2, 8))
    best = kept_s(best_lead_s(work_s, save), work_s, save)
    assert all(kept_s(work_s * part / 500, work_s, save) <= best * (1 + 1e-9) + 1e-9 for part in range(501))


def test_the_lead_is_within_the_time_that_there_is():
    save = SaveTime(median_s=5.0, sigma=0.35)
    assert best_lead_s(0.0, save) == best_lead_s(-3.0, save) == 0.0
    assert 0 < best_lead_s(1.0, save) < 1.0
    assert best_lead_s(1e7, save) < 60.0  # however much is at stake


def test_a_distribution_is_learnt_from_measured_saves():
    chance = random.Random(1)
    seconds = [chance.lognormvariate(math.log(30.0), 0.5) for _ in range(2000)]
    save = SaveTime.fit(seconds)
    assert save.median_s == pytest.approx(30.0, rel=0.05)
    assert save.sigma == pytest.approx(0.5, rel=0.05)
    assert save.measured == 2000
    assert save.chance(save.quantile_s(0.95)) == pytest.approx(0.95)


def test_few_measurements_leave_doubts():
    one, few, many = (SaveTime.fit([4.0] * n) for n in (1, 3, 300))
    assert [one.median_s, few.median_s, many.median_s] == pytest.approx([4.0] * 3)
    assert one.sigma > few.sigma > many.sigma > 0
    assert one.sigma == pytest.approx(0.35 * math.sqrt(2))
    assert SaveTime.fit([]) is None
    assert SaveTime.fit([0.0]).median_s > 0


def test_the_95th_percentile_of_the_newest_steps():
    steps = StepTimes()
    assert steps.most_s() == 0.0
    steps.add(100.0)  # compiles
    assert steps.most_s() == 100.0
    steps.add(1.0)
    assert steps.most_s() == 1.0
    for seconds in range(2, 101):
        steps.add(float(seconds))
    assert (steps.most_s(), steps.added) == (95.0, 101)
    for _ in range(300):
        steps.add(2.0)
    assert steps.most_s() == 2.0


def plan(**changes):
    usual = {"work_s": 60.0, "begun": True, "saves_s": (), "step_s": 0.5, "warning_lead_s": 0.0}
    return plan_stop(**{**usual, **changes})


def test_the_step_that_is_being_done_and_the_last_word_come_on_top():
    save = SaveTime.fit([5.0] * 5)
    lead_s = best_lead_s(60.0, save)
    assert plan(saves_s=[5.0] * 5).lead_s == pytest.approx(lead_s + 0.5 + LAST_WORD_S)
    assert plan(saves_s=[5.0] * 5, step_s=30.0).lead_s == pytest.approx(lead_s + 30.0 + LAST_WORD_S)
    assert plan(saves_s=[5.0] * 5).why.startswith("a save 5 s (sigma 0.27, 5 measured), so a lead of ")


def test_a_save_that_is_begun_in_time_counts_as_one_that_fits():
    steady = [5.0] * 1000  # best lead: hardly more than the median
    assert best_lead_s(60.0, SaveTime.fit(steady)) < 5.0 / SAFE_PART
    assert plan(saves_s=steady, step_s=0.0).lead_s == pytest.approx(5.0 / SAFE_PART + LAST_WORD_S)
    # Nothing that counts as fitting is to be had: then the best gamble.
    assert plan(saves_s=steady, work_s=6.0, step_s=0.0).lead_s < 6.0 + LAST_WORD_S


@pytest.mark.parametrize(
    ("warning_lead_s", "work_s", "lead_s"),
    [(120.0, 3600.0, 120.0), (0.0, 60.0, 15.0), (0.0, 86400.0, 60.0), (10.0, 86400.0, 60.0)],
)
def test_until_a_save_is_measured_the_configured_lead_counts(warning_lead_s, work_s, lead_s):
    planned = plan(warning_lead_s=warning_lead_s, work_s=work_s, step_s=0.0)
    assert planned.lead_s == lead_s + LAST_WORD_S
    assert "no save was measured" in planned.why


def test_before_the_first_step_there_is_nothing_to_lose_by_going_on():
    assert plan(begun=False, saves_s=[5.0], warning_lead_s=100.0).lead_s == LAST_WORD_S


def test_no_periodic_save_is_begun_that_would_be_in_the_way():
    assert plan(saves_s=[5.0] * 5).quiet_s == pytest.approx(SaveTime.fit([5.0] * 5).quantile_s(0.95))
    assert plan().quiet_s == 0.0


def wait(ends_in_s, *, ending=True, saves_s=(5.0,), watchdog_s=60.0):
    return patience(ends_in_s=ends_in_s, ending=ending, saves_s=saves_s, watchdog_s=watchdog_s)


def test_the_watchdog_waits_for_the_end_of_the_job_if_it_is_known():
    for left_s in (20.0, 300.0):  # sooner and later than is configured
        assert wait(left_s).give_up_s == left_s - LAST_WORD_S
        fastest_s = SaveTime.fit([5.0]).quantile_s(0.05)
        assert wait(left_s).leave_s == pytest.approx(left_s - LAST_WORD_S - fastest_s)
    assert wait(1.0) == wait(-5.0)
    assert wait(1.0).give_up_s == wait(1.0).leave_s == 0.0
    for instant in ((), (0.01,)):  # leaving takes its time, too
        assert wait(100.0, saves_s=instant).leave_s == 100.0 - 2 * LAST_WORD_S


def test_a_stop_far_from_the_end_is_waited_for_as_configured():
    assert wait(None).give_up_s == 60.0
    assert wait(None).leave_s is None
    assert wait(86400.0, ending=False).give_up_s == 60.0
    assert wait(86400.0, ending=False).leave_s is None
    assert wait(30.0, ending=False).give_up_s == 30.0 - LAST_WORD_S
