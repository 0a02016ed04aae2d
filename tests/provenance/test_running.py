import json
import sys

import pytest

from hpc_resume.errors import HpcResumeError
from hpc_resume.provenance.remembered import check_sources, listing_of
from hpc_resume.provenance.running import (
    VARIABLE,
    chosen_folder,
    describe_source,
    remark,
    take_source,
    what_changed,
)
from hpc_resume.provenance.source import read_source
from hpc_resume.provenance.sources import Sources
from hpc_resume.records import attempt_record
from hpc_resume.rundir import RunDirectory, sealed


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("x = 1\n")
    return folder


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create("run")
    return run


def test_a_script_that_runs_live_is_kept(run, project):
    found = describe_source(run, {}, main=str(project / "train.py"))
    assert (found["from"], found["root"], found["files"], found["git"]) == ("live", str(project), 1, None)
    assert Sources.of(run).read(found["digest"], ["train.py"]) == {"train.py": b"x = 1\n"}


def test_a_launcher_knows_better_than_the_main_program(run, project):
    found = describe_source(run, {VARIABLE: str(project)}, main="/usr/bin/other.py")
    assert found["root"] == str(project)


def test_what_has_no_file_or_is_installed_has_no_source(run):
    assert describe_source(run, {}, main="") == {}
    assert describe_source(run, {}, main=pytest.__file__) == {}
    assert not run.sources.exists()


def test_a_snapshot_is_compared_with_what_was_kept(run, project):
    sources = Sources.of(run)
    chosen = take_source(sources, read_source(project))
    sources.choose(chosen)
    tree = chosen_folder(run)
    script = tree / "train.py"
    found = describe_source(run, {}, main=str(script))
    assert found == {
        "from": "snapshot",
        "digest": chosen.digest,
        "root": str(project),
        "files": 1,
        "size_bytes": 6,
        "git": None,
    }
    script.chmod(0o644)
    script.write_text("x = 2\n")
    (tree / "more.py").touch()
    assert describe_source(run, {VARIABLE: str(tree)})["altered"] == ["more.py", "train.py"]


def test_a_problem_is_said_and_ends_nothing(run, project):
    run.sources.write_text("no folder")
    found = describe_source(run, {}, main=str(project / "train.py"))
    assert found["from"] == "live"
    assert "problem" in found


def test_a_run_that_nobody_chose_a_source_for(run):
    with pytest.raises(HpcResumeError, match="submit the run again"):
        chosen_folder(run)


def test_what_changed_since_the_last_choice(run, project):
    sources = Sources.of(run)
    first = take_source(sources, read_source(project))
    assert what_changed(run, None, first) == what_changed(run, first, first) == ""
    (project / "train.py").write_text("x = 2\n")
    second = take_source(sources, read_source(project))
    assert what_changed(run, first, second) == "train.py"
    (sources.folder / f"{first.digest}.json").unlink()
    assert what_changed(run, first, second) == f"{first.digest} → {second.digest}"


def test_a_source_that_an_attempt_ran_and_that_is_gone_is_named(run, project):
    source = describe_source(run, {}, main=str(project / "train.py"))
    run.attempt(1).mkdir()
    path = run.attempt(1) / "attempt.json"
    path.write_bytes(sealed({"schema": 2, "attempt": 1, "source": source}))
    assert list(check_sources(run)) == []
    assert listing_of(run, attempt_record(run, 1)).digest == source["digest"]
    for each in run.sources.iterdir():
        each.unlink()
    assert [(found.suffix, problem) for found, problem in check_sources(run)] == [
        (".json", "is gone; attempt 1 ran it")
    ]
    assert listing_of(run, attempt_record(run, 1)) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"source": 3}', '{"source": {"digest": "../../x"}}', "[" * 10_000]
)
def test_a_record_that_can_not_be_read_says_nothing(run, text):
    run.attempt(1).mkdir()
    (run.attempt(1) / "attempt.json").write_text(text)
    record = attempt_record(run, 1)
    assert isinstance(record, dict)
    assert listing_of(run, record) is None
    json.dumps(record)


def test_a_script_that_does_not_run_from_the_snapshot_says_so(run, project):
    """A shell script of the user's may start Python on the live file, whatever the launcher has prepared."""
    sources = Sources.of(run)
    sources.choose(take_source(sources, read_source(project)))
    tree = chosen_folder(run)
    found = describe_source(run, {VARIABLE: str(tree)}, main=str(project / "train.py"))
    assert (found["from"], remark(found)) == ("live", "")


def test_a_module_that_was_imported_from_the_live_folder_is_named(run, project, monkeypatch):
    (project / "provenance_probe.py").touch()
    monkeypatch.syspath_prepend(str(project))
    import provenance_probe

    sources = Sources.of(run)
    sources.choose(take_source(sources, read_source(project)))
    tree = chosen_folder(run)
    try:
        found = describe_source(run, {VARIABLE: str(tree)}, main="")
    finally:
        del sys.modules[provenance_probe.__name__]
    assert found["live"] == ["provenance_probe.py"]
    assert remark(found) == f"not from the snapshot, but from {project}: provenance_probe.py"
    (tree / "train.py").unlink()
    again = describe_source(run, {VARIABLE: str(tree)}, main="")
    assert (again["altered"], "live" in again) == (["train.py"], False)
    assert remark(again) == "the snapshot is not what was kept: train.py"


def test_a_shared_source_is_checked_with_the_run(tmp_path, project):
    sweep, run = RunDirectory(tmp_path / "sweep"), RunDirectory(tmp_path / "sweep" / "lr=1")
    run.create("x")
    chosen = take_source(Sources.of(sweep), read_source(project), shared=True)
    Sources.of(run).choose(chosen)
    found = describe_source(run, {VARIABLE: str(chosen_folder(run))}, main="")
    assert found["shared"] is True
    run.attempt(1).mkdir()
    (run.attempt(1) / "attempt.json").write_bytes(sealed({"schema": 2, "attempt": 1, "source": found}))
    assert list(check_sources(run)) == []
    path = sweep.sources / chosen.digest / "train.py"
    path.chmod(0o644)
    path.write_text("x = 3\n")
    assert list(check_sources(run)) == [(path, "is not what was written")]
