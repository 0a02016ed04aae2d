import dataclasses

import pytest

from hpc_resume.errors import SchedulerError
from hpc_resume.launch.chain import Chain
from hpc_resume.launch.handle import JobHandle
from hpc_resume.scheduler.base import UNKNOWN, JobFacts
from hpc_resume.scheduler.notes import Notes

SILENT, FORGOTTEN = "no answer within 10 s", "Invalid job id specified"


@dataclasses.dataclass
class Queue:
    """Slurm's queue: states, or why there is none. What has ended is refused by ``cancel``, as scancel does."""

    states: dict
    ends: tuple = ()
    cancelled: list = dataclasses.field(default_factory=list)

    def facts(self, job_id):
        said = self.states[job_id]
        return JobFacts(state=UNKNOWN if said in {SILENT, FORGOTTEN} else said, evidence=said)

    def forgotten(self, facts):
        return facts.evidence == FORGOTTEN

    def cancel(self, job_id):
        if job_id in self.ends:  # between the look and the cancel
            self.states[job_id] = FORGOTTEN
        if self.states[job_id] in {SILENT, FORGOTTEN}:
            raise SchedulerError(f"job {job_id}: scancel was refused: {self.states[job_id]}")
        self.cancelled.append(job_id)


def chain(folder, states, **given):
    """Job 12, which has begun, and those after it."""
    notes = Notes(folder)
    notes.write("latest", "12", "12")
    notes.write("after", "12", " ".join(job_id for job_id in states if job_id != "12"))
    return Chain(folder, "12", Queue(states, **given))


@pytest.mark.parametrize(
    ("states", "found"),
    [
        ({"12": "RUNNING", "13": "PENDING"}, "12"),
        ({"12": "FAILED", "13": "PENDING"}, "13"),
        ({"12": SILENT, "13": "PENDING"}, "13"),
        ({"12": FORGOTTEN, "13": "CANCELLED"}, "12"),
        ({"12": SILENT, "13": "CANCELLED"}, "12"),
        ({"12": "FAILED", "13": SILENT}, "13"),
        ({"12": FORGOTTEN, "13": "CANCELLED", "14": SILENT}, "14"),
    ],
)
def test_a_chain_is_over_only_if_slurm_says_so_of_each_job(tmp_path, states, found):
    assert chain(tmp_path, states).current()[0] == found


def test_a_job_whose_successor_slurm_does_not_speak_of_is_not_over(tmp_path, monkeypatch):
    made = chain(tmp_path, {"12": "FAILED", "13": SILENT})
    monkeypatch.setattr(JobHandle, "chain", lambda _: made)
    job = JobHandle(job_id="12", scheduler="slurm", run_dir=tmp_path, what="", config="", submitted=0.0)
    assert job.state() == "UNKNOWN"
    made.queue.states["13"] = FORGOTTEN
    assert job.state() == "FAILED"


@pytest.mark.parametrize(
    ("states", "cancelled"),
    [
        ({"12": "RUNNING", "13": "PENDING"}, ["13", "12"]),
        ({"12": FORGOTTEN, "13": "PENDING"}, ["13"]),
        ({"12": "FAILED", "13": FORGOTTEN}, []),
        ({"12": "REQUEUE_HOLD"}, ["12"]),
    ],
)
def test_a_cancel_is_for_what_is_not_over(tmp_path, states, cancelled):
    made = chain(tmp_path, states)
    made.cancel("a person cancelled it")
    assert made.queue.cancelled == cancelled
    assert made.over() == "a person cancelled it"


def test_a_job_that_ends_before_it_can_be_cancelled_is_no_error(tmp_path):
    made = chain(tmp_path, {"12": "COMPLETING", "13": "PENDING"}, ends=("12",))
    made.cancel("a person cancelled it")
    assert made.queue.cancelled == ["13"]


def test_a_job_that_slurm_does_not_speak_of_is_cancelled_or_said(tmp_path):
    with pytest.raises(SchedulerError, match="job 12: scancel was refused: no answer"):
        chain(tmp_path, {"12": SILENT}).cancel("a person cancelled it")
