import pytest

from hpc_resume.scheduler.base import JobFacts
from hpc_resume.scheduler.cause import DEADLINE, Cause, classify

NOW_S = 1_000_000.0


def facts(state, **fields):
    return JobFacts(state=state, evidence="as read", **fields)


def verdict(signal_name, job, *, own_restarts=0):
    return classify(signal_name, job, own_restarts=own_restarts, now_s=NOW_S, warning_lead_s=120.0)


@pytest.mark.parametrize("warning", ["SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize(
    ("job", "cause"),
    [
        pytest.param(facts("RUNNING", end_time_s=NOW_S + 120), Cause.TIME_LIMIT, id="on time"),
        pytest.param(
            facts("SIGNALING", end_time_s=NOW_S + 120), Cause.TIME_LIMIT, id="while it is signalled"
        ),
        pytest.param(facts("RUNNING", end_time_s=NOW_S + 155), Cause.TIME_LIMIT, id="a timer's cycle early"),
        pytest.param(facts("RUNNING", end_time_s=NOW_S - 20), Cause.TIME_LIMIT, id="past the nominal end"),
        pytest.param(facts("RUNNING", end_time_s=NOW_S + 156), Cause.SIGNAL, id="far from the end"),
        pytest.param(facts("RUNNING"), Cause.SIGNAL, id="no limit"),
        pytest.param(
            facts("RUNNING", preempt_time_s=NOW_S, end_time_s=NOW_S + 20), Cause.PREEMPTION, id="preempted"
        ),
        pytest.param(facts("UNKNOWN"), Cause.SIGNAL, id="lookup failed: no cancel sends a warning"),
        pytest.param(facts("NONE"), Cause.SIGNAL, id="no scheduler"),
        pytest.param(facts("COMPLETING", reason="TimeLimit"), Cause.TIME_LIMIT, id="looked up late"),
        pytest.param(facts("COMPLETING"), Cause.CANCEL, id="cancelled right after the warning"),
        pytest.param(
            facts("COMPLETING", preempt_time_s=NOW_S),
            Cause.PREEMPTION,
            id="preempted, and not requeued by Slurm",
        ),
    ],
)
def test_warning(warning, job, cause):
    assert verdict(warning, job).cause is cause
    assert not verdict(warning, job).already_requeued


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        pytest.param(facts("RUNNING", preempt_time_s=NOW_S), Cause.PREEMPTION, id="in grace"),
        pytest.param(
            facts("RUNNING", end_time_s=NOW_S + 5), Cause.SIGNAL, id="scancel --signal=TERM, a peer"
        ),
        pytest.param(facts("COMPLETING", reason="TimeLimit", restarts=0), Cause.TIME_LIMIT, id="limit"),
        pytest.param(facts("COMPLETING", reason="NodeDown", restarts=0), Cause.NODE_FAILURE, id="node"),
        pytest.param(facts("NODE_FAIL", restarts=0), Cause.NODE_FAILURE, id="node, over"),
        pytest.param(facts("COMPLETING", restarts=0), Cause.CANCEL, id="scancel"),
        pytest.param(facts("CANCELLED", restarts=0), Cause.CANCEL, id="scancel, over"),
        pytest.param(facts("COMPLETING", reason="SomethingNew"), Cause.CANCEL, id="an unknown reason"),
        pytest.param(facts("UNKNOWN"), Cause.CANCEL, id="lookup failed"),
        pytest.param(facts("NONE"), Cause.SIGNAL, id="no scheduler"),
    ],
)
def test_sigterm(job, cause):
    assert verdict("SIGTERM", job).cause is cause
    assert not verdict("SIGTERM", job).already_requeued


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        (facts("COMPLETING", restarts=2, preempt_time_s=NOW_S), Cause.PREEMPTION),
        (facts("COMPLETING", restarts=2, reason="NodeDown"), Cause.NODE_FAILURE),
        (facts("COMPLETING", restarts=2), Cause.REQUEUE),
        (facts("PENDING", restarts=2, reason="BeginTime"), Cause.REQUEUE),
    ],
)
def test_more_restarts_than_ours_mean_that_the_next_attempt_is_coming(job, cause):
    answer = verdict("SIGTERM", job, own_restarts=1)
    assert answer.cause is cause
    assert answer.already_requeued


def test_restarts_of_earlier_attempts_are_no_requeue():
    answer = verdict("SIGTERM", facts("COMPLETING", restarts=2), own_restarts=2)
    assert answer.cause is Cause.CANCEL
    assert not answer.already_requeued


def test_keyboard_interrupt_is_a_cancel_whatever_the_scheduler_says():
    assert verdict("SIGINT", facts("RUNNING", preempt_time_s=NOW_S)).cause is Cause.CANCEL


def test_the_evidence_has_the_signal_and_the_facts():
    assert verdict("SIGTERM", facts("COMPLETING")).evidence.startswith("SIGTERM; as read: ")


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        pytest.param(facts("RUNNING", end_time_s=NOW_S + 500), Cause.TIME_LIMIT, id="however far the end"),
        pytest.param(facts("RUNNING"), Cause.TIME_LIMIT, id="an end that is not said any more"),
        pytest.param(facts("UNKNOWN"), Cause.TIME_LIMIT, id="lookup failed: the end was known before"),
        pytest.param(facts("NONE"), Cause.TIME_LIMIT, id="no scheduler"),
        pytest.param(facts("RUNNING", preempt_time_s=NOW_S), Cause.PREEMPTION, id="preempted"),
        pytest.param(facts("COMPLETING"), Cause.CANCEL, id="cancelled in the same moment"),
        pytest.param(facts("COMPLETING", reason="TimeLimit"), Cause.TIME_LIMIT, id="looked up late"),
        pytest.param(facts("COMPLETING", restarts=1), Cause.REQUEUE, id="requeued in the same moment"),
    ],
)
def test_our_own_clock_means_the_time_limit_unless_the_facts_say_otherwise(job, cause):
    assert verdict(DEADLINE, job).cause is cause


def test_the_seconds_that_are_left_are_told():
    assert "9 s before the time limit" in verdict(DEADLINE, facts("RUNNING", end_time_s=NOW_S + 9)).evidence
