"""Runs on the real Slurm: every way in which a job ends that the spine must survive.

The run that goes through its time limit takes longest, because Slurm looks at limits every 30 s only: it is
submitted first, on nodes of its own, and looked at last.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.journal import read_events
from hpc_resume.launch.script import render
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory
from tests.run.training import GLOBAL_BATCH, train

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from tests.run.training import train
train({steps}, step_s={step_s}, every_steps=10)
"""


class Scenario:
    """One run on the cluster, from the sbatch file that ``hpc-resume script`` renders."""

    def __init__(self, cluster, name, *, steps=60, step_s=0.1, limit_s=600, lead_s=30, **node_type):
        self.cluster = cluster
        self.root = cluster.work / name
        self.train = cluster.work / f"{name}.py"
        self.train.write_text(SCRIPT.format(root=str(ROOT), steps=steps, step_s=step_s))
        self.config = Config(
            name=name,
            run_dir=str(self.root),
            scheduler="slurm",
            time_limit_s=limit_s,
            warning_lead_s=lead_s,
            node_types=[{"name": name, "cpus_per_task": 1, "mem_gb": 1, **node_type}],
            environment={"variables": {"OMP_NUM_THREADS": "1"}},
        )
        self.script = cluster.work / f"{name}.sbatch"
        command = [sys.executable, str(self.train)]
        self.script.write_text(render(self.config, command=command, run_dir=self.root))
        self.job = cluster.sbatch(self.script)

    def log(self):
        path = self.cluster.work / f"{self.config.name}-{self.job}.log"
        return path.read_text() if path.exists() else "no log"

    def wait_for(self, condition, timeout_s, why):
        try:
            self.cluster.wait_for(condition, timeout_s, why)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-4000:]}") from None

    def wait_for_progress(self, attempt=1, step=10):
        def committed():
            run = RunDirectory(self.root)
            return any(
                event["event"] == "saved" and event["step"] >= step
                for event in read_events(run.attempt(attempt) / "events.jsonl")
            )

        self.wait_for(committed, 60, f"attempt {attempt} has saved step {step}")

    def wait_until_over(self, timeout_s=90):
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait_for(lambda: self.cluster.state(self.job) in over, timeout_s, "the job is over")
        return self.cluster.state(self.job)

    def pid_of_rank(self, rank):
        wanted = {f"SLURM_JOB_ID={self.job}".encode(), f"SLURM_PROCID={rank}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if str(self.train).encode() in words and b"srun" not in words[0]:
                        return int(folder.name)
            except OSError:
                continue
        raise AssertionError(f"rank {rank} of job {self.job} is not here")

    def status(self):
        return status(self.root).to_json()


def train_on_cluster(steps):
    """What submitit runs: a function, by reference."""
    train(steps, step_s=0.1, every_steps=50)


@pytest.fixture(scope="module")
def long_run(cluster_of_session):
    """A run of 4 ranks on 2 nodes that goes through its time limit; submitted through submitit."""
    cluster = cluster_of_session
    before = dict(os.environ)
    os.environ.update(cluster.env, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    try:
        job = hr.submit(
            train_on_cluster,
            config={
                "name": "limit",
                "scheduler": "slurm",
                # Warned 10 to 40 s after the start: some steps are done by then, and never all 42 s of them.
                "time_limit_s": 60,
                "warning_lead_s": 20,
                "node_types": [
                    {"nodes": 2, "tasks_per_node": 2, "cpus_per_task": 1, "constraint": "a100", "mem_gb": 2}
                ],
            },
            run_dir=cluster.work / "limit",
            steps=420,
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    return job


@pytest.fixture(autouse=True)
def background(long_run):
    """Start the long run before anything else."""


def test_preemption_with_grace_saves_requeues_and_goes_on(cluster):
    run = Scenario(cluster, "preempted", partition="low", constraint="v100", tasks_per_node=2)
    run.wait_for_progress()
    node = cluster.job(run.job)["NodeList"]
    other = cluster.sbatch("#!/bin/bash\nsleep 2\n", "-p", "high", "-w", node, "--exclusive", "-t", "1")
    assert run.wait_until_over() == "COMPLETED", run.log()
    cluster.wait_state(other, "COMPLETED")
    first, second = run.status()["attempts"]
    assert (first["cause"], first["decision"], first["steps_lost"]) == ("preemption", "continue", 0)
    assert "PreemptTime" in first["evidence"]
    assert (second["cause"], second["restart_count"]) == ("done", 1)
    assert verify_run(run.root) == []


def test_requeue_onto_the_other_node_type_with_another_number_of_ranks(cluster):
    run = Scenario(cluster, "elsewhere", nodes=2, constraint="v100", steps=50)
    run.wait_for_progress()
    cluster.run("scancel", "--signal=USR2", run.job)
    run.wait_for(lambda: cluster.state(run.job) == "PENDING", 30, "it is requeued")
    cluster.run("scontrol", "update", f"JobId={run.job}", "NumNodes=1", "NumTasks=1", "Features=a100")
    assert run.wait_until_over() == "COMPLETED", run.log()
    first, second = run.status()["attempts"]
    assert (first["world_size"], first["node_type"]) == (2, "main/v100")
    assert (second["world_size"], second["node_type"]) == (1, "main/a100")
    assert first["cause"] == "signal"
    assert second["cause"] == "done"
    assert run.status()["steps_lost"] == 0


def test_scancel_stays_cancelled(cluster):
    run = Scenario(cluster, "cancelled", steps=5000, constraint="v100", tasks_per_node=2)
    run.wait_for_progress()
    cluster.cancel(run.job)
    assert run.wait_until_over(30) == "CANCELLED"
    found = run.status()
    assert found["state"] == "cancelled"
    (only,) = found["attempts"]
    assert (only["cause"], only["decision"]) == ("cancel", "stop")
    # It was saved all the same: whoever submits it again goes on from there.
    assert store.find(RunDirectory(run.root))[1].step == only["last_step"]
    assert cluster.job(run.job)["Restarts"] == "0"


def test_a_signal_that_reaches_one_rank_only(cluster):
    run = Scenario(cluster, "one-rank", nodes=2, constraint="v100", steps=50)
    run.wait_for_progress()
    os.kill(run.pid_of_rank(1), signal.SIGUSR2)
    assert run.wait_until_over() == "COMPLETED", run.log()
    first, second = run.status()["attempts"]
    assert (first["cause"], first["steps_lost"], second["cause"]) == ("signal", 0, "done")
    asked = [
        e for e in read_events(run.root / "attempts/0001/events.jsonl") if e["event"] == "stop_requested"
    ]
    assert [event["rank"] for event in asked] == [1]


def test_kill_9_of_a_rank_goes_on_from_the_last_checkpoint(cluster):
    run = Scenario(cluster, "killed", constraint="v100", tasks_per_node=2)
    run.wait_for_progress()
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    first, second = run.status()["attempts"]
    assert second["first_step"] >= 10
    assert first["steps_lost"] <= 10
    assert second["cause"] == "done"
    assert verify_run(run.root) == []


def test_no_accounting_service_is_needed(cluster):
    assert "accounting storage is disabled" in cluster.run("sacct", check=False)


@pytest.mark.timeout(400)
def test_two_nodes_and_four_ranks_through_the_time_limit_and_back(cluster, long_run):
    def over():
        return status(Path(long_run.run_dir)).to_json()["state"] in {"done", "failed", "cancelled"}

    cluster.wait_for(over, 240, "the long run is done")
    found = status(Path(long_run.run_dir)).to_json()
    assert found["state"] == "done", f"{found}\n{long_run.log()}"
    attempts = found["attempts"]
    assert len(attempts) >= 2
    assert {attempt["cause"] for attempt in attempts[:-1]} == {"time_limit"}
    assert found["steps_lost"] == 0
    run = RunDirectory(Path(long_run.run_dir))
    stopped = [m for _, m in store.newest_first(run) if getattr(m, "reason", "") == "stop"]
    assert {(m.world_size, len(m.shards)) for m in stopped} == {(4, 4)}
    assert {shard.node for m in stopped for shard in m.shards} == {"big1", "big2"}
    _, last = store.find(run)
    assert (last.step, last.samples) == (420, 420 * GLOBAL_BATCH)
    assert verify_run(run.root) == []
