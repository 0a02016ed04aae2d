import copy
import json
from types import SimpleNamespace

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.provenance.configuration import changes as setting_changes
from hpc_resume.provenance.datasnapshot import DataSnapshot, FileEntry
from hpc_resume.provenance.running import describe_source
from hpc_resume.records import data_path
from hpc_resume.report.diff import compare
from hpc_resume.report.difftext import parts
from hpc_resume.report.sides import Side, find_side
from hpc_resume.rundir import RunDirectory, sealed


def attempt(run, number, project, **record):
    run.attempt(number).mkdir(parents=True)
    config = Config(seed=number)
    config.store(run)
    values = {
        "schema": 2,
        "attempt": number,
        "config": config.digest(),
        "environment": {"hostname": f"gpu{number}", "python": "3.11.1", "packages": {}},
        "source": describe_source(run, {}, main=str(project / "train.py")),
        **record,
    }
    (run.attempt(number) / "attempt.json").write_bytes(sealed(values))


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create("run")
    return run


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("x = 1\n")
    (folder / "table.json").write_bytes(b"\xff\xfe\0")
    return folder


def test_settings_are_those_of_the_attempt_that_is_named(run, project):
    attempt(run, 1, project)
    attempt(run, 2, project)
    manifest = SimpleNamespace(config=Config(seed=1).digest())  # taken by attempt 1

    def settings(record):
        return Side(label="run", run=run, record=record, folder=run.root, manifest=manifest).settings()

    assert settings({"config": Config(seed=2).digest()})["seed"] == 2
    assert settings({})["seed"] == 1


def test_attempts_without_checkpoints(run, project):
    old, new = (DataSnapshot(files={"a.bin": FileEntry(size_bytes=size, digest=None)}) for size in (1, 2))
    for snapshot in (old, new):
        run.data.mkdir(exist_ok=True)
        data_path(run, snapshot.digest).write_bytes(snapshot.to_bytes())
    attempt(run, 1, project, data={"digest": old.digest, "checked": "sizes"})
    (project / "train.py").write_text("x = 2\x1b[31m\n")
    (project / "table.json").write_bytes(b"\xff\xfe\0\0")
    attempt(run, 2, project, data={"digest": new.digest, "preprocessing": "2"})
    one, two = find_side(f"{run.root}#1"), find_side(str(run.root))
    found = compare(one, two)
    assert found.unknown == ("state: run, attempt 1 has no checkpoint",)
    assert [(each.path, each.what) for each in found.code] == [
        ("table.json", "changed"),
        ("train.py", "changed"),
    ]
    assert found.code[0].lines == ()
    assert found.code[1].lines[-2:] == ("-x = 1", "+x = 2\x1b[31m")
    assert [(each.name, each.old, each.new) for each in found.settings] == [("seed", 1, 2)]
    assert [str(each) for each in found.data] == [
        f"data: {old.digest} → {new.digest}",
        "preprocessing: none → 2",
    ]
    assert [line.partition(" (")[0] for line in found.files] == ["changed: a.bin"]
    assert [each.what for each in found.environment] == ["host"]
    text = "\n".join(line for title, lines in parts(found) for line in (title, *lines))
    assert "\x1b" not in text
    assert "+x = 2\\x1b[31m" in text
    assert "harmless  host: gpu1 → gpu2" in text
    json.dumps(found.to_json(), allow_nan=False)
    assert compare(one, one, tensors=False).equal


def test_what_is_not_known_is_said(run, project):
    attempt(run, 1, project)
    run.attempt(2).mkdir()
    attempt(run, 3, project, source={"from": "live", "problem": "too large"}, config="0" * 16)
    attempt(run, 4, project, source={"digest": 5, "altered": 7}, environment=[1], data="x")
    first = find_side(f"{run.root}#1")
    unknown = {
        number: compare(first, find_side(f"{run.root}#{number}"), tensors=False).unknown
        for number in (2, 3, 4)
    }
    assert unknown[2] == (
        "code: the source of run, attempt 2 is not known",
        "configuration: that of run, attempt 2 is not known",
    )
    assert unknown[3] == (
        "code: the source of run, attempt 3 too large",
        "configuration: that of run, attempt 3 is not known",
    )
    assert unknown[4] == ("code: the source of run, attempt 4 was not kept",)


def test_a_snapshot_that_was_altered_differs(run, project):
    attempt(run, 1, project)
    source = describe_source(run, {}, main=str(project / "train.py"))
    attempt(run, 2, project, source={**source, "altered": ["train.py"]})
    found = compare(find_side(f"{run.root}#1"), find_side(f"{run.root}#2"), tensors=False)
    assert [(each.path, each.what) for each in found.code] == [
        ("train.py", "not what was kept, when run, attempt 2 ran it")
    ]


def test_what_is_not_there(run, tmp_path):
    with pytest.raises(CheckpointNotFound, match="neither an attempt nor a checkpoint"):
        find_side(str(run.root))
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7; there are: none at all"):
        find_side(f"{run.root}@7")
    with pytest.raises(UsageError, match="has no attempt 3; there are: none"):
        find_side(f"{run.root}#3")
    with pytest.raises(CheckpointNotFound, match="no run directory"):
        find_side(str(tmp_path / "nowhere"))


def test_a_folder_may_be_called_like_that(tmp_path, project):
    run = RunDirectory(tmp_path / "run@7")
    run.create("run")
    attempt(run, 1, project)
    assert find_side(f"{run.root}").label == "run@7, attempt 1"
    assert find_side(f"{run.root}#1").label == "run@7, attempt 1"


def test_a_configuration_that_is_not_what_was_written_is_named(run, project):
    attempt(run, 1, project)
    attempt(run, 2, project)
    path = run.configs / f"{Config(seed=1).digest()}.yaml"
    path.write_bytes(path.read_bytes().replace(b"seed: 1", b"seed: 2"))
    with pytest.raises(IntegrityError, match=path.name):
        compare(find_side(f"{run.root}#1"), find_side(f"{run.root}#2"), tensors=False)


def test_values_of_variables_are_not_shown(run, project):
    secret = Config(environment={"variables": {"PASSWORD": "hunter2"}})
    secret.store(run)
    attempt(run, 1, project)
    attempt(run, 2, project, config=secret.digest())
    found = compare(find_side(f"{run.root}#1"), find_side(f"{run.root}#2"), tensors=False)
    assert "environment.variables.PASSWORD" in {each.name for each in found.settings}
    text = json.dumps(found.to_json()) + "".join(line for _, lines in parts(found) for line in lines)
    assert "hunter2" not in text


def leaves(value, at=()):
    if isinstance(value, dict) and value:
        return [leaf for key, each in value.items() for leaf in leaves(each, (*at, key))]
    return [(at, value)]


def test_each_setting_that_is_another_one_is_told_by_its_name(run):
    values = Config().model_dump(mode="json")
    for path, value in leaves(values):
        changed = copy.deepcopy(values)
        *parents, last = path
        here = changed
        for each in parents:
            here = here[each]
        here[last] = "other" if value != "other" else 1
        if path == ("node_types",):
            here[last] = [{**values["node_types"][0], "ranks": 2}]
        told = [each.name for each in setting_changes(values, changed)]
        name = ".".join(path) if path != ("node_types",) else "node_types.default.ranks"
        passed_over = path[0] in {
            "why",
            "run_dir",
            "allow_config_change",
            "allow_data_change",
            "allow_drift",
        }
        assert told == ([] if passed_over else [name])
