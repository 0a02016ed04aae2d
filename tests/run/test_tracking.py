"""Trackers: one run, each step once, and nothing that they do ends a training."""

import os
import random
import threading

import pytest
import torch

import hpc_resume as hr
from hpc_resume.errors import UsageError
from hpc_resume.report.metrics import read_metrics
from hpc_resume.run.tracking.ledger import Ledger
from hpc_resume.run.tracking.trackers import DONE, Silent, Trackers, needed
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt
from tests.run import tracked


def losses(run_dir):
    return {row.step: row.values["loss"] for row in read_metrics(run_dir)}


def interrupted(run_dir, function, *args, size=1):
    """Fail at step 10, after the checkpoint of step 8, and go on: steps 8 and 9 are done twice."""
    attempt = Attempt(run_dir, size, function, *args, 10)
    assert attempt.wait() == [75] * size, attempt.log.read_text()
    attempt = Attempt(run_dir, size, function, *args)
    assert attempt.wait() == [0] * size, attempt.log.read_text()
    rows = read_metrics(run_dir)
    assert [(row.step, row.attempt) for row in rows[7:9]] == [(7, 1), (8, 2)]
    return attempt.log.read_text()


def test_tensorboard_shows_each_step_once(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted(tmp_path, tracked.train, 14, "tensorboard")
    folder = tmp_path / "trackers" / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    accumulator = accumulators.EventAccumulator(str(folder))
    accumulator.Reload()
    found = accumulator.Scalars("loss")
    assert [each.step for each in found] == list(range(14))
    expected = losses(tmp_path)
    assert all(each.value == pytest.approx(expected[each.step], rel=1e-6) for each in found)
    assert len(accumulator.Scalars("lr")) == 14


def records(path):
    """Read what W&B has written: LevelDB's log format, with its own seven bytes before."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_offline_has_one_run_and_each_step_once(tmp_path):
    pytest.importorskip("wandb")
    interrupted(tmp_path, tracked.offline, 14)
    run_id = RunDirectory(tmp_path).identity()["run_id"]
    paths = sorted((tmp_path / "trackers" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(paths) == 2
    steps, ids = [], set()
    for path in paths:
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                names = {
                    "/".join(item.nested_key) or item.key: item.value_json for item in record.history.item
                }
                steps.append(record.history.step.num)
                assert float(names["loss"]) == pytest.approx(losses(tmp_path)[steps[-1]])
    assert ids == {run_id}
    assert steps == list(range(14))


def test_mlflow_has_one_run_and_each_step_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = tmp_path / "store"
    interrupted(tmp_path / "run", tracked.in_files, 14, str(store))
    client = mlflow.MlflowClient(tracking_uri=f"file://{store}")
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["hpc_resume.run_id"] == RunDirectory(tmp_path / "run").identity()["run_id"]
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [each.step for each in history] == list(range(14))


def test_only_rank_0_tracks(tmp_path):
    pytest.importorskip("tensorboard")
    attempt = Attempt(tmp_path, 2, tracked.train, 3, "tensorboard")
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert len(list((tmp_path / "trackers" / "tensorboard").iterdir())) == 1


def test_what_is_not_installed_is_told_with_what_to_install():
    with pytest.raises(UsageError, match=r"pip install 'hpc_resume\[wandb\]'"):
        needed("no_such_package_there_is", "wandb")


class Board:
    def __init__(self, name="board", during=lambda _: None):
        self.name, self.during, self.object = name, during, self
        self.told = []

    def send(self, rows):
        self.during(self)
        self.told += rows

    def flush(self):
        self.told.append("flush")

    def close(self, outcome):
        self.told.append(outcome)

    def end(self, outcome):
        self.told.append(threading.current_thread() is threading.main_thread())


def fail(_):
    raise ConnectionError("no server")


def test_a_tracker_that_fails_is_left_alone_and_the_others_go_on():
    said = []
    trackers, bad, good = Trackers(said.append), Board("bad", fail), Board()
    trackers.attach("bad", lambda: bad)
    trackers.attach("board", lambda: good)
    for step in range(3):
        trackers.send([(step, 0.0, {"loss": 1.0})])
    trackers.flush()
    trackers.close(DONE)
    assert good.told == [*((step, 0.0, {"loss": 1.0}) for step in range(3)), "flush", "done", True]
    assert bad.told == []
    assert said == ["bad FAILED and gets no more metrics: ConnectionError: no server"]
    with pytest.raises(UsageError, match="call it once"):
        trackers.attach("board", Board)


def test_a_tracker_that_hangs_keeps_nobody_waiting():
    said, leave = [], threading.Event()
    trackers = Trackers(said.append, close_s=0.05)
    trackers.attach("board", lambda: Board(during=lambda _: leave.wait()))
    for step in range(2000):
        trackers.send([(step, 0.0, {})])
    trackers.close(DONE)
    leave.set()
    assert [text.split(":")[0] for text in said] == ["a tracker is too slow", "board"]


def test_without_trackers_nothing_happens():
    trackers = Trackers(print)
    trackers.send([(0, 0.0, {})])
    trackers.flush()
    trackers.close(DONE)


def test_the_ledger_tells_each_step_once_and_is_its_run_s_own(tmp_path):
    path = tmp_path / "new" / "ledger.json"
    ledger = Ledger(path, "run-1")
    assert (ledger.id, ledger.told) == (None, -1)
    ledger.keep("there")
    rows = [(step, 0.0, {}) for step in range(5)]
    assert ledger.fresh(rows[:3]) == rows[:3]
    again = Ledger(path, "run-1")
    assert (again.id, again.told) == ("there", 2)
    assert again.fresh(rows[1:]) == rows[3:]
    assert again.fresh(rows) == []
    forked = Ledger(path, "run-2")
    assert (forked.id, forked.told) == (None, -1)
    path.write_text('{"run_id": "run-1", "id": 7}')
    assert Ledger(path, "run-1").id is None


def test_the_silent_object_takes_everything():
    silent = Silent()
    assert not silent
    with silent.anything(1, key=2) as inner:
        inner.attribute = 3
        inner["key"] = 4
    assert list(silent) == []
    assert not os.environ.get("WANDB_MODE")


class Drawing:
    """A tracker that makes up a name for itself."""

    name = "drawing"
    object = None

    def __init__(self):
        random.random()
        torch.rand(1)


def test_a_tracker_moves_no_generator(tmp_path):
    with hr.Run(tmp_path / "run") as run:
        run.track(net=torch.nn.Linear(1, 1))
        before = random.getstate(), torch.get_rng_state()
        run._attach(Drawing)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        run._session.trackers._attached.clear()
