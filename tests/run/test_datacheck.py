"""A run whose data changes between attempts: refused by name, allowed with a reason, and checkpoints say so."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import hpc_resume as hr
from hpc_resume.branching import fork
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.errors import ConfigError, UsageError
from hpc_resume.provenance.datarecord import DataRecord, Decision
from hpc_resume.report.checkpoints import describe, find_checkpoint, list_checkpoints
from hpc_resume.report.tables import checkpoint_table, contents_table
from hpc_resume.run.datacheck import Hosting, RunData
from hpc_resume.run.datasource import Source
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt
from tests.run.test_interruptions import committed_step, ended, events


def train(steps, declared=None, **settings):
    """Train on nothing much; what matters is which data the run says it uses."""
    with hr.Run(**settings) as run:
        net = torch.nn.Linear(4, 1)
        if declared:
            run.uses(**declared)
        run.track(model=net)
        for _ in run.steps(iter(lambda: 0, 1), until=steps):
            with torch.no_grad():
                net.weight += 1


def steps_of(run_dir, steps, *, ranks=1, job="job-1", declared=None, **settings):
    attempt = Attempt(run_dir, ranks, call, steps, declared, settings, job=job)
    return attempt.wait(), attempt.log.read_text()


def call(steps, declared, settings):
    os.environ["XDG_CACHE_HOME"] = str(Path(os.environ["HPC_RESUME_RUN_DIR"]).parent / "cache")
    train(steps, declared, **settings)


def recorded(run_dir):
    return find_checkpoint(run_dir, None)[1].environment.get("data")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    (folder / "train/1.jpg").write_bytes(b"one")
    (folder / "train/2.jpg").write_bytes(b"two")
    (tmp_path / "val.csv").write_text("1,2\n")
    return folder


def test_a_changed_file_is_caught_before_the_first_step_and_allowed_with_a_reason(tmp_path, data):
    run_dir = tmp_path / "run"
    settings = {
        "data": {"paths": [str(data)], "validation": str(tmp_path / "val.csv"), "preprocessing": "v1"}
    }
    assert steps_of(run_dir, 2, ranks=2, **settings)[0] == [0, 0]
    first = recorded(run_dir)
    assert first["checked"] == "contents"
    assert sorted(path.stem for path in run_dir.glob("data/*.json")) == sorted(
        [first["digest"], first["validation"]]
    )
    # The same data goes on, wherever it lies.
    moved = data.rename(tmp_path / "elsewhere")
    settings["data"]["paths"] = [str(moved)]
    assert steps_of(run_dir, 4, **settings)[0] == [0]
    assert recorded(run_dir) == first

    (moved / "train/2.jpg").write_bytes(b"TWO")
    (moved / "train/3.jpg").write_bytes(b"three")
    codes, log = steps_of(run_dir, 6, ranks=2, job="job-2", **settings)
    assert codes == [2, 2], log
    assert "changed: train/2.jpg (other contents, 3 bytes as before)" in log
    assert "added: train/3.jpg" in log
    assert "allow_data_change" in log
    last = ended(run_dir, 3)
    assert (last["decision"], last["step"], last["exit_code"]) == ("stop", 4, 2)
    assert committed_step(run_dir) == 4

    why = {"allow_data_change": "3 was missing"}
    codes, log = steps_of(run_dir, 6, ranks=2, **settings, **why)
    assert codes == [0, 0], log
    now = recorded(run_dir)
    assert now["digest"] != first["digest"]
    assert now["decisions"][0]["reason"] == "3 was missing"
    assert now["decisions"][0]["before"].startswith(first["digest"])
    (event,) = events(run_dir, 4, "data_changed")
    assert (event["before"]["digest"], event["after"]["digest"]) == (first["digest"], now["digest"])
    assert "added: train/3.jpg" in event["what"]

    assert verify_run(run_dir) == []
    shown = "\n".join(contents_table(describe(*find_checkpoint(run_dir, None))).lines())
    assert f"trained on: data {now['digest']}, preprocessing v1" in shown
    assert now["digest"][:8] in "\n".join(checkpoint_table("", list_checkpoints(run_dir)).lines())


def test_a_stop_is_heard_while_the_data_is_read(tmp_path):
    run_dir = tmp_path / "run"
    folder = tmp_path / "slow"
    folder.mkdir()
    for number in range(2000):
        (folder / str(number)).write_bytes(b"x")
    attempt = Attempt(run_dir, 2, read_slowly, str(folder))
    attempt.wait_until((run_dir / "reading").exists)
    began = time.monotonic()
    attempt.signal(signal.SIGUSR2, ranks=[1])
    assert attempt.wait(30) == [75, 75], attempt.log.read_text()
    assert time.monotonic() - began < 20
    assert ended(run_dir, 1)["decision"] == "continue"


def read_slowly(folder):
    real = os.preadv
    reading = Path(os.environ["HPC_RESUME_RUN_DIR"]) / "reading"

    def preadv(fd, buffers, offset):
        reading.touch()
        time.sleep(0.2)
        return real(fd, buffers, offset)

    os.preadv = preadv
    os.environ["XDG_CACHE_HOME"] = folder + "-cache"
    train(2, {"data": folder})


def test_a_filesystem_that_fails_is_no_fault_of_the_data(tmp_path, data):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, fail_to_read, str(data))
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    last = ended(run_dir, 1)
    assert last["decision"] == "continue"
    assert "Input/output error" in last["evidence"]


def fail_to_read(folder):
    def preadv(fd, buffers, offset):
        raise OSError(5, "Input/output error", folder)

    os.preadv = preadv
    os.environ["XDG_CACHE_HOME"] = folder + "-cache"
    train(2, {"data": folder})


# ---------------------------------------------------------------- the rules, without processes


class Alone:
    """Peers of a single rank."""

    def share(self, key, value=None):
        return value


class Checks:
    """A run's data, looked at as attempts do."""

    def __init__(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        self.run = RunDirectory(tmp_path / "run")
        self.run.create("test")
        self.said, self.noted = [], []
        self.saved = None

    def __call__(self, *, saved="last", declared=None, attempt=1, **settings):
        checked = RunData(Config(**settings))
        if declared:
            checked.declare(**{"data": None, "validation": None, "preprocessing": None, **declared})
        self.said, self.noted = [], []
        hosting = Hosting(
            run=self.run, attempt=attempt, peers=Alone(), rank=0, say=self.said.append,
            note=lambda event, **fields: self.noted.append((event, fields)), breathe=lambda: None,
        )  # fmt: skip
        saved = self.saved if saved == "last" else saved
        self.saved = checked.check(saved, "checkpoint 7", hosting)
        return self.saved.get("data")

    def kinds(self):
        return [event for event, _ in self.noted]


@pytest.fixture
def checks(tmp_path, monkeypatch):
    return Checks(tmp_path, monkeypatch)


def test_a_run_that_says_nothing_of_its_data_records_nothing(checks):
    assert checks() is None
    assert (checks.said, checks.noted) == ([], [])
    assert not checks.run.data.exists()


def test_validation_data_that_changes_is_told_and_stops_nothing(checks, data, tmp_path):
    paths = {"data": {"paths": str(data), "validation": str(tmp_path / "val.csv")}}
    first = checks(**paths)
    (tmp_path / "val.csv").write_text("1,3\n")
    second = checks(**paths)
    assert second["digest"] == first["digest"]
    assert second["validation"] != first["validation"]
    assert "validation_changed" in checks.kinds()
    assert any("changed: val.csv" in line for line in checks.said)


def test_another_version_of_the_preprocessing_is_a_change(checks, data):
    first = checks(declared={"data": data, "preprocessing": "v1"})
    with pytest.raises(UsageError, match="preprocessing: v1 → v2"):
        checks(declared={"data": data, "preprocessing": "v2"})
    now = checks(
        saved={"data": first}, declared={"data": data, "preprocessing": "v2"}, allow_data_change="crop"
    )
    assert (now["digest"], now["preprocessing"]) == (first["digest"], "v2")
    # Who leaves it out goes on with what was said.
    assert checks(declared={"data": data})["preprocessing"] == "v2"


def test_a_reason_is_for_one_change(checks, data):
    why = {"data": {"paths": str(data)}, "allow_data_change": "2 was mislabelled"}
    first = checks(**why)
    assert first["decisions"] == []
    (data / "train/2.jpg").write_bytes(b"TWO")
    second = checks(**why)
    assert [each["reason"] for each in second["decisions"]] == ["2 was mislabelled"]
    assert checks(**why) == second
    assert checks(saved={"data": first}, **why) == second  # no checkpoint had named it yet
    (data / "train/1.jpg").unlink()
    with pytest.raises(UsageError, match="was given for another change before"):
        checks(saved={"data": second}, **why)
    third = checks(saved={"data": second}, data={"paths": str(data)}, allow_data_change="1 was not ours")
    assert [each["reason"] for each in third["decisions"]] == ["2 was mislabelled", "1 was not ours"]


def test_data_that_is_not_looked_at_is_compared_when_it_is_again(checks, data):
    first = checks(data={"paths": str(data)})
    (data / "train/1.jpg").write_bytes(b"ONE")
    unchecked = checks(data={"paths": str(data), "check": "off"})
    assert unchecked == {**first, "checked": "no"}
    assert any("NOT compared" in line for line in checks.said)
    assert checks() == {**first, "checked": "no"}
    with pytest.raises(UsageError, match=r"changed: train/1.jpg"):
        checks(data={"paths": str(data)})


def test_sizes_alone(checks, data):
    first = checks(data={"paths": str(data)})
    by_size = {"data": {"paths": str(data), "check": "sizes"}}
    assert checks(**by_size) == {**first, "checked": "sizes"}
    (data / "train/1.jpg").write_bytes(b"ONE")
    assert checks(**by_size) == {**first, "checked": "sizes"}
    with pytest.raises(UsageError, match=r"changed: train/1.jpg"):
        checks(data={"paths": str(data)})
    (data / "train/1.jpg").write_bytes(b"four")
    with pytest.raises(UsageError, match="3 → 4 bytes"):
        checks(saved={"data": first}, **by_size)


def test_what_sizes_do_not_tell_is_not_forgotten(checks, data):
    checks(data={"paths": str(data)})
    (data / "new").write_bytes(b"new")
    checks(data={"paths": str(data), "check": "sizes"}, allow_data_change="one more")
    (data / "train/1.jpg").write_bytes(b"ONE")
    with pytest.raises(UsageError, match=r"1 changed\n  changed: train/1.jpg"):
        checks(data={"paths": str(data)})


def test_a_checkpoint_that_does_not_say_is_told(checks, data):
    assert checks(saved={}, data={"paths": str(data)})["digest"]
    assert any("does not say what data" in line for line in checks.said)


def test_a_run_that_began_by_sizes_learns_the_contents(checks, data):
    first = checks(data={"paths": str(data), "check": "sizes"})
    second = checks(data={"paths": str(data)})
    assert second["digest"] != first["digest"]
    (data / "train/1.jpg").write_bytes(b"ONE")
    with pytest.raises(UsageError, match="other contents"):
        checks(data={"paths": str(data)})


def test_without_checkpoints_the_attempt_before_counts(checks, data):
    from hpc_resume.journal import Journal

    first = checks(saved=None, attempt=1, data={"paths": str(data)})
    checks.run.attempt(1).mkdir()
    journal = Journal(checks.run.attempt(1) / "events.jsonl")
    for event, fields in checks.noted:
        journal.event(event, **fields)
    journal.close()
    assert checks(saved=None, attempt=2, data={"paths": str(data)}) == first
    (data / "new").touch()
    with pytest.raises(UsageError, match=r"that of an earlier attempt[\s\S]*added: new"):
        checks(saved=None, attempt=2, data={"paths": str(data)})
    assert checks(saved=None, attempt=1, data={"paths": str(data)})["digest"] != first["digest"]


def test_a_snapshot_that_is_gone_still_tells_that_something_changed(checks, data):
    first = checks(data={"paths": str(data)})
    (data / "new").touch()
    (checks.run.data / f"{first['digest']}.json").unlink()
    with pytest.raises(UsageError, match="nobody can say what"):
        checks(data={"paths": str(data)})


def test_the_run_directory_must_not_lie_in_the_data(checks, data, tmp_path):
    with pytest.raises(UsageError, match=r"the run directory .* lies in it"):
        checks(data={"paths": str(tmp_path)})


def test_a_dataset_in_memory_is_known_by_its_fingerprint(checks):
    class Dataset:
        def __init__(self, fingerprint):
            self._fingerprint = fingerprint

    first = checks(declared={"data": Dataset("a")})
    assert checks(declared={"data": Dataset("a")}) == first
    with pytest.raises(UsageError, match="Hugging Face fingerprint a → b"):
        checks(declared={"data": Dataset("b")})


def test_what_a_script_may_say_its_data_is(tmp_path):
    assert Source.of("/a", "data").paths == ("/a",)
    assert Source.of([Path("/a"), "/b"], "data").paths == ("/a", "/b")
    assert Source.of({"train": Path("/a")}, "data").paths == {"train": "/a"}
    assert not Source()
    for wrong in (7, [7], {"train": 7}, object()):
        with pytest.raises(UsageError, match=r"run.uses: data"):
            Source.of(wrong, "data")


def test_uses_comes_before_track(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hr.Run(tmp_path / "run") as run:
        run.track(numbers={"a": 1})
        with pytest.raises(UsageError, match=r"before run.track"):
            run.uses(data=tmp_path)


def test_off_is_a_word_in_yaml_too(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {check: off}\n")
    assert Config.load(tmp_path / "run.yaml").data.check == "off"
    assert Config.load(environ={"HPC_RESUME_DATA__CHECK": "off"}).data.check == "off"
    with pytest.raises(ConfigError, match=r"data.check"):
        Config(data={"check": True})


def test_a_reason_is_words():
    for wrong in (True, "", "y"):
        with pytest.raises(ConfigError, match="allow_data_change"):
            Config(allow_data_change=wrong)
    environ = {"HPC_RESUME_ALLOW_DATA_CHANGE": "labels: fixed", "HPC_RESUME_DATA__PATHS": "/a"}
    config = Config.load(environ=environ)
    assert (config.allow_data_change, config.data.paths) == ("labels: fixed", ("/a",))


@pytest.mark.parametrize(
    "lie",
    [7, [], "x", {"digest": 7}, {"digest": "../../etc"}, {"decisions": 7}, {"decisions": [7, {"reason": "x"}]},
     {"preprocessing": ["x"]}, {"checked": ["contents"]}],
)  # fmt: skip
def test_what_a_checkpoint_says_may_be_anything(lie):
    assert DataRecord.from_json(lie) == DataRecord()


def test_a_record_comes_back(tmp_path):
    record = DataRecord(
        digest="5f" * 16, preprocessing="v1", checked="sizes",
        decisions=(Decision(before="a", after="b", reason="c"),),
    )  # fmt: skip
    assert DataRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert DataRecord().to_json() == {}


def test_damaged_and_missing_snapshots_are_found_by_verify(tmp_path, data):
    run_dir = tmp_path / "run"
    assert steps_of(run_dir, 1, data={"paths": str(data)})[0] == [0]
    assert verify_run(run_dir) == []
    forked = fork(run_dir)
    assert verify_run(forked.run_dir) == []
    (path,) = run_dir.glob("data/*.json")
    assert (forked.run_dir / "data" / path.name).read_bytes() == path.read_bytes()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"1.jpg", b"4.jpg"))
    (finding,) = verify_run(run_dir)
    assert (finding.path, "is not what was written" in finding.problem) == (path, True)
    path.unlink()
    (finding,) = verify_run(run_dir)
    assert (finding.path, "is gone" in finding.problem) == (path, True)
    path.with_name("0" * 32 + ".json").write_bytes(whole)
    assert len(verify_run(run_dir)) == 2
