"""A job runs the code as it was submitted, on the embedded scheduler, whatever becomes of the files meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.entry import CommandEntry, TargetEntry, make_entry
from hpc_resume.launch.handle import find_jobs
from hpc_resume.launch.sourced import Moved, Project, module_place, source_start
from hpc_resume.launch.submit import submit, submit_entry
from hpc_resume.launch.sweep import submit_sweep
from hpc_resume.provenance.sources import Sources
from hpc_resume.rundir import RunDirectory

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import os, sys, time
from pathlib import Path
from helpers import VALUE

def train(until):
    Path("begun").touch()
    while not os.path.exists(until):
        time.sleep(0.01)
    import late
    inside = Path(__file__).parent
    data = (inside / "data" / "numbers.bin").read_bytes()
    return "submitted", VALUE, late.VALUE, str(Path.cwd()), data

if __name__ == "__main__":
    Path("out").write_text(repr(train(sys.argv[1])) + str(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a script, modules beside it, and data; jobs that a test leaves running are ended."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt.py").write_text(SCRIPT)
    (tmp_path / "helpers.py").write_text("VALUE = 'submitted'\n")
    (tmp_path / "late.py").write_text("VALUE = 'submitted'\n")
    (tmp_path / "lr.yaml").write_text("lr: 1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers.bin").write_bytes(b"live")
    yield tmp_path
    for run in (tmp_path / "runs").glob("*"):
        for job in find_jobs(run):
            record = job.submitit_job().state_record()
            if record.alive():
                os.kill(record.controller_pid, signal.SIGKILL)


def edit(project):
    for name in ("gpt.py", "helpers.py", "late.py"):
        path = project / name
        path.write_text(path.read_text().replace("submitted", "edited"))
    (project / "lr.yaml").write_text("lr: 2\n")


def until(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("target", ["gpt.py:train", "gpt:train"])
def test_what_a_job_imports_late_is_as_it_was_submitted(project, target):
    job = submit(target, until=str(project / "go"))
    until((project / "begun").exists)
    edit(project)
    (project / "go").touch()
    assert job.wait(timeout_s=180) == "COMPLETED"
    assert job.submitit_job().result() == ("submitted", "submitted", "submitted", str(project), b"live")


def test_a_job_runs_what_is_there_if_that_is_asked_for(project):
    job = submit("gpt.py:train", config={"environment": {"source": "live"}}, until=str(project / "go"))
    edit(project)  # its interpreter has not even started
    (project / "go").touch()
    assert job.wait(timeout_s=180) == "COMPLETED"
    assert job.submitit_job().result()[:3] == ("edited", "edited", "edited")
    assert not (job.run_dir / "sources").exists()


@pytest.mark.parametrize("words", [["gpt.py"], ["-u", "-m", "gpt"]])
def test_a_command_runs_as_it_was_submitted(project, words):
    job = submit([sys.executable, *words, str(project / "go"), "--config=lr.yaml", "lr.yaml"])
    edit(project)
    (project / "go").touch()
    assert job.wait(timeout_s=180) == "COMPLETED", job.log_path().read_text()
    told = (project / "out").read_text()
    assert told.startswith(f"('submitted', 'submitted', 'submitted', '{project}', b'live')"), told
    (tree,) = (job.run_dir / "sources").glob("*/")
    assert told.endswith(f"['--config={tree}/lr.yaml', '{tree}/lr.yaml']")
    assert (tree / "lr.yaml").read_text() == "lr: 1\n"


def test_a_function_of_a_module_is_looked_up_in_the_snapshot(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{project}")
    (project / "mine.py").write_text("import helpers\ndef train():\n    return helpers.VALUE\n")
    import mine

    try:
        job = submit(mine.train)
    finally:
        for name in ("mine", "helpers"):
            sys.modules.pop(name, None)
    edit(project)
    assert job.wait(timeout_s=180) == "COMPLETED", job.log_path().read_text()
    assert job.submitit_job().result() == "submitted"


def test_the_code_stays_the_same_in_every_attempt(project):
    """The first attempt asks to be continued; the code is edited before the second one begins."""
    (project / "gpt.py").write_text(
        "import os, sys, time\nfrom helpers import VALUE\n"
        "def train():\n"
        "    if os.environ['HPC_RESUME_RESTART_COUNT'] == '0':\n"
        "        open('first', 'w').write(VALUE)\n"
        "        while not os.path.exists('go'): time.sleep(0.01)\n"
        "        sys.exit(75)\n"
        "    return VALUE\n"
    )
    job = submit("gpt.py:train")
    until((project / "first").exists)
    edit(project)
    (project / "go").touch()
    assert job.wait(timeout_s=180) == "COMPLETED"
    assert job.submitit_job().result() == "submitted"
    assert job.submitit_job().state_record().restarts == 1


def test_submitting_again_takes_the_newer_code_and_says_what_is_new(project, capsys):
    (project / "go").touch()
    submit("gpt.py:train", until=str(project / "go")).wait(timeout_s=180)
    assert "code" not in capsys.readouterr().err
    (project / "helpers.py").write_text("VALUE = 'edited'\n")
    (project / "more.py").touch()
    job = submit("gpt.py:train", until=str(project / "go"))
    assert "the code is not what the run's last job ran: helpers.py, +more.py" in capsys.readouterr().err
    job.wait(timeout_s=180)
    assert job.submitit_job().result()[:2] == ("submitted", "edited")
    assert len(list((job.run_dir / "sources").glob("*.zip"))) == 2


def test_submitting_again_runs_the_same_code_if_that_is_asked_for(project):
    entry, kwargs = make_entry("gpt.py:train", {"until": str(project / "go")}), {"until": str(project / "go")}
    (project / "go").touch()
    with pytest.raises(UsageError, match="no job of this run ran from a snapshot"):
        submit_entry(entry, None, run_dir=None, kwargs=kwargs, same_source=True)
    submit("gpt.py:train", **kwargs).wait(timeout_s=180)
    edit(project)
    job = submit_entry(entry, None, run_dir=None, kwargs=kwargs, same_source=True)
    job.wait(timeout_s=180)
    assert job.submitit_job().result()[:3] == ("submitted", "submitted", "submitted")


def test_runs_of_an_array_share_one_snapshot(project):
    (project / "go").touch()
    submission = submit_sweep(
        "gpt.py:train",
        [{"until": str(project / "go")}, {"until": str(project / "lr.yaml")}],
        None,
        run_dir=None,
        kwargs={},
        finished=lambda _: False,
    )
    edit(project)
    for job in submission.jobs.values():
        assert job.wait(timeout_s=180) == "COMPLETED"
        assert job.submitit_job().result()[:3] == ("submitted", "submitted", "submitted")
        assert [path.name for path in (job.run_dir / "sources").iterdir()] == ["chosen.json"]
    assert len(list((submission.folder / "sources").glob("*.zip"))) == 1


def test_a_project_that_is_too_large_is_refused_before_anything_is_written(project, monkeypatch):
    from hpc_resume.provenance import source

    monkeypatch.setattr(source, "MOST_FILES", 3)
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(UsageError, match=r"its source has 4 files .*environment.source=live"):
        submit("gpt.py:train", until="go")
    assert not (project / "runs").exists()


def test_a_lost_folder_is_made_anew_from_the_archive(project):
    (project / "go").touch()
    job = submit("gpt.py:train", until=str(project / "go"))
    job.wait(timeout_s=180)
    (tree,) = (job.run_dir / "sources").glob("*/")
    shutil.rmtree(tree)
    assert Sources.of(RunDirectory(job.run_dir)).check_out(tree.name) == tree
    assert (tree / "helpers.py").read_text() == "VALUE = 'submitted'\n"
    assert (tree / "helpers.py").stat().st_mode & 0o222 == 0


def test_where_a_project_is_found_from(project):
    assert source_start(TargetEntry(place=str(project / "gpt.py"), function="train")) == project / "gpt.py"
    assert source_start(CommandEntry(command=("python", "-u", "gpt.py", "late.py"))) == project / "gpt.py"
    assert source_start(CommandEntry(command=("torchrun", "-m", "gpt"))) == project / "gpt.py"
    assert source_start(CommandEntry(command=("true",))) is None
    assert source_start(CommandEntry(command=("bash", "-c", "x" * 5000 + " gpt.py"))) is None
    assert source_start(CommandEntry(command=("python", "-m", "json.tool"))) is None
    (project / "run.sh").touch()
    assert source_start(CommandEntry(command=("bash", "run.sh"))) == project / "run.sh"
    assert Project.of(CommandEntry(command=("true",)), Config()).source is None


def test_which_word_names_a_module(project):
    assert module_place(["python", "-u", "-m", "gpt", "x"]) == 3
    assert module_place(["python", "gpt.py", "-m", "late"]) is None
    assert module_place(["python", "-m", "json"]) is None
    assert module_place(["python", "-m"]) is None


def test_paths_into_the_project_are_exchanged_and_no_others(project, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    (copy / "gpt.py").touch()
    (copy / "data").symlink_to(project / "data")
    moved = Moved(root=project, folder=copy)
    assert moved.path("gpt.py") == moved.path(project / "gpt.py") == copy / "gpt.py"
    assert moved.path("late.py") is None  # not in the copy
    assert moved.path("data/numbers.bin") is None  # the same file either way
    assert moved.path("/etc/passwd") is None
    assert moved.entry(CommandEntry(command=("./gpt.py", "late.py", "-m", "gpt"))).command == (
        str(copy / "gpt.py"),
        "late.py",
        "-m",
        "gpt",
    )
    assert moved.search_path(["", "/usr", str(project), "nowhere"]) == [str(copy)]


def test_the_record_of_what_is_chosen_is_sealed(project):
    (project / "go").touch()
    job = submit("gpt.py:train", until=str(project / "go"))
    job.wait(timeout_s=180)
    sources = Sources.of(RunDirectory(job.run_dir))
    path = sources.folder / "chosen.json"
    chosen = sources.chosen()
    assert (chosen.root, chosen.git, chosen.shared) == (str(project), None, False)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "root": "/elsewhere"}, indent=1))
    assert [(found.name, "damaged" in problem) for found, problem in sources.check()] == [
        ("chosen.json", True)
    ]


def test_a_script_for_sbatch_runs_from_a_snapshot_if_that_is_asked_for(project):
    words = ["script", "-o", "scheduler=slurm", "--", "python", "gpt.py", "go"]
    shown = CliRunner().invoke(main, words)
    assert "python gpt.py go" in shown.stdout
    assert not (project / "runs").exists()
    shown = CliRunner().invoke(main, [*words[:3], "-o", "environment.source=snapshot", *words[3:]])
    assert shown.exit_code == 0, shown.output
    (tree,) = (project / "runs" / "gpt" / "sources").glob("*/")
    assert f"python {tree}/gpt.py go" in shown.stdout
    edit(project)
    (project / "go").touch()
    subprocess.run([sys.executable, tree / "gpt.py", "go"], check=True)
    assert (project / "out").read_text().startswith("('submitted', 'submitted', 'submitted'")
    shown = CliRunner().invoke(main, [*words[:3], "-o", "environment.source=snapshot", "--", "true"])
    assert (shown.exit_code, "names no script or module" in shown.stderr) == (2, True)
