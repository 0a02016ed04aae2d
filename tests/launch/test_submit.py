import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, ConfigError, SchedulerError, UsageError
from hpc_resume.launch.entry import make_entry
from hpc_resume.launch.handle import JobHandle, find_jobs, jobs_folder, latest_job, live_job, states_of
from hpc_resume.launch.submit import resolve, submit
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.arrays import SlurmArrays
from hpc_resume.scheduler.command import Completed

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a script; jobs that a test leaves running are ended."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt.py").write_text(
        "import os, time\n"
        "def train(lr=1.0, until=None):\n"
        "    while until and not os.path.exists(until): time.sleep(0.01)\n"
        "    return lr, os.environ['HPC_RESUME_CONFIG'], os.environ['HPC_RESUME_RUN_DIR']\n"
    )
    yield tmp_path
    for run in (tmp_path / "runs").glob("*"):
        for job in find_jobs(run):
            record = job.submitit_job().state_record()
            if record.alive():
                os.kill(record.controller_pid, signal.SIGKILL)


def test_a_run_gets_its_name_folder_identity_and_record(here):
    job = submit("gpt.py:train", lr=0.5)
    run = RunDirectory(here / "runs" / "gpt")
    assert job.run_dir == run.root
    assert run.identity()["name"] == "gpt"
    assert job.wait(timeout_s=180) == "COMPLETED"
    lr, config_path, run_dir = job.submitit_job().result()
    assert (lr, run_dir) == (0.5, str(run.root))
    config = Config.load(config_path)
    assert config.digest() == job.config == Path(config_path).stem
    assert (config.entry.target, config.entry.kwargs) == (f"{here / 'gpt.py'}:train", {"lr": 0.5})
    assert (config.name, config.run_dir) == ("gpt", str(run.root))
    assert find_jobs(run.root) == [job]


def test_paths_of_data_are_those_of_the_submitting_folder(here):
    config = resolve(
        make_entry("gpt.py:train", {}), {"data": {"paths": ["images", "$TMP/x"]}}, run_dir=None, kwargs={}
    )
    assert config.data.paths == (str(here / "images"), "$TMP/x")


def test_a_function_of_a_notebook_travels(here):
    scale = 3

    def train(lr):
        return lr * scale

    job = submit(train, config={"name": "notebook"}, lr=2)
    assert job.wait(timeout_s=180) == "COMPLETED"
    assert job.submitit_job().result() == 6


def test_a_command_runs_on_every_rank_with_its_own_exit_code(here):
    (here / "work.py").write_text(
        "import os, sys\nprint(os.environ['SUBMITIT_LOCAL_GLOBALID'])\nsys.exit(3)\n"
    )
    job = submit([sys.executable, "work.py"], config={"node_types": [{"ranks": 2}]})
    assert job.run_dir.name == "work"
    assert job.wait(timeout_s=180) == "FAILED"
    record = job.submitit_job().state_record()
    assert 3 in record.exit_codes  # the other rank may have been ended because of it
    assert "exit code 3" in record.why
    logs = [job.log_path(rank).read_text() for rank in range(2)]
    assert any(log.splitlines()[-1] == str(rank) for rank, log in enumerate(logs))


def test_a_run_continues_in_its_directory_under_another_job(here):
    first = submit("gpt.py:train")
    first.wait(timeout_s=180)
    second = submit("gpt.py:train", config={"seed": 2})
    second.wait(timeout_s=180)
    assert (first.run_dir, first.job_id == second.job_id) == (second.run_dir, False)
    assert [job.job_id for job in find_jobs(first.run_dir)] == [first.job_id, second.job_id]
    assert latest_job(first.run_dir) == second
    assert len(list((first.run_dir / "configs").iterdir())) == 2


def test_a_run_with_a_live_job_is_refused(here):
    job = submit("gpt.py:train", until=str(here / "go"))
    assert live_job(job.run_dir) == job
    with pytest.raises(UsageError, match=rf"job {job.job_id} .*hpc-resume cancel"):
        submit("gpt.py:train")
    (here / "go").touch()
    job.wait(timeout_s=180)
    assert live_job(job.run_dir) is None
    assert len(find_jobs(job.run_dir)) == 1


