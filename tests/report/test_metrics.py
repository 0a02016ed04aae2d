"""Metrics of all ranks and attempts, put together."""

import json

import pytest

from hpc_resume.errors import CheckpointNotFound
from hpc_resume.report.metrics import read_metrics
from hpc_resume.rundir import RunDirectory


def write(run, attempt, rank, rows):
    folder = run.attempt(attempt)
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"metrics-rank-{rank:05d}.jsonl").write_text(text)


def test_the_mean_over_ranks_and_the_last_attempt_of_each_step(tmp_path):
    run = RunDirectory(tmp_path)
    run.create("x")
    write(run, 1, 0, [{"step": 0, "t": 1, "loss": 4.0}, {"step": 1, "t": 2, "loss": 3.0}])
    write(run, 1, 1, [{"step": 0, "t": 1, "loss": 2.0}, {"step": 1, "t": 2, "loss": 1.0}])
    write(run, 2, 0, [{"step": 1, "t": 9, "loss": 2.5, "rate": 0.1}])
    first, second = read_metrics(tmp_path)
    assert (first.step, first.attempt, first.values) == (0, 1, {"loss": 3.0})
    assert (second.step, second.attempt, second.values) == (1, 2, {"loss": 2.5, "rate": 0.1})


def test_a_torn_line_is_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    run.create("x")
    write(run, 1, 0, [{"step": 0, "loss": 4.0}])
    path = run.attempt(1) / "metrics-rank-00000.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "lo')
    assert [row.step for row in read_metrics(tmp_path)] == [0]


def test_no_run_directory(tmp_path):
    with pytest.raises(CheckpointNotFound):
        read_metrics(tmp_path)
