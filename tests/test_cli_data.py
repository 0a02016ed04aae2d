import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.provenance.datahash import Reading, take_snapshot
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.provenance.hashcache import HashCache, user_cache


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
    return folder


def call(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_a_snapshot_is_its_digest_or_json(images, tmp_path):
    shown = call("data", "snapshot", images)
    assert shown.exit_code == 0
    assert len(shown.stdout.strip()) == 32
    assert "2 files, 2 bytes" in shown.stderr
    record = json.loads(call("data", "snapshot", images, "--json", "--save", tmp_path / "kept.json").stdout)
    assert record["digest"] == shown.stdout.strip()
    assert (record["files"], record["size_bytes"]) == (2, 2)
    assert DataSnapshot.load(tmp_path / "kept.json").digest == record["digest"]
    assert json.loads(call("data", "snapshot", images, "--json", "--fresh").stdout)["read_files"] == 2


def test_what_was_read_is_not_read_again(images):
    call("data", "snapshot", images)
    assert (
        json.loads(call("data", "snapshot", images, "--json").stdout)["read_files"] == 2
    )  # changed just now

    def later():
        return time.time() + 10

    cache = HashCache([user_cache(os.environ)], clock=later)
    take_snapshot([images], Reading(cache=cache, clock=later))
    record = json.loads(call("data", "snapshot", images, "--json").stdout)
    assert (record["read_files"], record["read_bytes"]) == (0, 0)


def test_a_difference_is_exit_code_1_and_named(images, tmp_path):
    call("data", "snapshot", images, "--save", tmp_path / "old.json")
    same = call("data", "diff", tmp_path / "old.json", images)
    assert (same.exit_code, same.stdout) == (0, "")
    assert "nothing changed" in same.stderr
    (images / "a").write_text("A")
    (images / "c").write_text("new\n")
    shown = call("data", "diff", tmp_path / "old.json", images)
    assert shown.exit_code == 1
    assert shown.stdout.splitlines() == ["changed: a (other contents, 1 bytes as before)", "added: c"]
    record = json.loads(call("data", "diff", tmp_path / "old.json", images, "--json").stdout)
    assert (record["same"], record["added"], record["changed"][0]["name"]) == (False, ["c"], "a")


def test_what_is_wrong_is_one_message(images, tmp_path):
    shown = call("data", "snapshot", tmp_path / "nix")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "nix: is not there" in shown.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    assert call("data", "diff", tmp_path / "run", images).exit_code == 4
    call("data", "snapshot", images, "--save", tmp_path / "old.json")
    with (tmp_path / "old.json").open("ab") as file:
        file.write(b" ")
    shown = call("data", "diff", tmp_path / "old.json", images)
    assert (shown.exit_code, "damaged" in shown.stderr) == (4, True)


def test_names_can_not_steer_a_terminal(images, tmp_path):
    call("data", "snapshot", images, "--save", tmp_path / "old.json")
    (images / "x\x1b[2J\ny").touch()
    shown = call("data", "diff", tmp_path / "old.json", images)
    assert shown.stdout == "added: x\\x1b[2J\\ny\n"


def test_no_torch_is_needed(images):
    code = f"""
import sys
from hpc_resume.cli import main
try:
    main(["data", "diff", {str(images)!r}, {str(images)!r}])
except SystemExit as left:
    print(left.code, [name for name in ("torch", "pydantic", "h5py") if name in sys.modules])
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"