def test_nothing_is_submitted_while_slurm_does_not_say_whether_a_job_is_over(here, monkeypatch):
    run = RunDirectory(here / "elsewhere")
    run.create("gpt")
    jobs_folder(run.root).mkdir()
    job = JobHandle(job_id="12", scheduler="slurm", run_dir=run.root, what="", config="", submitted=1.0)
    job.record()
    monkeypatch.setattr(JobHandle, "state", lambda _: "UNKNOWN")
    (here / "scontrol").touch(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    with pytest.raises(SchedulerError, match=r"does not say whether job 12 .* nothing was submitted"):
        submit("gpt.py:train", run_dir=run.root)
    assert find_jobs(run.root) == [job]
    monkeypatch.setenv("PATH", "/nowhere")  # a copy of the run, on a machine without Slurm
    assert live_job(run.root) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_jobs_of_a_colleague_are_asked_for_by_their_owner(here):
    run, asked = RunDirectory(here / "elsewhere"), []
    jobs = [
        JobHandle(job_id=job, scheduler="slurm", run_dir=run.root, what="", config="", submitted=1.0)
        for job in ("9_0", "9_1")
    ]
    jobs_folder(run.root).mkdir(parents=True)
    for job in jobs:
        job.record()
    os.chown(jobs[1].record_path, 1007, -1)

    def squeue(words, timeout_s):
        asked.extend(word for word in words if word.startswith("--user"))
        return Completed(code=0, out="9_1 RUNNING\n", err="")

    assert states_of(jobs, slurm=SlurmArrays(squeue)) == ["GONE", "RUNNING"]
    assert asked == ["--user=0,1007"]


def test_waiting_has_an_end(here):
    job = submit("gpt.py:train", until=str(here / "go"))
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(timeout_s=0)
    job.cancel()
    assert job.wait(timeout_s=180) == "CANCELLED"


@pytest.mark.parametrize(
    ("target", "options", "error", "word"),
    [
        ("gpt.py:trian", {}, UsageError, "did you mean train"),
        ("gpt.py:train", {"lrr": 1}, UsageError, "did you mean lr"),
        ("gpt.py:train", {"config": "no.yaml"}, ConfigError, "no such configuration file"),
        ("gpt.py:train", {"config": {"node_types": [{"ranks": 0}]}}, ConfigError, "node_types.0.ranks"),
        ("gpt.py:train", {"config": {"time_limit_s": 10}}, ConfigError, "warning_lead_s"),
        ("gpt.py:train", {"config": {"scheduler": "slurm"}}, UsageError, "no sbatch on PATH"),
        ("gpt.py:train", {"run_dir": "gpt.py"}, UsageError, "is a file"),
        ("gpt.py:train", {"run_dir": "."}, UsageError, "no run directory"),
        (
            "gpt.py:train",
            {"run_dir": "/proc/run"},
            UsageError,
            "can't be made a run directory .*give another",
        ),
        (["no-such-program-xyz"], {}, UsageError, "no such program"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(here, monkeypatch, target, options, error, word):
    monkeypatch.setenv("PATH", "/nowhere")
    before = sorted(here.rglob("*"))
    with pytest.raises(error, match=word):
        submit(target, **options)
    assert sorted(here.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_is_refused(here):
    (here / "shut").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="can't be written"):
        submit("gpt.py:train", run_dir=here / "shut" / "run")


def test_run_dir_beats_settings_and_settings_beat_the_scripts_name(here):
    entry = make_entry("gpt.py:train", {})
    assert resolve(entry, None, run_dir=None, kwargs={}).run_dir == str(here / "runs" / "gpt")
    assert resolve(entry, {"name": "a"}, run_dir=None, kwargs={}).run_dir == str(here / "runs" / "a")
    assert resolve(entry, {"name": "a"}, run_dir="x/{name}", kwargs={}).run_dir == str(here / "x" / "a")
    assert resolve(entry, Config(name="b"), run_dir=None, kwargs={}).name == "b"
    assert resolve(entry, Config(name="run"), run_dir=None, kwargs={}).name == "run"
    assert resolve(entry, Config(seed=1), run_dir=None, kwargs={}).name == "gpt"


def test_what_ran_before_is_not_mixed_with_what_is_recorded(here):
    entry = make_entry("gpt.py:train", {"lr": 2})
    before = Config(entry={"command": ["python", "old.py"], "kwargs": {"until": "x"}})
    recorded = resolve(entry, before, run_dir=None, kwargs={"lr": 2}).entry
    assert (recorded.command, recorded.kwargs) == ((), {"lr": 2})


def test_an_argument_that_is_no_yaml_is_recorded_as_text(here):
    entry = make_entry(lambda lr, when: None, {"lr": 1, "when": time})
    config = resolve(entry, None, run_dir=None, kwargs={"lr": 1, "when": time})
    assert config.entry.kwargs == {"lr": 1, "when": repr(time)}


def test_settings_from_variables_are_resolved_once(here, monkeypatch):
    """A flag beats a variable, also later, in the job, where the variable would still be there."""
    monkeypatch.setenv("HPC_RESUME_SEED", "5")
    monkeypatch.setenv("HPC_RESUME_BUDGET__MAX_IDLE", "7")
    (here / "show.py").write_text(
        "import os\nprint(sorted(k for k in os.environ if k.startswith('HPC_RESUME_')))\n"
    )
    job = submit([sys.executable, "show.py"], config={"seed": 6})
    config = Config.load(job.run_dir / "configs" / f"{job.config}.yaml")
    assert (config.seed, config.budget.max_idle) == (6, 7)
    assert job.wait(timeout_s=180) == "COMPLETED"
    names = job.log_path().read_text().splitlines()[-1]
    assert "HPC_RESUME_SEED" not in names
    assert "HPC_RESUME_CONFIG" in names


def test_a_run_without_jobs_has_no_latest(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no run directory"):
        latest_job(tmp_path)
    RunDirectory(tmp_path).create("run")
    with pytest.raises(CheckpointNotFound, match="started by hand"):
        latest_job(tmp_path)
