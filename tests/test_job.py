from pathlib import Path

import pytest
from submitit.core.utils import UncompletedJobError

from hpc_resume.errors import CheckpointNotFound, UsageError
from hpc_resume.job import Job, submit

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


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
