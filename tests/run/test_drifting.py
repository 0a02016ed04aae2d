"""What is not as it was when a checkpoint was taken is told on resume, and refused if it is too much."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.cli import main
from hpc_resume.job import submit
from hpc_resume.journal import read_events
from hpc_resume.launch.handle import find_jobs
from hpc_resume.rundir import RunDirectory, sealed
from tests.ranks import Attempt
from tests.run.training import train

REPOSITORY = Path(__file__).parents[2]


def train_from(source, *args, **settings):
    os.environ["HPC_RESUME_SOURCE"] = str(source)
    train(*args, **settings)


def attempt(run_dir, project, steps, *, size=1, **settings):
    running = Attempt(run_dir, size, partial(train_from, project / "train.py", steps, **settings))
    return running, running.wait()


def record(run_dir, number):
    return json.loads((RunDirectory(run_dir).attempt(number) / "attempt.json").read_text())


def events(run_dir, number, kind):
    return read_events(RunDirectory(run_dir).attempt(number) / "events.jsonl", {kind})


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("lr = 1\n")
    (folder / "old.py").write_text("")
    return folder


def test_code_and_settings_that_changed_between_attempts_are_told_and_shown(tmp_path, project):
    run_dir = tmp_path / "run"
    assert attempt(run_dir, project, 4)[1] == [0]
    first = record(run_dir, 1)["source"]
    assert (first["from"], first["root"], first["files"]) == ("live", str(project), 2)
    (project / "train.py").write_text("lr = 2\n")
    (project / "old.py").unlink()
    (project / "new.py").write_text("import os\n")
    running, codes = attempt(run_dir, project, 8, warning_lead_s=7)
    assert codes == [0]
    (told,) = events(run_dir, 2, "drift")
    second = record(run_dir, 2)["source"]["digest"]
    line = f"source: {first['digest']} → {second} (train.py, +new.py, -old.py)"
    assert (told["since"], told["look"], told["stop"]) == (1, [line], [])
    assert f"not as when step 4 was saved (look): {line}" in running.log.read_text()

    shown = call("diff", f"{run_dir}#1", f"{run_dir}#2")
    assert shown.exit_code == 1, shown.output
    lines = [line.strip() for line in shown.stdout.splitlines()]
    assert lines[0] == "run, attempt 1, step 4 → run, attempt 2, step 8: they differ"
    for expected in (
        "train.py (changed)",
        "-lr = 1",
        "+lr = 2",
        "new.py (added)",
        "+import os",
        "old.py (removed)",
        "harmless  warning_lead_s was 120.0, is 7.0",
    ):
        assert expected in lines
    assert [line for line in lines if line.startswith("model/0.weight: norm ")]
    found = json.loads(call("diff", "--json", f"{run_dir}@4", f"{run_dir}@8").stdout)
    assert found["equal"] is False
    assert {each["path"]: each["what"] for each in found["code"]} == {
        "train.py": "changed",
        "new.py": "added",
        "old.py": "removed",
    }
    assert [(each["name"], each["old"], each["new"]) for each in found["configuration"]] == [
        ("warning_lead_s", 120.0, 7.0)
    ]
    assert found["state"]["steps"] == [4, 8]
    assert found["unknown"] == []
    (folder,) = RunDirectory(run_dir).checkpoints.glob("0000000008-*")
    same = call("diff", folder, run_dir)
    assert same.exit_code == 0, same.output
    assert "equal bit for bit" in same.stdout
    assert call("diff", "--no-tensors", f"{run_dir}#1", run_dir).exit_code == 1
    assert call("diff", f"{run_dir}@5", run_dir).exit_code == 3
    assert call("diff", f"{run_dir}#9", run_dir).exit_code == 2
    assert call("diff", tmp_path, run_dir).exit_code == 3

    assert verify_run(run_dir) == []
    path = run_dir / "sources" / f"{first['digest']}.zip"
    path.write_bytes(path.read_bytes().replace(b"lr = 1", b"lr = 3"))
    assert [each.problem for each in verify_run(run_dir)] == ["train.py is not what was written"]
    damaged = call("diff", f"{run_dir}#1", f"{run_dir}#2", "--no-tensors")
    assert damaged.exit_code == 4
    assert "train.py is not what was written" in damaged.stderr


def test_another_major_version_of_torch_stops_the_run_unless_somebody_says_why_not(tmp_path, project):
    run_dir = tmp_path / "run"
    assert attempt(run_dir, project, 3)[1] == [0]
    before = record(run_dir, 1)
    before["environment"]["packages"]["torch"] = "1.13.1"
    (RunDirectory(run_dir).attempt(1) / "attempt.json").write_bytes(sealed(before))
    running, codes = attempt(run_dir, project, 6, size=2)
    assert codes == [2, 2]
    assert "torch: 1.13.1 → " in running.log.read_text()
    assert 'allow_drift: "REASON"' in running.log.read_text()
    (ended,) = events(run_dir, 2, "ended")
    assert (ended["decision"], ended["exit_code"]) == ("stop", 2)
    assert len(RunDirectory(run_dir).checkpoint_names()) == 1
    running, codes = attempt(run_dir, project, 6, allow_drift="the same to 1e-7")
    assert codes == [0]
    assert "goes on all the same: the same to 1e-7" in running.log.read_text()
    (allowed,) = events(run_dir, 3, "drift_allowed")
    assert allowed["why"] == "the same to 1e-7"


SCRIPT = """
import time
from pathlib import Path
import torch
import hpc_resume as hr
from value import VALUE

def train(steps):
    with hr.Run() as run:
        model = torch.nn.Linear(2, 1)
        run.track(model=model)
        for step, _ in run.steps(iter(int, 1), until=steps):
            with torch.no_grad():
                model.weight += VALUE
            Path("step").write_text(str(step))
            while run.attempt == 1 and step == 2 and not run._session.stopping.pending:
                time.sleep(0.01)
    return VALUE
"""


@pytest.mark.parametrize("source", ["snapshot", "live"])
def test_code_that_is_edited_between_attempts(tmp_path, monkeypatch, source):
    """The whole way: submitted, preempted, edited, continued; unchanged from the snapshot, told if live."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "gpt.py").write_text(SCRIPT)
    (tmp_path / "value.py").write_text("VALUE = 1\n")
    job = submit("gpt.py:train", config={"environment": {"source": source}}, steps=6)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "step").exists() or (tmp_path / "step").read_text() != "2":
            assert time.monotonic() < end, job.log()
            time.sleep(0.02)
        (tmp_path / "value.py").write_text("VALUE = 2\n")
        job.preempt()
        assert job.wait(60) == "COMPLETED", job.log()
    finally:
        for each in find_jobs(job.run_dir):
            state = each.submitit_job().state_record()
            if state.alive():
                os.kill(state.controller_pid, signal.SIGKILL)
    assert job.result(10) == (1 if source == "snapshot" else 2)
    one, two = (record(job.run_dir, number)["source"] for number in (1, 2))
    assert (one["from"], two["from"]) == (source, source)
    assert (one["digest"] == two["digest"]) == (source == "snapshot")
    drift = events(job.run_dir, 2, "drift")
    told = [line for each in drift for line in each["look"]]
    assert told == ([] if source == "snapshot" else [f"source: {one['digest']} → {two['digest']} (value.py)"])
    assert verify_run(job.run_dir) == []
