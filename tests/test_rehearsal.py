"""Rehearsals of whole scripts: each verdict, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_resume.errors import UsageError
from hpc_resume.rehearsal import rehearse

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("hpc-resume")

SCRIPT = """
import sys, time
import torch
import hpc_resume as hr

def train(steps=50, batch=6, run_dir="runs/real", track=True, unseeded=False, wrong=False):
    with hr.Run(run_dir) as run:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator()
        if unseeded:
            generator.seed()
        data = run.loader(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), global_batch=batch)
        run.track(model=model, optimizer=optimizer, data=data, **({"schedule": schedule} if track else {}))
        for step, x in run.steps(data, until=steps):
            noise = torch.randn(len(x), 1, generator=generator) if unseeded else 0
            loss = (model(x) - x.sum(1, keepdim=True).sin() - noise).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            run.log(loss=loss)
            time.sleep(0.03)
            if wrong:
                raise ValueError("something is wrong")

if __name__ == "__main__":
    train()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a script, and another one for all that is temporary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def left(here):
    return list((here / "scratch").glob("hpc-resume-*"))


def processes(here):
    """Command lines of processes that work in this test's folders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(here / "scratch") in words:
            found.append(words)
    return found


def test_the_example_resumes_equal(here):
    words = [COMMAND, "rehearse", f"{ROOT}/examples/gpt.py:train", "--times=2", "--seed=7", "--json"]
    words += ["--set=steps=120", "--set=width=32", "--set=layers=1", "--set=length=64"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["folder"]) == ("equal", None)
    assert "120 metrics of 120 steps are equal, bit for bit" in found["why"]
    assert [act["interrupted_by"] for act in found["acts"]] == ["kill", "time limit", None]
    assert (left(here), processes(here)) == ([], [])


def test_a_command_resumes_equal_on_other_ranks_and_the_real_run_is_left_alone(here):
    found = rehearse([sys.executable, "script.py"], times=1, ranks=[2, 1])
    assert found.verdict == "equal", repr(found)
    assert [act.ranks for act in found.acts] == [2, 1]
    assert "but for rounding" in found.why
    assert not (here / "runs").exists()
    assert left(here) == []


def test_a_scheduler_that_is_not_tracked_is_found_and_named(here):
    found = rehearse("script.py:train", times=1, track=False)
    assert found.verdict == "differs", repr(found)
    shown = repr(found)
    assert "not tracked, though it has a state: generator (Generator), schedule (CosineAnnealingLR)" in shown
    assert "optimizer/param_groups/0/lr is" in shown
    first, second = found.acts
    assert f"after it went on from step {second.first_step}" in found.why
    assert found.comparison.logged[0].step >= first.last_step
    assert found.folder.is_dir()  # kept, to look into it
    assert processes(here) == []


def test_numbers_of_ranks_that_the_run_declines_are_told(here):
    found = rehearse("script.py:train", times=1, ranks=[1, 2], batch=5)
    assert found.verdict == "equal", repr(found)
    assert [(act.ranks, act.interrupted_by) for act in found.acts[1:]] == [(2, "declined"), (1, None)]
    assert any("2 ranks were declined" in hint and "can't be split evenly" in hint for hint in found.hints)


def test_unseeded_randomness_is_not_blamed_on_the_resume(here):
    found = rehearse("script.py:train", times=1, unseeded=True)
    assert found.verdict == "nondeterministic", repr(found)
    assert "two uninterrupted runs differ, from step 0 on" in found.why
    assert any("without a seed" in hint for hint in found.hints)


def test_a_script_that_fails_by_itself_is_told_so(here):
    found = rehearse("script.py:train", times=1, wrong=True, config={"budget": {"max_idle": 1}})
    assert found.verdict == "failed"
    assert "something is wrong" in found.why


def test_the_time_limit_ends_everything(here):
    found = rehearse("script.py:train", times=1, steps=100_000, time_limit_s=6.0)
    assert found.verdict == "failed"
    assert "not over when the time was up" in found.why
    assert processes(here) == []


def test_whoever_breaks_it_off_leaves_nothing_behind(here):
    words = [COMMAND, "rehearse", "script.py:train", "--set=steps=100000"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((here / "scratch").glob("*/uninterrupted/attempts/0001")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (left(here), processes(here)) == ([], [])


@pytest.mark.parametrize("wrong", [{"times": 0}, {"ranks": []}, {"ranks": [0]}, {"time_limit_s": 0}])
def test_what_can_not_be_is_refused_before_anything_is_run(here, wrong):
    with pytest.raises(UsageError):
        rehearse("script.py:train", **wrong)
    assert left(here) == []
