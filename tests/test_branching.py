"""What docs/branching.md shows is what happens; and what can't be forked."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import hpc_resume as hr
from hpc_resume import cli
from hpc_resume.branching import _typed
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, UsageError
from hpc_resume.job import Job
from hpc_resume.launch.handle import find_jobs
from hpc_resume.lineage import read_lineage
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.values import parse_value
from tests.checkpoint.story import World, begin

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/branching.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "train.py").write_text(re.search(r"```python\n# train.py\n(.*?)```", PAGE, re.DOTALL)[1])
    yield tmp_path
    for run in (tmp_path / "runs").glob("*"):
        for job in find_jobs(run.resolve()):
            record = job.submitit_job().state_record()
            if record.alive():
                os.kill(record.controller_pid, signal.SIGKILL)


def call(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_the_page_from_top_to_bottom(here):
    shown = {}
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[:2] == ["$", "hpc-resume"]
            done = call(*words[2:])
            assert done.exit_code == 0, (line, done.output)
            shown[line.removeprefix("$ hpc-resume ")] = done
            if "--submit" in words:
                assert Job.of("runs/b").wait(60) == "COMPLETED", Job.of("runs/b").log()
    assert "steps" in shown["config runs/a --log"].stdout
    assert "it had not converged" in shown["config runs/a --log"].stdout
    assert "entry.kwargs.steps: 40" in shown["config runs/a"].stdout
    run, fork = RunDirectory(here / "runs/a"), RunDirectory(here / "runs/b")
    assert sorted(map(checkpoint_step, run.checkpoint_names())) == [10, 20, 30, 40]
    assert max(map(checkpoint_step, fork.checkpoint_names())) == 30  # steps=40 came later
    assert status(run.root).step == 20
    assert rate(fork.root) == 0.01  # by run.changed
    assert rate(run.root) == 0.1
    lineage = read_lineage(fork)
    assert (lineage.settings, lineage.why) == ({"entry.kwargs.lr": 0.01}, "a lower rate from the middle on")
    assert "linked, so they take no space" in shown_by(shown, "fork ").stderr
    assert "set aside" in shown["ls runs/a"].stdout
    assert "forked from step 20" in shown["status runs/b"].stdout
    assert verify_run(run.root) == verify_run(fork.root) == []
    log = call("config", "runs/b", "--log").stdout
    assert "a lower rate from the middle on" in log


def shown_by(shown, verb):
    return next(done for line, done in shown.items() if line.startswith(verb))


def rate(root):
    with hr.Checkpoint(root) as checkpoint:
        return checkpoint.manifest.objects["optimizer"]["param_groups"][0]["lr"]


def test_the_schedule_of_the_page_is_scaled():
    names = {}
    exec(re.search(r"```python\n(def rescale.*?)```", PAGE, re.DOTALL)[1], names)

    def rates(lr, factor=1.0):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        found = []
        for step in range(20):
            if step == 7:
                names["rescale"](optimizer, scheduler, factor)
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(0.1, 0.1)[7:] == pytest.approx(rates(0.01)[7:])


@pytest.fixture
def recorded(here):
    """A run with checkpoints of steps 10 and 20, which name the settings that they were written with."""
    config = Config(
        name="a",
        run_dir=str(here / "runs/a"),
        entry={"target": f"{here}/train.py:train", "kwargs": {"lr": 0.1}},
    )
    return stored(here / "runs/a", config)


def stored(root, config):
    world, run = World(1), RunDirectory(root)
    attempt = begin(world, run, [])
    header = world.header
    world.header = lambda *about: header(*about).__class__(
        **{**header_fields(header(*about)), "config": config and config.digest()}
    )
    for step in (10, 20):
        attempt.save(step)
    attempt.close()
    if config is not None:
        config.store(run)
    return run


def header_fields(header):
    return {name: getattr(header, name) for name in header.__slots__}


def test_a_fork_takes_the_settings_of_the_checkpoint_and_what_is_set_otherwise(recorded, here):
    made = hr.fork(
        recorded.root, at=10, to=here / "b", config={"budget.crashes": 5}, why="because", lr=[1e-4], steps=5
    )
    assert made.config.entry.kwargs == {"lr": [1e-4], "steps": 5}
    assert (made.config.budget.crashes, made.config.name, made.config.why) == (5, "b", "because")
    assert made.config.run_dir == str(here / "b")
    assert Config.load(made.config_path) == made.config
    assert made.lineage.settings == {"budget.crashes": 5, "entry.kwargs.lr": [1e-4], "entry.kwargs.steps": 5}
    assert shlex.split(made.command) == [
        "hpc-resume", "submit", f"{here}/train.py:train", "-c", str(made.config_path), "--set", "lr=[0.0001]",
        "--set", "steps=5",
    ]  # fmt: skip
    assert verify_run(made.run_dir) == []
    assert hr.fork(str(recorded.root)).run_dir == here / "runs/a-fork-20"


@pytest.mark.parametrize(
    "value",
    [1, 1e-4, 0.1, True, None, "text", "1", "1e3", "0x_", "yes", "a: b", [1, "2"], {"a": [1]}, "", "#"],
)
def test_what_the_command_says_is_read_as_it_was(value):
    assert parse_value(_typed(value)) == value


def test_a_group_of_settings_leaves_what_it_does_not_name(here):
    parent = stored(here / "runs/a", Config(name="a", budget={"crashes": 5, "hangs": 4}))
    made = hr.fork(parent.root, to=here / "b", config={"budget": {"crashes": 6}})
    assert (made.config.budget.crashes, made.config.budget.hangs) == (6, 4)
    options = ("-o", "slurm.account=00123", "-o", "checkpoint.threads=0x10", "--json")
    made = call("fork", parent.root, "--to", here / "c", *options)
    assert made.exit_code == 0, made.output
    settings = json.loads(made.stdout)["settings"]
    assert settings == {"slurm.account": "00123", "checkpoint.threads": 16}


def test_what_can_not_be_set_is_refused_and_nothing_is_made(recorded, here):
    for options, words in (
        ({"learning_rate": 1}, "takes no argument 'learning_rate'"),
        ({"config": {"budget.crash": 5}}, "did you mean"),
        ({"config": {"seed": 3}}, "allow_config_change"),
        ({"arguments": {"name": "x"}}, "takes no argument 'name'"),
        ({"at": 11}, "no full checkpoint of step 11"),
        ({"to": here / "runs/a"}, "is there already"),
    ):
        with pytest.raises((UsageError, CheckpointNotFound), match=words):
            hr.fork(recorded.root, **options)
        assert [path.name for path in (here / "runs").iterdir()] == ["a"]
    made = hr.fork(recorded.root, config={"seed": 3, "allow_config_change": "an ablation"})
    assert made.lineage.settings == {"seed": 3}


def test_settings_that_are_not_known_are_left_to_who_starts_the_run(here):
    run = stored(here / "runs/a", None)
    with pytest.raises(UsageError, match=r"are not known, so none can be set"):
        hr.fork(run.root, lr=1)
    made = hr.fork(run.root)
    assert (made.config, made.entry) == (None, None)
    assert made.command == f"start it as its parent was started, with run_dir {here / 'runs/a-fork-20'}"
    with pytest.raises(UsageError, match="is not known here"):
        made.submit()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"command": ("python", "train.py", "--lr", "1")}, "-- python train.py --lr 1"),
        ({"target": "train"}, "start it as its parent was"),
        ({}, "start it as its parent was"),
    ],
)
def test_what_a_run_is_of_decides_how_its_fork_is_started(here, entry, words):
    run = stored(here / "runs/a", Config(entry=entry))
    assert words in hr.fork(run.root).command
    if "target" not in entry:
        with pytest.raises(UsageError, match="was not given arguments by us"):
            hr.fork(run.root, to=here / "b", lr=1)


def test_the_command_says_what_it_did_as_json(recorded, here):
    shown = call("fork", recorded.root, "--at", 20, "--set", "lr=1e-4", "--copy", "--json")
    record = json.loads(shown.stdout)
    assert (record["run_dir"], record["how"], record["job_id"]) == (
        str(here / "runs/a-fork-20"),
        "copies",
        None,
    )
    assert record["settings"] == {"entry.kwargs.lr": 1e-4}
    assert call("fork", here / "nix").exit_code == 3
    assert call("rollback", recorded.root, "--why", "x").exit_code == 2
    assert call("rollback", recorded.root, "--to", 10, "--undo", "--why", "x").exit_code == 2
    assert call("rollback", here / "nix", "--to", 10, "--why", "x").exit_code == 3


def test_config_without_a_run_tells_where_settings_come_from(here, monkeypatch):
    (here / "c.yaml").write_text("seed: 4\n")
    monkeypatch.setenv("HPC_RESUME_BUDGET__CRASHES", "2")
    shown = call("config", "-c", "c.yaml", "-o", "checkpoint.every_s=60", "--origin")
    lines = shown.stdout.splitlines()
    assert "seed: 4  # c.yaml" in lines
    assert "budget.crashes: 2  # variable HPC_RESUME_BUDGET__CRASHES" in lines
    assert "checkpoint.every_s: 60.0  # flag" in lines
    assert "name: run  # default" in lines
    assert json.loads(call("config", "-c", "c.yaml", "--json").stdout)["seed"] == 4
    assert call("config", "--log").exit_code == 2
    assert call("config", here / "nix", "--origin").exit_code == 2
    assert call("config", here / "nix").exit_code == 3
