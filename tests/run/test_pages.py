"""What docs/validation.md and docs/trackers.md show is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_resume.checkpoint import store
from hpc_resume.config import Config
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import ToleranceSettings

ROOT = Path(__file__).parents[2]


def block(page, language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return text


def run_page(page, folder):
    script = folder / "train.py"
    script.write_text(block(page, "python"))
    words = [sys.executable, str(script)]
    subprocess.run(words, check=True, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=300)
    return RunDirectory(folder / "runs" / "train")


def test_the_probe_of_the_page_runs(tmp_path):
    run = run_page("validation.md", tmp_path)
    _, manifest = store.find(run)
    assert manifest.step == 20
    assert manifest.health.probe.batch is not None
    assert list(manifest.health.norms) == ["model"]


def test_the_board_of_the_page_runs(tmp_path):
    pytest.importorskip("tensorboard")
    run = run_page("trackers.md", tmp_path)
    assert len(list((run.trackers / "tensorboard").iterdir())) == 1


def test_the_settings_of_the_page_are_the_defaults_but_for_one():
    values = yaml.safe_load(block("validation.md", "yaml"))
    config = Config(**values)
    assert config.validation.tolerance.bf16 == 0.01
    values["validation"].pop("tolerance")
    assert Config(**values) == Config()


def test_the_page_tells_the_tolerances():
    page = (ROOT / "docs/validation.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| | 1e"))
    numbers = [float(cell) for cell in row.split("|")[2:-1]]
    assert numbers == list(ToleranceSettings().model_dump().values())
