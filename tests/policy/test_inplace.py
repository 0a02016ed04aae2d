import pytest

from hpc_resume.policy.inplace import starts_again

CRASHED = {"event": "ended", "cause": "crash", "decision": "continue"}
STOP = {"event": "stop_requested", "cause": "signal", "signal": "SIGUSR2"}
#: With which srun ends the peers of a rank that died.
PEERS = {"event": "stop_requested", "cause": "signal", "signal": "SIGTERM"}


def decide(codes=(75, 75), *words, left_s=None, least_s=60.0, restarts=0, most=2):
    return starts_again(codes, words, left_s=left_s, least_s=least_s, restarts=restarts, most=most)


def test_a_crash_that_told_its_cause_is_started_again():
    assert decide((75, 75), CRASHED)
    assert decide((75, -9), CRASHED)
    assert decide((75, 75), {**CRASHED, "exclude": [], "move_on": False})
    assert decide((75, 75), {**CRASHED, "cause": "unknown"})  # a peer is gone, and nobody has said why


def test_so_is_one_whose_rank_0_was_killed_before_it_could():
    assert decide((-9, 75))
    assert decide((137,))
    assert not decide((75,))
    assert not decide(())


def test_so_is_one_that_was_ended_because_a_peer_had_died():
    assert decide((-9, -9), PEERS)
    assert decide((75, -9), PEERS, CRASHED)
    assert not decide((75, 75), PEERS)


@pytest.mark.parametrize(
    "words",
    [
        [{**CRASHED, "cause": "time_limit"}],
        [{**CRASHED, "cause": "preemption"}],
        [{**CRASHED, "cause": "out_of_memory"}],
        [{**CRASHED, "cause": "bad_node", "exclude": ["n1"]}],
        [{"event": "ended", "cause": "cancel", "decision": "stop"}],
        [{**CRASHED, "decision": "stop"}],
        [STOP],
        [{**PEERS, "cause": "preemption"}],
        [PEERS, {"event": "stop_agreed"}],
        [STOP, CRASHED],
        [{**CRASHED, "exclude": ["n1"], "move_on": False}],
        [{**CRASHED, "exclude": [], "move_on": True}],
    ],
)
def test_a_stop_is_not(words):
    assert not decide((75, -9), *words)


@pytest.mark.parametrize("code", [138, 140, -10, -12])
def test_nor_is_a_rank_that_died_of_a_warning(code):
    assert not decide((code,))


def test_not_without_time_left():
    assert decide((-9,), left_s=60.1)
    assert not decide((-9,), left_s=60.0)


def test_not_for_ever():
    assert decide((-9,), restarts=1)
    assert not decide((-9,), restarts=2)
    assert not decide((-9,), most=0)
