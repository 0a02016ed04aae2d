import dataclasses

import pytest

from hpc_resume.policy.coverage import Given, Savings, shortfalls

ENOUGH = Given(
    where="partition low",
    time_limit_s=3600.0,
    warning_lead_s=120.0,
    lead_is_meant=True,
    grace_s=300.0,
    kill_wait_s=30.0,
    every_s=600.0,
    every_steps=None,
)
FORTY = Savings(step=4000, seconds=(43.0, 40.0, 41.0))


def found(saves, **changes):
    return list(shortfalls(dataclasses.replace(ENOUGH, **changes), saves))


def test_times_that_suffice_need_no_word():
    assert found(FORTY) == found(None) == []


def test_a_preemption_that_comes_too_fast():
    (only,) = found(FORTY, grace_s=20.0, kill_wait_s=5.0)
    assert not only.hopeless
    assert only.text == (
        "grace time of partition low is 20 s, KillWait 5 s, but saving this run took 43 s (step 4000): a preemption "
        "will lose the work since the last periodic checkpoint; checkpoint.every_s=600 bounds it"
    )
    (only,) = found(FORTY, grace_s=0.0, every_s=None, every_steps=50)
    assert only.text.endswith("checkpoint.every_steps=50 bounds it")
    (only,) = found(FORTY, grace_s=0.0, every_s=None)
    assert only.text.endswith("there are no periodic checkpoints: set checkpoint.every_s")
    assert found(FORTY, grace_s=None, kill_wait_s=0.0) == []  # nobody preempts it


def test_a_time_limit_that_holds_no_save_is_refused():
    (only,) = found(FORTY, time_limit_s=40.0, warning_lead_s=0.0)
    assert only.hopeless
    assert only.text == (
        "the time limit is 40 s, but saving this run took 43 s (step 4000), and the fastest of 3 40 s: no attempt "
        "could save anything; set time_limit_s to 720 or more"
    )
    (only,) = found(FORTY, time_limit_s=70.0, warning_lead_s=0.0)
    assert not only.hopeless
    assert "the last save of each attempt must begin 5" in only.text


def test_a_warning_that_comes_too_late():
    (only,) = found(FORTY, warning_lead_s=30.0)
    assert "the warning comes 30 s before the end, but saving this run took 43 s (step 4000)" in only.text
    assert only.text.endswith("set warning_lead_s to 110 or more")
    assert found(FORTY, warning_lead_s=0.0) == []  # our own clock alone


@pytest.mark.parametrize(("meant", "expected"), [(True, 1), (False, 0)])
def test_without_measurements_settings_that_contradict_each_other(meant, expected):
    shortfall = found(None, grace_s=20.0, lead_is_meant=meant)
    assert len(shortfall) == expected
    assert all("less than the 120 s that warning_lead_s allows for a save" in each.text for each in shortfall)
