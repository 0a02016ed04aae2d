"""Damage to a run's records is found, whichever file and byte it hits."""

import json
import shutil

import pytest

from hpc_resume.config import Config
from hpc_resume.provenance.datasnapshot import DataSnapshot, FileEntry
from hpc_resume.records import check_records, data_path
from hpc_resume.run.attempt import begin_attempt
from hpc_resume.run.metrics import Metrics
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import NoScheduler
from hpc_resume.scheduler.environment import JobEnvironment


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of two attempts, as ranks write it."""
    run = RunDirectory(tmp_path_factory.mktemp("written") / "run")
    environment = JobEnvironment.detect({}, hostname="here", pid=1)
    snapshot = DataSnapshot(files={"a.txt": FileEntry(size_bytes=3, digest="5f" * 16)})
    run.data.mkdir(parents=True)
    data_path(run, snapshot.digest).write_bytes(snapshot.to_bytes())
    for seed in (0, 1):
        facts, journal = begin_attempt(
            run, environment, NoScheduler(), Config(name="run", seed=seed), nodes=["here"], clock=lambda: 1.5
        )
        journal.event("fresh", step=0)
        journal.close()
        metrics = Metrics(run.attempt(facts.number) / "metrics-rank-00000.jsonl", clock=lambda: 2.5)
        metrics.log(0, {"loss": 1.25})
        metrics.flush()
    return run


@pytest.fixture
def run(written, tmp_path):
    shutil.copytree(written.root, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def found(run):
    return [(str(path.relative_to(run.root)), problem) for path, problem in check_records(run)]


def test_what_ranks_write_is_whole(run):
    assert found(run) == []


@pytest.mark.parametrize(
    "pattern",
    ["run.json", "configs/*.yaml", "data/*.json", "attempts/0001/attempt.json", "attempts/0002/*.jsonl"],
)
def test_any_changed_byte_is_found(run, pattern):
    paths = sorted(run.root.glob(pattern))
    assert paths
    for path in paths:
        data = path.read_bytes()
        for place in range(len(data)):
            mask = (0x01, 0x20, 0x2A, 0x80)[place % 4]
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            assert str(path.relative_to(run.root)) in dict(found(run)), (path.name, place, mask)
        path.write_bytes(data)


@pytest.mark.parametrize("mask", range(1, 256))
def test_the_schema_can_not_be_talked_out_of_its_digest(run, mask):
    path = run.attempt(1) / "attempt.json"
    data = path.read_bytes()
    place = data.index(b'"schema": 2') + len(b'"schema": ')
    path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
    assert len(found(run)) == 1


@pytest.mark.parametrize(
    ("gone", "problem"),
    [
        ("run.json", "is gone"),
        ("attempts/0001/attempt.json", "is gone"),
        ("attempts/0001/events.jsonl", "is gone"),
        ("attempts/0001", "is gone"),
    ],
)
def test_what_is_gone_is_missed(run, gone, problem):
    path = run.root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert found(run) == [(gone, problem)]


def test_a_configuration_that_an_attempt_used_is_missed(run):
    path = run.configs / f"{Config(name='run', seed=1).digest()}.yaml"
    path.unlink()
    assert found(run) == [(str(path.relative_to(run.root)), "is gone; attempt 2 used it")]


@pytest.mark.parametrize("name", ["run.json", "attempts/0001/attempt.json"])
def test_a_folder_in_place_of_a_file_is_told(run, name):
    (run.root / name).unlink()
    (run.root / name).mkdir()
    assert found(run) == [(name, "can't be read (a folder, not a regular file)")]


def test_an_attempt_that_was_killed_at_once_is_no_damage(run):
    (run.attempt(3) / "staging").mkdir(parents=True)
    assert found(run) == []


def test_records_of_version_1_have_no_digest(run):
    record = json.loads((run.attempt(1) / "attempt.json").read_bytes())
    del record["digest"]
    record["schema"] = 1
    (run.attempt(1) / "attempt.json").write_text(json.dumps(record, indent=1))
    for path in run.attempt(1).glob("*.jsonl"):
        path.write_text('{"t": 1, "event": "begun"}\n')
    assert found(run) == []


def test_the_wrong_attempts_record_is_found(run):
    shutil.copy(run.attempt(1) / "attempt.json", run.attempt(2) / "attempt.json")
    assert found(run) == [("attempts/0002/attempt.json", "is not what was written")]
