import dataclasses
import json

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, SchedulerError, UsageError
from hpc_resume.launch.resubmit import Resubmission
from hpc_resume.provenance.running import take_source
from hpc_resume.provenance.source import read_source
from hpc_resume.provenance.sources import Sources
from hpc_resume.rundir import RunDirectory, sealed
from hpc_resume.scheduler.base import UNKNOWN, JobFacts
from hpc_resume.scheduler.notes import Notes

NOW_S = 2_000_000_000.0
#: Stands in place of a state while Slurm does not answer.
SILENT = "no answer within 10 s"
TYPES = [
    {"name": "a", "partition": "main", "constraint": "a100", "wait_limit_s": 60},
    {"name": "b", "partition": "low"},
    {"name": "c", "nodes": 2},
]


@dataclasses.dataclass
class Queue:
    """Slurm's queue, kept in a dict; changed by what it is told."""

    states: dict
    waits: dict = dataclasses.field(default_factory=dict)
    comments: dict = dataclasses.field(default_factory=dict)
    after_change: str = "Priority"
    refuses: str = ""
    told: list = dataclasses.field(default_factory=list)

    def facts(self, job_id):
        said = self.states.get(job_id, UNKNOWN)
        evidence = "Invalid job id" if said == UNKNOWN else said
        return JobFacts(state=UNKNOWN if said == SILENT else said, evidence=evidence)

    def forgotten(self, facts):
        return facts.state == UNKNOWN and facts.evidence != SILENT

    def waiting(self, job_id):
        return self.waits.get(job_id)

    def find(self, comment):
        return self.comments.get(comment)

    def check(self, script, options):
        self._tell("check", *options)

    def submit(self, script, *words, options=(), folder=None):
        self._tell("submit", *options, *words)
        new = str(max(map(int, self.states)) + 1)
        self.states[new] = "PENDING"
        return new

    def change(self, job_id, fields):
        self._tell("change", job_id, *(f"{name}={value}" for name, value in fields.items()))
        self.waits[job_id] = (self.after_change, NOW_S)

    def hold(self, job_id):
        self._tell("hold", job_id)

    def release(self, job_id):
        self._tell("release", job_id)

    def cancel(self, job_id):
        self._tell("cancel", job_id)

    def _tell(self, *words):
        self.told.append(" ".join(words))
        if self.refuses and words[0] == self.refuses:
            raise SchedulerError(f"{words[0]} was refused")


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def made(run, queue, *, types=TYPES, ended=None):
    """A run whose first attempt was job 12's."""
    config = Config(name="x", scheduler="slurm", node_types=types)
    run.create("x")
    config.store(run)
    run.attempt(1).mkdir()
    record = {"kind": "slurm", "job_id": "12", "chain": "12", "config": config.digest(), "started": 1.0}
    (run.attempt(1) / "attempt.json").write_bytes(sealed(record))
    if ended:
        (run.attempt(1) / "events.jsonl").write_text(json.dumps({"event": "ended", **ended}) + "\n")
    notes = Notes(run.root)
    notes.write("script", "12", "#!/bin/bash")
    notes.write("folder", "12", "/home/eve")
    notes.write("latest", "12", "12")
    sleeps = []
    looking = Resubmission(run.root, queue=queue, clock=lambda: NOW_S + sum(sleeps), sleep=sleeps.append)
    return looking, notes


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT", "NODE_FAIL", "COMPLETED", UNKNOWN])
def test_a_run_that_waits_is_submitted_once(run, state):
    queue = Queue({"12": state})
    looking, notes = made(run, queue)
    answer = looking.resubmit()
    assert (answer.job_id, answer.over) == ("13", False)
    assert queue.told == [
        "submit --comment=hpc_resume: after 12 --partition=main --constraint=a100 --nodes=1 --ntasks-per-node=1 12 12 0"
    ]
    assert (notes.after("12"), notes.read("type", "13")) == (["13"], "0")
    again = looking.resubmit()
    assert (again.job_id, again.why) == (None, "job 13 is PENDING")


