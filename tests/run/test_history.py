import json

import pytest

from hpc_resume.config import Config
from hpc_resume.journal import Journal, read_events
from hpc_resume.policy.retry import PastAttempt
from hpc_resume.run.attempt import AttemptFacts, begin_attempt
from hpc_resume.run.history import FAULT
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import NoScheduler, PastJob
from hpc_resume.scheduler.environment import JobEnvironment

T0 = 1_700_000_000.0


class Asked(NoScheduler):
    """Answers about one earlier attempt, and notes what it was asked."""

    def __init__(self, job=None):
        self.job = job or PastJob()
        self.asked = []

    def look_back(self, past):
        self.asked.append(past)
        return self.job


class Story:
    """A run's attempts, begun as ranks begin them and left as the test says."""

    def __init__(self, root):
        self.run = RunDirectory(root)
        self.number = 0

    def attempt(self, *events, job="j", scheduler=None, node="n1", node_types=None, node_type=None, leave=()):
        environ = {
            "HPC_RESUME_JOB_STATE": "x", "SUBMITIT_LOCAL_JOB_ID": job, "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_GLOBALID": "0",
            "SUBMITIT_LOCAL_LOCALID": "0",
            "HPC_RESUME_RESTART_COUNT": str(self.number), **({"HPC_RESUME_NODE_TYPE": node_type} if node_type else {}),
        }  # fmt: skip
        environment = JobEnvironment.detect(environ, hostname=node, pid=1)
        config = Config(**({} if node_types is None else {"node_types": node_types}))
        facts, journal = begin_attempt(
            self.run, environment, scheduler or Asked(), config, nodes=[node], clock=lambda: T0 + self.number
        )
        assert AttemptFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
        for kind, fields in events:
            journal.event(kind, **fields)
        journal.close()
        self.number = facts.number
        return facts

    def diagnosed(self):
        path = self.run.attempt(self.number) / "events.jsonl"
        return [(e["attempt"], e["cause"], e["nodes"]) for e in read_events(path, {"diagnosed"})]


def began(step):
    return ("restored", {"step": step}) if step else ("fresh", {"step": 0})


def ended(cause, nodes=(), decision="continue"):
    return ("ended", {"cause": cause, "decision": decision, "nodes": list(nodes), "evidence": "e"})


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path / "run")


def test_the_first_attempt_has_no_history(story):
    facts = story.attempt()
    assert (facts.number, facts.history.past, facts.history.faults) == (1, (), {})


def test_what_came_before(story):
    story.attempt(began(0), ended("crash", ["n1"]))
    story.attempt(began(20), ended("preemption"))
    facts = story.attempt(began(40))
    assert facts.history.past == (
        PastAttempt(number=1, cause="crash", first_step=0, faulty=("n1",)),
        PastAttempt(number=2, cause="preemption", first_step=20),
    )
    assert facts.history.faults == {"n1": (1,)}
    assert story.diagnosed() == []


def test_a_person_who_submits_anew_begins_a_new_budget_but_nodes_stay_bad(story):
    story.attempt(began(0), ended("crash", ["n1"]), job="old")
    facts = story.attempt(began(0), job="new")
    assert (facts.history.past, facts.history.faults) == ((), {"n1": (1,)})


def test_nodes_are_not_to_blame_for_what_is_no_fault_of_theirs(story):
    story.attempt(began(0), ended("preemption", ["n1"]))
    assert story.attempt().history.faults == {}


def test_an_attempt_without_a_last_word_is_looked_into_once(story):
    asked = Asked(PastJob(failed_nodes=("n1",), evidence="node n1: State=DOWN"))
    story.attempt(began(0), ("met", {"ranks": {"n1": [0], "n2": [1]}}))
    facts = story.attempt(scheduler=asked)
    assert story.diagnosed() == [(1, "node_failure", ["n1"])]
    (past,) = asked.asked
    assert (past.job_id, past.restart_count, past.nodes, past.began_s) == ("j", 0, ("n1", "n2"), T0)
    assert facts.history.past[0].cause == "node_failure"
    assert facts.history.faults == {"n1": (1,)}
    later = Asked()
    facts = story.attempt(scheduler=later)
    assert story.diagnosed() == [(2, "unknown", [])]
    assert [past.restart_count for past in later.asked] == [1]
    assert [each.cause for each in facts.history.past] == ["node_failure", "unknown"]


