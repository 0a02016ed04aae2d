"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import hpc_resume as hr
from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.launch.script import render
from hpc_resume.rundir import RunDirectory

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language, containing=""):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return next(text for text in blocks if containing in text)


def sbatch_file():
    config = Config.load(ROOT / "configs/mycluster.yaml", overrides={"name": "train"})
    return render(config, command=["python", "train.py"], run_dir=Path("/scratch/you/runs/train"))


def test_the_script_of_the_first_screen_runs(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        block("python", "def train")
        + """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
    def forward(self, x):
        return self.linear(x)

dataset = list(torch.randn(100, 4))
train(steps=5)
"""
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HPC_RESUME_RUN_DIR": str(tmp_path / "run")}
    subprocess.run([sys.executable, script], check=True, cwd=tmp_path, env=environ, timeout=300)
    (name,) = RunDirectory(tmp_path / "run").checkpoint_names()
    assert name.startswith("0000000005-")
    assert torch is not None
    assert hr.Run is not None


def test_the_sbatch_file_is_the_one_that_is_rendered():
    shown = block("bash", "#SBATCH")
    assert shown == sbatch_file(), "write it anew: python tests/test_readme.py"


def test_every_command_that_is_named_exists():
    named = set(re.findall(r"^\$ hpc-resume (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(main.list_commands(None))


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


if __name__ == "__main__":
    text = re.sub(
        r"```bash\n#!/bin/bash.*?```", lambda _: f"```bash\n{sbatch_file()}```", README, flags=re.DOTALL
    )
    (ROOT / "README.md").write_text(text)