def test_one_node_type_is_what_the_script_says(run):
    queue = Queue({"12": "FAILED"})
    made(run, queue, types=[{}])[0].resubmit()
    assert queue.told == ["submit --comment=hpc_resume: after 12 12 12 0"]


def test_a_run_that_was_to_move_on_asks_for_the_next_type(run):
    queue = Queue({"12": "FAILED"})
    looking, notes = made(run, queue)
    notes.write("from", "12", "1")
    looking.resubmit()
    assert queue.told[0].endswith("--partition=low --nodes=1 --ntasks-per-node=1 12 12 1")


@pytest.mark.parametrize(
    ("ended", "why"),
    [
        ({"decision": "done", "why": "all steps are done"}, "all steps are done"),
        ({"decision": "stop", "why": "a person cancelled it"}, "a person cancelled it"),
    ],
)
def test_a_last_word_is_the_last_one(run, ended, why):
    queue = Queue({"12": "FAILED"})
    answer = made(run, queue, ended=ended)[0].resubmit()
    assert (answer.over, answer.why) == (True, why)
    assert queue.told == []


def test_an_interrupted_attempt_goes_on(run):
    queue = Queue({"12": "FAILED"})
    assert made(run, queue, ended={"decision": "continue"})[0].resubmit().job_id == "13"


@pytest.mark.parametrize("cancelled", ["12", "13"])
def test_a_cancelled_job_ends_the_run(run, cancelled):
    queue = Queue({"12": "FAILED", "13": "COMPLETED"} | {cancelled: "CANCELLED"})
    looking, notes = made(run, queue)
    notes.write("after", "12", "13")
    assert looking.resubmit().why == f"a person cancelled job {cancelled}"
    assert looking.resubmit().over
    assert queue.told == []


def test_a_refusal_leaves_no_claim(run):
    queue = Queue({"12": "FAILED"}, refuses="submit")
    looking, notes = made(run, queue)
    with pytest.raises(SchedulerError, match="refused"):
        looking.resubmit()
    queue.refuses = ""
    assert looking.resubmit().job_id == "13"
    assert notes.after("12") == ["13"]


def test_somebody_elses_claim_is_respected_while_it_is_fresh(run, monkeypatch):
    queue = Queue({"12": "FAILED"})
    looking, notes = made(run, queue)
    notes.claim("after", "12")
    monkeypatch.setattr(Notes, "age_s", lambda *_: 59.0)
    assert looking.resubmit().why == "somebody else is submitting it"
    monkeypatch.setattr(Notes, "age_s", lambda *_: 61.0)
    assert looking.resubmit().job_id == "13"


def test_what_a_dead_claimant_has_submitted_is_found(run):
    queue = Queue({"12": "FAILED", "13": "PENDING"}, comments={"hpc_resume: after 12": "13"})
    looking, notes = made(run, queue)
    notes.claim("after", "12")
    assert looking.resubmit().why == "job 13 waits to go on"
    assert notes.after("12") == ["13"]
    assert queue.told == []


@pytest.mark.parametrize("states", [{"12": SILENT}, {"12": "FAILED", "13": SILENT}])
def test_nothing_is_submitted_while_slurm_does_not_answer(run, monkeypatch, states):
    queue = Queue(states)
    looking, notes = made(run, queue)
    if "13" in states:
        notes.write("after", "12", "13")
        monkeypatch.setattr(Notes, "age_s", lambda *_: 3600.0)
    with pytest.raises(SchedulerError, match=r"no answer .* nothing was submitted"):
        looking.resubmit()
    assert queue.told == []


def test_a_run_without_a_script_cannot_be_submitted(run):
    looking, notes = made(run, Queue({"12": "FAILED"}))
    notes.path("script", "12").unlink()
    with pytest.raises(CheckpointNotFound, match="has left no script"):
        looking.resubmit()


# -- other node types -------------------------------------------------------------------------------------


def test_a_job_of_the_same_shape_is_moved_in_place(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)})
    looking, notes = made(run, queue)
    assert looking.move_on().why == "job 12 asks for b now"
    assert queue.told == [
        "check --partition=low --nodes=1 --ntasks-per-node=1",
        "change 12 Features= Partition=low",
    ]
    assert notes.read("type", "12") == "1"


