import pytest
import torch.distributed as dist

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError
from hpc_resume.journal import Journal, read_events
from hpc_resume.policy.decision import Decision
from hpc_resume.policy.retry import History, PastAttempt
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.ending import LastWord, end_attempt
from hpc_resume.run.fault import Fault
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.base import JobFacts, NoScheduler
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.environment import JobEnvironment

GO_ON = Decision(action="continue", why="it has saved something new")
ENVIRON = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1",
           "SLURM_LOCALID": "0"}  # fmt: skip


class Slurm(NoScheduler):
    """Says one thing."""

    def __init__(self, state="RUNNING", **fields):
        self.said = JobFacts(state=state, evidence="as read", **fields)

    def facts(self):
        return self.said


class Way:
    """A way to go on that notes what it is told, or refuses."""

    def __init__(self, refuses=None):
        self.refuses = refuses
        self.told = []

    def prepare(self):
        return ""

    def go_on(self, decision, *, already=False):
        self.told.append(("already" if already else "go on", decision))
        if self.refuses is not None:
            raise self.refuses
        return "gone on"

    def leave(self, decision):
        self.told.append(("leave", decision))
        return "left"

    def end(self, why):
        self.told.append(("end", why))


def verdict(cause=Cause.TIME_LIMIT, **fields):
    return Verdict(cause=cause, evidence="e", **fields)


def end(found, decision=GO_ON, slurm=None, way=None, *, suffices=False):
    way = way or Way()
    ending = end_attempt(
        found, decision, slurm or Slurm(), way, own_restarts=0, warning_lead_s=60, now_s=0,
        exit_code_suffices=suffices,
    )  # fmt: skip
    return ending, way.told


@pytest.mark.parametrize(
    ("found", "suffices", "how"),
    [
        (verdict(), False, "go on"),
        (verdict(already_requeued=True), False, "already"),
        (verdict(Cause.CRASH), True, "leave"),
    ],
)
def test_the_decision_is_handed_over_once(found, suffices, how):
    ending, told = end(found, suffices=suffices)
    assert (ending.decision, ending.exit_code, told) == ("continue", 75, [(how, GO_ON)])
    done = "left" if suffices else "gone on"
    assert ending.why == f"{found.cause.value} (e); it has saved something new; {done}"


def test_a_stop_asks_for_nothing():
    ending, told = end(verdict(Cause.CANCEL), Decision(action="stop", why="for good"))
    assert (ending.decision, ending.exit_code, told) == ("stop", 1, [])


def test_a_cancel_while_it_was_saving_is_a_cancel():
    refuses = Way(SchedulerError("it is being ended"))
    ending, _ = end(verdict(), slurm=Slurm("COMPLETING", restarts=0), way=refuses)
    assert (ending.verdict.cause, ending.decision) == (Cause.CANCEL, "stop")
    assert "while it was saving" in ending.why
    ending, _ = end(verdict(), slurm=Slurm("RUNNING"), way=refuses)
    assert (ending.verdict.cause, ending.decision, ending.exit_code) == (Cause.TIME_LIMIT, "continue", 75)
    assert "left to exit code 75" in ending.why


@pytest.fixture
def last_word(tmp_path):
    def make(slurm=None, environ=ENVIRON, past=(), way=None, **facts):
        environment = JobEnvironment.detect(environ, hostname="n1", pid=1)
        return LastWord(
            environment, slurm or Slurm(), Config(), way or Way(), clock=lambda: 0.0,
            journal=Journal(tmp_path / "events.jsonl", clock=lambda: 0.0),
            facts=AttemptFacts(number=3, run_id="r", node_type="t", history=History(past=tuple(past), **facts)),
        )  # fmt: skip

    make.said = lambda: read_events(tmp_path / "events.jsonl")[-1]
    return make


def fail(word, fault, *, step=5, progressed=False):
    return word.fail(fault, first_step=0, step=step, progressed=progressed)


def crash(**fields):
    return Fault(**{"cause": Cause.CRASH, "evidence": "rank 0", **fields})