def test_exit_codes_are_read_and_then_taken_away(story):
    story.attempt(began(0), ("met", {"ranks": {"n1": [0], "n2": [1]}}))
    path = story.run.exit_codes_path("j", 0)
    path.write_text('{"1": -9}')
    story.attempt()
    assert story.diagnosed() == [(1, "crash", ["n2"])]
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"x": 1}', '{"1": []}', "\0"])
def test_damaged_exit_codes_say_nothing(story, text):
    story.attempt(began(0))
    story.run.exit_codes_path("j", 0).write_text(text)
    story.attempt()
    assert story.diagnosed() == [(1, "unknown", [])]


def test_what_a_rank_said_before_it_died(story):
    story.attempt(began(0))
    fault = {"cause": "out_of_memory", "evidence": "rank 3", "nodes": []}
    (story.run.attempt(1) / FAULT).write_text(json.dumps(fault))
    story.attempt()
    assert story.diagnosed() == [(1, "out_of_memory", [])]


def test_a_stop_that_was_under_way_is_the_cause(story):
    story.attempt(began(0), ("stop_requested", {"cause": "preemption", "evidence": "SIGTERM; …"}))
    story.attempt()
    assert story.diagnosed() == [(1, "preemption", [])]


def test_a_lost_peer_is_looked_into_too_but_only_what_is_certain_counts(story):
    story.attempt(began(0), ended("unknown"))
    story.attempt(began(0), ended("unknown"), scheduler=Asked(PastJob(requeued=True)))
    assert story.diagnosed() == []  # we were requeued by our own batch script
    facts = story.attempt(scheduler=Asked(PastJob(failed_nodes=("n1",), evidence="down")))
    assert story.diagnosed() == [(2, "node_failure", ["n1"])]
    assert [each.cause for each in facts.history.past] == ["unknown", "node_failure"]


def test_kills_for_want_of_memory_are_counted_on_the_same_node_and_boot(story):
    story.attempt(began(0))
    path = story.run.attempt(1) / "events.jsonl"
    (begun,) = read_events(path, {"begun"})
    before = {**begun["oom_kills"], "node": begun["oom_kills"]["node"] - 1, "group": None}
    journal = Journal(path, clock=lambda: T0)
    journal.event("begun", oom_kills=before)
    journal.close()
    story.run.exit_codes_path("j", 0).write_text('{"0": 137}')
    story.attempt(node="n1")
    assert story.diagnosed() == [(1, "out_of_memory", [])]


def test_on_another_node_the_count_says_nothing(story):
    story.attempt(began(0), ("begun", {"oom_kills": {"boot": "b", "node": -5}}))
    story.run.exit_codes_path("j", 0).write_text('{"0": 137}')
    story.attempt(node="n2")
    assert story.diagnosed() == [(1, "crash", ["n1"])]


@pytest.mark.parametrize(("node_type", "further"), [("small", True), ("large", False), (None, False)])
def test_whether_there_is_a_further_node_type(story, node_type, further):
    types = [{"name": "small"}, {"name": "large"}]
    facts = story.attempt(node_types=types, node_type=node_type)
    assert facts.history.further_types is further


def test_damage_to_earlier_attempts_ends_no_run(story):
    story.attempt(began(0), ended("crash", ["n1"]))
    (story.run.attempt(1) / "attempt.json").write_text("{torn")
    (story.run.attempt(1) / "events.jsonl").write_text(
        '{"event": "ended", "cause": 7}\n{"event": "met", "ranks": 1}\n'
    )
    facts = story.attempt()
    assert facts.number == 2