def test_what_slurm_could_never_run_is_replaced(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)}, after_change="BadConstraints")
    looking, notes = made(run, queue)
    assert looking.move_on().why == "job 13 asks for b in place of job 12"
    assert queue.told[1:] == [
        "change 12 Features= Partition=low",
        "change 12 Features=a100 Partition=main",
        "hold 12",
        "submit --partition=low --nodes=1 --ntasks-per-node=1 12 12 1",
        "cancel 12",
    ]
    assert (notes.read("type", "12"), notes.read("type", "13"), notes.after("12")) == ("0", "1", ["13"])


def test_another_shape_is_another_job(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)})
    looking, _ = made(run, queue)
    assert looking.move_on("c").why == "job 13 asks for c in place of job 12"
    assert [told.split()[0] for told in queue.told] == ["check", "hold", "submit", "cancel"]


def test_a_job_that_can_not_be_replaced_keeps_its_place(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)}, refuses="submit")
    looking, _ = made(run, queue)
    with pytest.raises(SchedulerError):
        looking.move_on("c")
    assert queue.told[-1] == "release 12"


def test_where_slurm_would_never_run_it_nothing_is_changed(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)}, refuses="check")
    with pytest.raises(SchedulerError):
        made(run, queue)[0].move_on()
    assert [told.split()[0] for told in queue.told] == ["check"]


def test_a_job_that_waits_for_the_wanted_type_already_may_begin(run):
    queue = Queue({"12": "TIMEOUT", "13": "PENDING", "14": "PENDING"}, waits={"13": ("Resources", NOW_S)})
    looking, notes = made(run, queue)
    notes.write("after", "12", "13 14")
    notes.write("type", "14", "1")
    assert looking.move_on().why == "job 14 may begin on b now"
    assert queue.told == ["change 14 StartTime=now"]


@pytest.mark.parametrize(("to", "words"), [("x", "'x' is none of"), (None, "c is the last of")])
def test_a_node_type_that_is_not_there(run, to, words):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)})
    looking, notes = made(run, queue)
    notes.write("type", "12", "2")
    with pytest.raises(UsageError, match=words):
        looking.move_on(to)


def test_a_running_job_stays(run):
    looking, _ = made(run, Queue({"12": "RUNNING"}))
    with pytest.raises(SchedulerError, match="does not wait for nodes"):
        looking.move_on()


# -- watching ---------------------------------------------------------------------------------------------


def test_a_watch_moves_on_when_the_wait_limit_is_over_and_ends_with_the_run(run):
    queue = Queue({"12": "PENDING"}, waits={"12": ("Resources", NOW_S)})
    looking, notes = made(run, queue)
    said = []

    def say(text):
        said.append(text)
        if text.startswith("job 12 asks for b"):
            queue.states["12"] = "COMPLETED"
            notes.write("over", "12", "all steps are done")

    assert looking.watch(every_s=25, say=say).over
    assert said == ["job 12 is PENDING", "job 12 asks for b now", "all steps are done"]


def test_the_newer_code_is_taken_if_that_is_asked_for(run, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("x = 1\n")
    queue = Queue({"12": "FAILED"})
    looking, _ = made(run, queue)
    with pytest.raises(UsageError, match=r"environment\.source=live"):
        looking.refresh_source()
    sources = Sources.of(run)
    first = take_source(sources, read_source(project))
    sources.choose(first)
    assert looking.refresh_source() == "nothing has changed"
    assert sources.chosen().digest == first.digest
    (project / "train.py").write_text("x = 2\n")
    assert looking.refresh_source() == "train.py"
    assert sources.read(sources.chosen().digest, ["train.py"]) == {"train.py": b"x = 2\n"}
    queue.states["12"] = "RUNNING"
    with pytest.raises(UsageError, match="job 12 is RUNNING"):
        looking.refresh_source()
    queue.states["12"] = SILENT
    with pytest.raises(SchedulerError, match="no answer"):
        looking.refresh_source()
    queue.states["12"] = "PENDING"
    (project / "train.py").unlink()
    project.rmdir()
    with pytest.raises(UsageError, match="not there any more"):
        looking.refresh_source()
