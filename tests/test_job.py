import os
import signal
import time
from pathlib import Path

import pytest
from submitit.core.utils import UncompletedJobError

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, SchedulerError, UsageError
from hpc_resume.job import Job, Sweep, submit
from hpc_resume.launch.grid import grid
from hpc_resume.launch.handle import JobHandle, find_jobs
from hpc_resume.scheduler.local import LocalState

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    yield tmp_path
    for path in tmp_path.glob("runs/*/*/jobs/*_state.json"):  # whatever a failed test has left running
        state = LocalState.read(path)
        if state.alive() and state.controller_pid != os.getpid():
            os.kill(state.controller_pid, signal.SIGKILL)


def hello(name):
    print("hello", name)  # noqa: T201 - into the log
    return name.upper()


def test_a_job_is_submitted_waited_for_and_found_again(here):
    job = submit(hello, config={"name": "greeting"}, name="world")
    assert job.result(60) == "WORLD"
    assert job.log().splitlines()[-1] != ""
    assert "hello world" in job.log()
    assert (job.state, job.checkpoints, job.run_dir) == ("COMPLETED", [], here / "runs" / "greeting")
    again = Job.of("runs/greeting")
    assert (again.id, again.result(60)) == (job.id, "WORLD")


def test_a_job_shows_itself_as_a_table():
    job = submit(hello, config={"name": "greeting"}, name="world")
    job.wait(60)
    assert repr(job).startswith("greeting: done")
    assert f"(job {job.id}: COMPLETED)" in repr(job)
    assert "<b>greeting: done" in job._repr_html_()
    assert job.status().state == "done"
    assert repr(job.explain()) == "greeting is done\n    nothing is left to do"


def test_a_failed_job_has_no_result_but_a_reason():
    job = submit(hello, config={"name": "greeting"}, name=3)
    with pytest.raises(UncompletedJobError, match="has no attribute 'upper'"):
        job.result(60)
    assert (job.state, job.status().state) == ("FAILED", "failed")
    assert "rank 0 failed with exit code 1" in repr(job)


def test_a_command_has_no_result():
    job = submit(["true"])
    with pytest.raises(UsageError, match="runs a command, which has no result"):
        job.result(60)


def test_a_log_that_is_not_there_is_named():
    job = submit(["true"])
    job.wait(60)
    with pytest.raises(CheckpointNotFound, match="rank 5 has not begun"):
        job.log(5)


