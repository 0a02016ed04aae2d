"""On the real Slurm: a run that watches the end of its job itself, and what it is told before it is submitted."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.manifest import MANIFEST, read_manifest
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.journal import read_events
from hpc_resume.launch.check import check_times
from hpc_resume.launch.script import render
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory
from tests.commits import commit_state

ROOT = Path(__file__).parents[2]
STEPS = 800
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.run.training import train
train({STEPS}, step_s=0.1)
"""


@pytest.mark.timeout(400)
def test_a_job_without_a_warning_saves_by_its_own_clock_and_loses_nothing(cluster):
    run = RunDirectory(cluster.work / "own-clock")
    train = cluster.work / "own-clock.py"
    train.write_text(SCRIPT)
    config = Config(
        name="own-clock",
        run_dir=str(run.root),
        scheduler="slurm",
        time_limit_s=60,
        warning_lead_s=0,
        checkpoint={"every_s": 10},
        node_types=[{"tasks_per_node": 2, "cpus_per_task": 1, "mem_gb": 1, "constraint": "v100"}],
        environment={"variables": {"OMP_NUM_THREADS": "1"}},
    )
    script = render(config, command=[sys.executable, str(train)], run_dir=run.root)
    assert "--signal" not in script
    job = cluster.sbatch(script)
    over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    cluster.wait_for(lambda: cluster.state(job) in over, 300, "the job is over")
    log = (cluster.work / f"own-clock-{job}.log").read_text()
    found = status(run.root).to_json()
    assert (cluster.state(job), found["state"]) == ("COMPLETED", "done"), log
    *interrupted, last = found["attempts"]
    assert interrupted
    assert {(each["cause"], each["decision"]) for each in interrupted} == {("time_limit", "continue")}
    assert found["steps_lost"] == 0
    assert (last["cause"], store.find(run)[1].step) == ("done", STEPS)
    for attempt in interrupted:
        events = read_events(run.attempt(attempt["attempt"]) / "events.jsonl")
        (end_s,) = [event["ends_at_s"] for event in events if event["event"] == "end_of_job"]
        (asked,) = [event for event in events if event["event"] == "stop_requested"]
        assert asked["signal"] == "DEADLINE"
        assert "measured), so a lead of" in asked["evidence"]
        assert end_s - 30 < asked["t"] < end_s - 2
        assert attempt["ended"] < end_s
    assert verify_run(run.root) == []


def test_submission_tells_that_the_grace_time_of_a_partition_is_too_short(cluster):
    root = cluster.work / "slow-saves"
    path = commit_state(root, step=4000, state={"weight": torch.zeros(1000)}) / MANIFEST
    manifest = read_manifest(path.parent)
    slow = dataclasses.replace(manifest, costs={**manifest.costs, "write_s": 43.0})
    path.write_bytes(slow.to_bytes())
    path.parent.rename(path.parent.with_name(slow.name))
    words = ["script", "-o", "scheduler=slurm", "-o", "time_limit_s=3600", "--run-dir", str(root)]
    words += ["-o", "node_types=[{partition: low}]", "--", "python", "train.py"]
    done = subprocess.run(
        [Path(sys.executable).with_name("hpc-resume"), *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == (
        "hpc-resume: warning: grace time of partition low is 20 s, KillWait 5 s, but saving this run took 43 s "
        "(step 4000): a preemption will lose the work since the last periodic checkpoint; checkpoint.every_s=600 "
        "bounds it\n"
    )
    config = {"scheduler": "slurm", "time_limit_s": 3600, "run_dir": str(root)}
    for partition, warnings in ((None, 0), ("main", 0), ("high", 0), ("low0", 1)):
        assert len(check_times(Config(**config, node_types=[{"partition": partition}]))) == warnings
