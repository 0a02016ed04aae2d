from dataclasses import dataclass, field

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError
from hpc_resume.policy.decision import Decision
from hpc_resume.run.continuation import ByExitCode, ByRequeue, ByScript, choose
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import NoScheduler
from hpc_resume.scheduler.command import Completed
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.notes import Notes
from hpc_resume.scheduler.slurm import SlurmScheduler

RUNNING = "JobId=12\n   JobState=RUNNING Reason=None\n   Requeue=1 Restarts=0\n"
TYPES = [{"name": "a"}, {"name": "b"}]


@dataclass
class Slurm:
    """Answers as slurmctld does for a running job; remembers what it was told."""

    refused: str = ""
    told: list = field(default_factory=list)

    def __call__(self, words, timeout_s):
        if words[1] == "show":
            return Completed(code=0, out=RUNNING, err="")
        self.told.append(" ".join(words[1:]))
        refused = self.refused and self.refused in words
        return Completed(code=1 if refused else 0, out="", err="presently disabled" if refused else "")


def pick(tmp_path, runner, *, batch=True, environ=(), **settings):
    variables = {"SLURM_JOB_ID": "12", "HPC_RESUME_BATCH": "1" if batch else "", **dict(environ)}
    job = JobEnvironment.detect(variables, hostname="n1", pid=1)
    scheduler = SlurmScheduler("12", runner=runner) if job.kind == "slurm" else NoScheduler()
    return choose(Config(**settings), job, scheduler, RunDirectory(tmp_path))


def decided(**fields):
    return Decision(action="continue", why="", **fields)


def test_a_requeue_is_told_to_slurm(tmp_path):
    slurm = Slurm()
    way = pick(tmp_path, slurm)
    assert isinstance(way, ByRequeue)
    assert way.prepare() == ""
    assert way.go_on(decided()) == "requeued"
    assert slurm.told == ["requeue 12"]


def test_delay_and_nodes_are_told_after_the_requeue_and_to_the_script(tmp_path):
    slurm = Slurm()
    way = pick(tmp_path, slurm, slurm={"exclude": "n9"})
    said = way.go_on(decided(delay_s=60.4, exclude=("n1", "n2")))
    assert said == "requeued with StartTime now+60, ExcNodeList n9,n1,n2"
    assert slurm.told == ["requeue 12", "update JobId=12 StartTime=now+60 ExcNodeList=n9,n1,n2"]
    notes = Notes(tmp_path)
    assert (notes.read("delay", "12"), notes.read("exclude", "12")) == ("60", "n9,n1,n2")


def test_a_job_that_slurm_has_requeued_is_not_requeued_but_changed(tmp_path):
    slurm = Slurm()
    assert (
        pick(tmp_path, slurm).go_on(decided(delay_s=5), already=True).startswith("the scheduler has requeued")
    )
    assert slurm.told == ["update JobId=12 StartTime=now+5"]


def test_a_refused_change_does_not_undo_the_requeue(tmp_path):
    said = pick(tmp_path, Slurm(refused="update")).go_on(decided(delay_s=5))
    assert said.startswith("requeued, without StartTime now+5: ")


def test_a_refused_requeue_is_an_error(tmp_path):
    with pytest.raises(SchedulerError, match="refused"):
        pick(tmp_path, Slurm(refused="requeue")).go_on(decided())


def test_what_is_left_to_the_script_calls_nobody(tmp_path):
    slurm = Slurm()
    way = pick(tmp_path, slurm)
    assert (
        way.leave(decided(delay_s=5)) == "left to the batch script by exit code 75, not before 5 s from now"
    )
    assert slurm.told == []
    assert Notes(tmp_path).read("delay", "12") == "5"


def test_moving_on_is_done_by_the_script(tmp_path):
    slurm = Slurm()
    way = pick(tmp_path, slurm, node_types=TYPES, environ={"HPC_RESUME_NODE_TYPE": "a"})
    assert way.go_on(decided(move_on=True)).endswith("on b")
    assert slurm.told == []
    assert Notes(tmp_path).first_type("12") == 1


@pytest.mark.parametrize("way", ["requeue", "chain", "exit", "login"])
def test_from_the_last_node_type_nobody_moves_on(tmp_path, way):
    given = pick(tmp_path, Slurm(), continuation=way, node_types=TYPES, environ={"HPC_RESUME_NODE_TYPE": "b"})
    assert "b, which is the last node type" in given.leave(decided(move_on=True))
    assert Notes(tmp_path).first_type("12") == 0


def test_a_chain_says_who_waits(tmp_path):
    way = pick(tmp_path, Slurm(), continuation="chain", environ={"HPC_RESUME_CHAIN": "7"})
    assert isinstance(way, ByScript)
    assert way.prepare().startswith("no job waits to go on")
    Notes(tmp_path).write("after", "12", "13 14")
    assert way.prepare() == way.go_on(decided()) == "job 13 or 14 waits to go on"
    way.end("all steps\nare done")
    assert Notes(tmp_path).read("over", "7") == "all steps are done"


@pytest.mark.parametrize(
    ("way", "words"),
    [("array", "the next element"), ("exit", "left to the batch script"), ("login", "hpc-resume resubmit")],
)
def test_no_scheduler_is_called_by_the_other_ways(tmp_path, way, words):
    slurm = Slurm()
    given = pick(tmp_path, slurm, continuation=way)
    assert words in given.go_on(decided())
    given.end("done")
    assert slurm.told == []


@pytest.mark.parametrize("way", ["requeue", "chain", "array", "exit", "login"])
def test_what_cannot_be_noted_ends_nothing(tmp_path, way):
    (tmp_path / "continuation").write_text("a file")
    given = pick(tmp_path, Slurm(), continuation=way)
    assert "can't be noted" in given.leave(decided(delay_s=5))
    given.end("done")


def test_without_our_batch_script_the_exit_code_is_what_remains(tmp_path):
    given = pick(tmp_path, Slurm(), batch=False, continuation="chain")
    assert isinstance(given, ByExitCode)
    assert "hpc-resume script" in given.go_on(decided())
    assert pick(tmp_path, Slurm(), batch=False).go_on(decided()) == "requeued"


@pytest.mark.parametrize("way", ["requeue", "chain", "login"])
def test_elsewhere_it_is_the_exit_code(tmp_path, way):
    given = pick(tmp_path, Slurm(), continuation=way, environ={"SLURM_JOB_ID": ""})
    assert given.go_on(decided()) == given.leave(decided()) == "left to exit code 75"
    assert given.prepare() == ""
    given.end("done")
    assert list(tmp_path.iterdir()) == []
