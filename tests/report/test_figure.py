"""The picture of a run."""

import json
import sys

import pytest

from hpc_resume.errors import UsageError
from hpc_resume.report.figure import draw_metric
from hpc_resume.rundir import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "mine")
    run.create("mine")
    for attempt, steps in ((1, range(10)), (2, range(8, 20))):
        folder = run.attempt(attempt)
        folder.mkdir()
        record = {
            "schema": 1,
            "attempt": attempt,
            "job_id": "1",
            "restart_count": 0,
            "nodes": ["n"],
            "world_size": attempt,
            "started": 1.0,
        }
        (folder / "attempt.json").write_text(json.dumps(record))
        (folder / "events.jsonl").write_text(
            json.dumps({"t": 1, "event": "restored", "step": steps[0]}) + "\n"
        )
        rows = "".join(json.dumps({"step": step, "loss": 5.0 - step / 10}) + "\n" for step in steps)
        (folder / "metrics-rank-00000.jsonl").write_text(rows)
    return run


def test_it_names_attempts_and_marks_restarts(run, tmp_path):
    text = draw_metric(run.root, tmp_path / "loss.svg", reference=run.root, smooth=2).read_text()
    assert text.startswith("<?xml")
    # matplotlib draws text as shapes, and leaves each as a comment.
    for label in (
        "attempt 1: 1 rank",
        "attempt 2: 2 ranks",
        "uninterrupted run",
        "mine: 2 attempts, one run",
    ):
        assert label in text, label


def test_a_metric_that_nobody_logged(run, tmp_path):
    with pytest.raises(UsageError, match="nothing was logged as 'accuracy'; there is: loss"):
        draw_metric(run.root, tmp_path / "x.png", metric="accuracy")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'hpc_resume\[report\]'"):
        draw_metric(run.root, tmp_path / "x.png")
