import pytest

from hpc_resume.policy.inplace import starts_again

CRASHED = {"event": "ended", "cause": "crash", "decision": "continue"}


def decide(codes=(75, 75), word=CRASHED, *, left_s=None, least_s=60.0, restarts=0, most=2):
    return starts_again(codes, word, left_s=left_s, least_s=least_s, restarts=restarts, most=most)


def test_a_crash_that_told_its_cause_is_started_again():
    assert decide()
    assert decide((75, -9))
    assert decide(word={**CRASHED, "exclude": [], "move_on": False})


def test_so_is_one_whose_rank_0_was_killed_before_it_could():
    assert decide((-9, 75), None)
    assert decide((137,), None)
    assert not decide((75,), None)
    assert not decide((), None)


def test_so_is_one_that_was_ended_because_a_peer_had_died():
    word = {"event": "stop_requested", "cause": "signal", "signal": "SIGTERM"}
    assert decide((-9, -9), word)
    assert not decide((75, 75), word)


@pytest.mark.parametrize(
    "word",
    [
        {"event": "ended", "cause": "time_limit", "decision": "continue"},
        {"event": "ended", "cause": "preemption", "decision": "continue"},
        {"event": "ended", "cause": "cancel", "decision": "stop"},
        {"event": "ended", "cause": "crash", "decision": "stop"},
        {"event": "stop_requested", "cause": "signal", "signal": "SIGUSR2"},
        {"event": "stop_requested", "cause": "preemption", "signal": "SIGTERM"},
        {**CRASHED, "exclude": ["n1"], "move_on": False},
        {**CRASHED, "exclude": [], "move_on": True},
    ],
)
def test_a_stop_is_not(word):
    assert not decide((75, -9), word)


@pytest.mark.parametrize("code", [138, 140, -10, -12])
def test_nor_is_a_rank_that_died_of_a_warning(code):
    assert not decide((code,), None)


def test_not_without_time_left():
    assert decide(left_s=60.1)
    assert not decide(left_s=60.0)


def test_not_for_ever():
    assert decide(restarts=1)
    assert not decide(restarts=2)
    assert not decide(most=0)
