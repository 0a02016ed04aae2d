"""What docs/data-snapshot.md shows is what happens."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.settings import DataSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data-snapshot.md").read_text()


@pytest.fixture
def here(tmp_path):
    (tmp_path / "digits").mkdir()
    for number in range(5):
        (tmp_path / f"digits/{number:04}.txt").write_text(f"{number}\n")
    (tmp_path / "digits-val.csv").write_text("1,2\n")
    return tmp_path


def test_the_page_from_top_to_bottom(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    (here / "train.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    lines = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    said = [(line, *outcome(line.removeprefix("$ "))) for line in lines]
    codes = [code for _, code, _, _ in said]
    assert codes == [0, 0, 0, 1, 2, 0, 0, 0, 0], said
    assert "trained on: data " in said[1][2]
    assert said[3][2] == "changed: 0003.txt (other contents, 2 bytes as before)\n"
    shown = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)[1]
    refused = said[4][3][said[4][3].index("hpc_resume: the data is not") :]
    assert words(refused) == words(shown)
    assert "changed because '0003 was mislabelled'" in said[6][2]
    assert re.fullmatch(r"[0-9a-f]{32}\n", said[8][2])


def outcome(line):
    if line.startswith("hpc-resume "):
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        return done.exit_code, done.stdout, done.stderr
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=180)
    return done.returncode, done.stdout, done.stderr


def words(text):
    return re.sub(r"0000000005-[0-9a-f]{8}", "CHECKPOINT", text).split()


def test_the_settings_are_the_ones_that_are_shown():
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    assert Config(**shown).data.paths == ("/scratch/you/digits",)
    assert DataSettings().check == shown["data"]["check"]