def test_the_decision_is_in_the_journal(last_word):
    past = [PastAttempt(number=1, cause="crash", first_step=0, faulty=("n1",))]
    word = last_word(past=past, faults={"n1": (1,)})
    assert fail(word, crash(nodes=("n1",))) == 75
    said = last_word.said()
    assert (said["cause"], said["evidence"], said["nodes"]) == ("crash", "rank 0", ["n1"])
    assert (said["decision"], said["exclude"], said["move_on"]) == ("continue", ["n1"], False)
    assert 15 <= said["delay_s"] <= 45
    assert "n1 is avoided: it failed in attempts 1 and 3" in said["because"]


def test_a_mistake_stops_an_error_of_ours_keeps_its_code(last_word):
    way = Way()
    word = last_word(way=way)
    assert fail(word, crash(mistake=True), step=0) == 1
    assert last_word.said()["decision"] == "stop"
    assert way.told == [("end", last_word.said()["why"])]
    assert fail(word, crash(exit_code=4)) == 4
    assert "no further attempt would mend it" in last_word.said()["because"]


def test_an_attempt_that_was_fenced_off_ends_nothing_but_itself(last_word):
    way = Way()
    assert fail(last_word(way=way), crash(exit_code=1, fenced=True)) == 1
    assert last_word.said()["decision"] == "stop"
    assert way.told == []


def test_where_nobody_starts_it_again_it_fails(last_word):
    assert fail(last_word(environ={}), crash()) == 1
    assert "nobody starts it again" in last_word.said()["because"]


def test_the_scheduler_is_asked_why_a_peer_was_lost(last_word):
    lost = Fault(cause=Cause.UNKNOWN, evidence="rank 0 lost a peer")
    down = Slurm("COMPLETING", restarts=1, reason="NodeDown", failed_nodes=("n2",))
    assert fail(last_word(down), lost) == 75
    assert (last_word.said()["cause"], last_word.said()["nodes"]) == ("node_failure", ["n2"])
    assert last_word.said()["evidence"].startswith("rank 0 lost a peer; no signal; as read")
    assert fail(last_word(Slurm("COMPLETING", restarts=0)), lost) == 1
    assert last_word.said()["cause"] == "cancel"
    for says_nothing in (Slurm("RUNNING"), Slurm("UNKNOWN"), Slurm("NONE")):
        assert fail(last_word(says_nothing), lost) == 75
        assert last_word.said()["cause"] == "unknown"


def test_other_ranks_decide_alike_and_ask_nobody(last_word):
    way = Way()
    environ = {**ENVIRON, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    idle = [PastAttempt(number=n, cause="crash", first_step=0) for n in (1, 2)]
    assert fail(last_word(None, environ, way=way), crash()) == 75
    assert fail(last_word(None, environ, past=idle, way=way), crash()) == 1
    assert fail(last_word(None, environ, past=idle, way=way), crash(), progressed=True) == 75
    assert way.told == []


def test_an_attempt_is_not_tried_when_the_budget_is_spent(last_word):
    idle = [PastAttempt(number=n, cause="crash", first_step=10) for n in (1, 2, 3)]
    assert "no progress in 3 attempts" in last_word(past=idle).why_spent(10)
    assert last_word(past=idle).why_spent(20) is None


def alone():
    environment = JobEnvironment.detect(ENVIRON, hostname="n1", pid=1)
    return Peers(environment, dist.HashStore(), None, "x")


def test_a_bad_node_is_left_at_once(last_word):
    way = Way()
    word = last_word(way=way, faults={"n1": (1, 2)})
    assert word.leave_bad_nodes({"n2": [0]}, alone()) is None
    assert (
        word.leave_bad_nodes({"n1": [0], "n2": [1]}, alone())
        == "n1 is avoided: it failed in attempts 1 and 2"
    )
    assert [(how, decision.exclude) for how, decision in way.told] == [("go on", ("n1",))]
    said = last_word.said()
    assert (said["cause"], said["decision"], said["exclude"]) == ("bad_node", "continue", ["n1"])
    assert said["evidence"] == "the attempt was started on n1, n2"


def test_only_slurm_has_other_nodes(last_word):
    assert last_word(environ={}, faults={"n1": (1, 2)}).leave_bad_nodes({"n1": [0]}, alone()) is None
