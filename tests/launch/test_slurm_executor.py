import subprocess
import sys

import pytest
import submitit
from submitit.slurm.slurm import SlurmJob

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.launch.slurm import ResumeSlurmExecutor


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """A PATH on which sbatch keeps the script and gives job 12, or refuses if there is a file ``refuse``."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f'#!/bin/bash\ncp "$1" {tmp_path}/script\n'
        f"if [ -e {tmp_path}/refuse ]; then echo 'sbatch: error: Invalid partition' >&2; exit 1; fi\n"
        "echo 'Submitted batch job 12'\n"
    )
    (tools / "srun").write_text("#!/bin/bash\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tmp_path


def executor(folder, config=None, **given):
    return ResumeSlurmExecutor(
        folder, config=config or Config(), run_dir=folder.parent, config_path=folder / "c.yaml", **given
    )


def test_the_script_is_ours_and_runs_submitits_command(login_node):
    config = Config.load(
        overrides={
            "time_limit_s": 90,
            "warning_lead_s": 10,
            "node_types": [{"nodes": 2, "tasks_per_node": 3}],
        }
    )
    folder = login_node / "50% done" / "jobs"
    job = executor(folder, config).submit(print, "hello")
    assert isinstance(job, SlurmJob)
    assert job.job_id == "12"
    assert job.num_tasks == 6
    assert (folder / "12_submitted.pkl").exists()
    lines = (login_node / "script").read_text().splitlines()
    escaped = str(folder).replace("%", "%%")
    assert f"#SBATCH --output='{escaped}/%j_0_log.out'" in lines
    assert "#SBATCH --time=00:01:30" in lines
    assert "export SUBMITIT_EXECUTOR=slurm" in lines
    assert f"export HPC_RESUME_CONFIG='{folder}/c.yaml'" in lines
    assert (
        f"    SLURM_EXIT_ERROR=194 srun --nodes=\"$SLURM_JOB_NUM_NODES\" --ntasks-per-node=3 --kill-on-bad-exit=1 '--output={escaped}/%j_%t_log.out' \\"
        in lines
    )
    assert f"        {sys.executable} -u -m submitit.core._submit '{folder}' &" in lines
    subprocess.run(["bash", "-n", login_node / "script"], check=True)


def test_the_jobs_interpreter(login_node):
    config = Config(environment={"python": "/opt/my env/bin/python"})
    executor(login_node / "jobs", config).submit(print)
    assert "    '/opt/my env/bin/python' -u -m submitit" in (login_node / "script").read_text()


def test_submitit_counts_with_the_time_limit(login_node):
    # submitit's own timer in the rank; without a limit it keeps its default
    config = Config.load(overrides={"time_limit_s": 7261, "node_types": [{}]})
    assert executor(login_node / "jobs", config).parameters["time"] == 122
    assert "time" not in executor(login_node / "jobs").parameters


def test_a_refusal_says_what_slurm_said(login_node):
    (login_node / "refuse").touch()
    with pytest.raises(SchedulerError, match=r"^sbatch refused the job: (.|\n)*Invalid partition"):
        executor(login_node / "jobs").submit(print)


def test_a_job_array_would_share_one_run_directory(login_node):
    with pytest.raises(UsageError, match=r"hr\.grid"):
        executor(login_node / "jobs").map_array(print, [1, 2])
    assert not (login_node / "script").exists()


def test_it_is_a_submitit_executor(login_node):
    assert isinstance(executor(login_node / "jobs"), submitit.SlurmExecutor)
