import pytest

from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.rundir import RunDirectory
from hpc_resume.sweepdir import SweepDirectory


def test_an_identity_is_written_once(tmp_path):
    sweep = SweepDirectory(tmp_path / "a" / "gpt")
    first = sweep.create("gpt", clock=lambda: 5.0)
    assert (first["name"], first["created"]) == ("gpt", 5.0)
    assert sweep.create("other", clock=lambda: 6.0) == first == sweep.identity()


def test_runs_come_in_the_order_of_their_first_submission(tmp_path):
    sweep = SweepDirectory(tmp_path)
    sweep.create("gpt")
    for time, name in enumerate(["lr=2", "lr=10", "lr=1"]):
        sweep.run(name).create(f"gpt {name}", arguments={"lr": 1}, clock=lambda time=time: float(time))
    (tmp_path / "jobs").mkdir()
    sweep.run("lr=2").create("gpt", arguments={"lr": 7})  # again: nothing changes
    assert sweep.names() == ["lr=2", "lr=10", "lr=1"]
    assert sweep.run("lr=2").identity()["arguments"] == {"lr": 1}
    sweep.run("lr=2").identity_path.write_text("{}")
    assert sweep.names() == ["lr=10", "lr=1", "lr=2"]


def test_a_run_by_itself_has_no_arguments(tmp_path):
    assert "arguments" not in RunDirectory(tmp_path).create("gpt")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "name": "x", "digest": "00"}', "\xff", "[" * 9999]
)
def test_a_damaged_identity_is_said(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text, encoding="latin-1")
    with pytest.raises(IntegrityError, match="damaged"):
        SweepDirectory(tmp_path).identity()


def test_another_schema_is_said(tmp_path):
    from hpc_resume.rundir import sealed

    (tmp_path / "sweep.json").write_bytes(sealed({"schema": 7, "name": "x"}))
    with pytest.raises(IntegrityError, match="schema 7, but this version reads 1"):
        SweepDirectory(tmp_path).identity()


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointNotFound, match="no array of runs"):
        SweepDirectory(tmp_path / "nix").identity()
