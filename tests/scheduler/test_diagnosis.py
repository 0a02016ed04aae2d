import pytest

from hpc_resume.scheduler.base import PastJob
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.diagnosis import Remains, diagnose

RANKS = {"big1": [0, 1], "big2": [2, 3]}


def stop(cause):
    return Verdict(cause=cause, evidence="SIGTERM; as read")


@pytest.mark.parametrize(
    "cause", [Cause.TIME_LIMIT, Cause.PREEMPTION, Cause.REQUEUE, Cause.CANCEL, Cause.NODE_FAILURE]
)
def test_what_was_certain_before_it_was_killed_stays(cause):
    found = diagnose(
        Remains(stop=stop(cause), exit_codes={-1: 137}, job=PastJob(failed_nodes=("big1",)), oom_kills=1)
    )
    assert found.cause is cause
    assert found.evidence == "SIGTERM; as read; killed before its last word"


def test_a_failed_node_explains_the_rest():
    job = PastJob(failed_nodes=("big1",), requeued=True, evidence="node big1: State=DOWN")
    found = diagnose(Remains(stop=stop(Cause.SIGNAL), exit_codes={-1: 137}, job=job, oom_kills=1))
    assert (found.cause, found.nodes, found.evidence) == (
        Cause.NODE_FAILURE, ("big1",), "node big1: State=DOWN",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "reason", "cause"),
    [
        ("TIMEOUT", "TimeLimit", Cause.TIME_LIMIT),
        ("NODE_FAIL", None, Cause.NODE_FAILURE),
        ("PREEMPTED", None, Cause.PREEMPTION),
        ("OUT_OF_MEMORY", None, Cause.OUT_OF_MEMORY),
        ("COMPLETING", "OutOfMemory", Cause.OUT_OF_MEMORY),
        ("CANCELLED", None, Cause.CANCEL),
        ("REQUEUED", None, Cause.REQUEUE),
    ],
)
def test_the_schedulers_last_word(state, reason, cause):
    found = diagnose(Remains(job=PastJob(state=state, reason=reason, evidence="e"), exit_codes={-1: 137}))
    assert (found.cause, found.evidence) == (cause, "e")


def test_a_failed_job_is_explained_by_its_ranks_first():
    job = PastJob(state="FAILED", reason="NonZeroExitCode", evidence="FAILED")
    fault = Verdict(cause=Cause.OUT_OF_MEMORY, evidence="rank 1: no memory")
    assert diagnose(Remains(job=job, fault=fault, exit_codes={-1: 1})) == fault
    assert diagnose(Remains(job=job, exit_codes={-1: 3})).evidence == "the ranks left with exit code 3"
    assert diagnose(Remains(job=job)) == Verdict(cause=Cause.CRASH, evidence="FAILED")


@pytest.mark.parametrize(
    ("codes", "evidence", "nodes"),
    [
        ({2: -9}, "rank 2 died of SIGKILL", ("big2",)),
        ({0: 0, 1: 139}, "rank 1 died of SIGSEGV", ("big1",)),
        ({1: 1, 2: -9}, "rank 1 left with exit code 1, rank 2 died of SIGKILL", ("big2",)),
        ({-1: 137}, "the ranks died of SIGKILL", ()),
        ({-1: 163}, "the ranks died of signal 35", ()),
    ],
)
def test_exit_codes(codes, evidence, nodes):
    found = diagnose(Remains(exit_codes=codes, ranks=RANKS))
    assert (found.cause, found.evidence, found.nodes) == (Cause.CRASH, evidence, nodes)


def test_on_one_node_all_codes_are_its_own():
    assert diagnose(Remains(exit_codes={-1: 137}, ranks={"big1": [0, 1]})).nodes == ("big1",)


def test_a_kill_for_want_of_memory_needs_both_facts():
    both = diagnose(Remains(exit_codes={0: -9}, ranks=RANKS, oom_kills=2))
    assert (both.cause, both.nodes) == (Cause.OUT_OF_MEMORY, ())
    assert "the kernel killed 2 processes for want of memory where rank 0 ran" in both.evidence
    none = diagnose(Remains(exit_codes={0: -9}, oom_kills=0))
    assert none.cause is Cause.CRASH
    assert "the kernel killed no process" in none.evidence
    assert diagnose(Remains(exit_codes={0: -11}, oom_kills=2)).cause is Cause.CRASH
    alone = diagnose(Remains(oom_kills=1))
    assert alone.cause is Cause.UNKNOWN
    assert "killed 1 process" in alone.evidence


def test_a_restart_without_an_exit_code_is_somebodys_requeue():
    assert diagnose(Remains(job=PastJob(requeued=True))).cause is Cause.REQUEUE
    # With one, our own batch script has asked for it.
    assert diagnose(Remains(job=PastJob(requeued=True), exit_codes={-1: 75})).cause is Cause.UNKNOWN


def test_a_bare_signal_is_better_than_nothing():
    found = diagnose(Remains(stop=stop(Cause.SIGNAL), exit_codes={-1: 75}))
    assert found.cause is Cause.SIGNAL


def test_nothing_known_is_unknown():
    found = diagnose(Remains(exit_codes={-1: 75}))
    assert found.cause is Cause.UNKNOWN
    assert found.evidence == (
        "it left no last word, and nothing says what ended it; the ranks left with exit code 75"
    )