def test_a_run_that_was_never_submitted(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no run directory"):
        Job.of(tmp_path)


def train(lr, seed=0, until=None, fail=None):
    """Wait for a file; fail for one of the seeds."""
    import os
    import time

    while until and not os.path.exists(until):  # noqa: PTH110 - sent by value, with what it imports
        time.sleep(0.01)
    if seed == fail:
        raise ValueError("no such luck")
    return lr, seed, os.environ["HPC_RESUME_RUN_DIR"], os.environ["HPC_RESUME_CONFIG"]


def test_a_grid_of_runs_is_submitted_waited_for_and_found_again(here):
    sweep = submit(
        train, grid(lr=[1e-3, 3e-4], seed=range(2)), config={"name": "gpt", "array": {"at_once": 2}}
    )
    assert sweep.wait(100) == dict.fromkeys(sweep.names, "COMPLETED")
    for name, (lr, seed) in zip(sweep.names, [(1e-3, 0), (1e-3, 1), (3e-4, 0), (3e-4, 1)], strict=True):
        assert sweep[name].run_dir == here / "runs" / "gpt" / name
        found = sweep[name].result(10)
        assert found[:3] == (lr, seed, str(sweep[name].run_dir))
        assert Config.load(found[3]).entry.kwargs == {"lr": lr, "seed": seed}
    assert "4 runs submitted as job" in repr(sweep)
    again = Sweep("runs/gpt")
    assert (again.names, len(again), again[0].id) == (sweep.names, 4, sweep[0].id)
    assert [job.id for job in again] == [job.id for job in sweep.runs.values()]
    assert repr(again).splitlines()[0] == "gpt: 4 runs: 4 done"
    assert "<td>lr=" not in again._repr_html_()
    assert "<td>0.0003</td>" in again._repr_html_()
    assert "lr=0.001,seed=1: done" in repr(again[1])
    with pytest.raises(UsageError, match="has no run 'lr=7'"):
        again["lr=7"]


def test_a_grid_that_grew_keeps_what_is_done_and_takes_the_rest(here):
    first = submit(train, grid(lr=[1], seed=range(3)), config={"name": "gpt"}, fail=1)
    assert list(first.wait(100).values()) == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [each.state for each in first.status()] == ["done", "failed", "done"]
    second = submit(train, grid(lr=[1, 2], seed=range(3)), config={"name": "gpt"}, fail=1)
    assert "2 runs done already" in repr(second)
    second.wait(100)
    jobs = [find_jobs(here / "runs" / "gpt" / name) for name in second.names]
    assert [len(each) for each in jobs] == [1, 2, 1, 1, 1, 1]


def refusing(patch, job_id):
    """Let one job not be cancelled, as one that another machine has submitted."""
    cancel = JobHandle.cancel

    def refuse(job):
        if job.job_id == job_id:
            raise SchedulerError(f"job {job_id}: scancel was refused: try later")
        cancel(job)

    patch.setattr(JobHandle, "cancel", refuse)


def test_runs_that_are_alive_are_not_submitted_twice_and_cancelled_for_good(here, monkeypatch):
    sweep = submit(train, grid(lr=[1, 2, 3]), config={"name": "gpt"}, until=str(here / "go"))
    with pytest.raises(TimeoutError, match="3 of 3 runs are not over after 0 s; they go on"):
        sweep.wait(0)
    more = submit(train, grid(lr=[3, 4]), config={"name": "gpt"}, until=str(here / "go"))
    assert "1 run in the queue or running, not submitted twice: lr=3" in repr(more)
    assert sweep["lr=3"].id == more["lr=3"].id
    sweep["lr=3"].cancel()  # one that waits
    assert sweep["lr=3"].wait(60) == "CANCELLED"
    assert sweep["lr=1"].state in {"PENDING", "RUNNING"}
    with monkeypatch.context() as patch:
        refusing(patch, sweep["lr=1"].id)
        with pytest.raises(SchedulerError, match=r"^job \S+: scancel was refused: try later$"):
            Sweep(sweep.folder).cancel()
    assert [more[name].wait(60) for name in ("lr=3", "lr=4")] == ["CANCELLED", "CANCELLED"]
    Sweep(sweep.folder).cancel()
    assert Sweep(sweep.folder).wait(60) == dict.fromkeys(["lr=1", "lr=2", "lr=3", "lr=4"], "CANCELLED")
    (here / "go").touch()
    again = submit(train, grid(lr=[1, 2]), config={"name": "gpt"}, until=str(here / "go"))
    assert list(again.wait(100).values()) == ["COMPLETED", "COMPLETED"]


def test_no_more_than_at_once_run_at_the_same_time(here):
    sweep = submit(train, grid(seed=range(3)), config={"name": "gpt"}, lr=1, until=str(here / "go"))
    while (states := list(sweep.states().values())) != ["RUNNING", "PENDING", "PENDING"]:
        assert states == ["PENDING"] * 3
        time.sleep(0.05)
    (here / "go").touch()
    assert set(sweep.wait(100).values()) == {"COMPLETED"}
    records = [job._handle.submitit_job().paths.result_pickle.stat().st_mtime for job in sweep]
    assert records == sorted(records)


def train_element(seed, gates):
    from tests.run.training import train_slowly

    train_slowly(seed, gates, 100)


def test_a_run_of_an_array_is_preempted_and_goes_on_by_itself(here):
    sweep = submit(
        train_element, grid(seed=range(2)), config={"name": "gpt", "array": {"at_once": 2}}, gates=str(here)
    )
    while not all(each.step > 3 for each in sweep.status()):
        assert {each.state for each in sweep.status()} <= {"waiting", "running"}, sweep[0].log()
        time.sleep(0.1)
    sweep[0].preempt()
    while len(sweep[0].status().attempts) < 2:
        assert sweep[0].state in {"RUNNING", "PENDING"}, sweep[0].log()
        time.sleep(0.1)
    for seed in ("0", "1"):
        (here / seed).touch()
    assert set(sweep.wait(100).values()) == {"COMPLETED"}
    found = Sweep(sweep.folder).status()
    assert [(each.state, each.step, each.attempts) for each in found] == [("done", 100, 2), ("done", 100, 1)]
    first = sweep[0].status().attempts[0]
    assert (first.cause, first.steps_lost) == ("preemption", 0)
    assert sweep.table().columns == ("seed", "state", "step", "attempts", "job", "loss")
    assert all(each.metrics["loss"] > 0 for each in found)
