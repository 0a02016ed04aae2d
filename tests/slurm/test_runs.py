"""Runs on the real Slurm: every way in which a job ends that the spine must survive.

The runs that go through their time limits take longest, because Slurm looks at limits every 30 s only: they are
submitted first, on nodes of their own, and looked at last.
"""

import os
import signal
from pathlib import Path

import pytest

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory
from tests.run.training import GLOBAL_BATCH, train
from tests.slurm.scenario import ROOT, Scenario

#: Half a second each; a job of two minutes has not done them all when it is stopped.
STEPS = 210


def train_on_cluster(steps):
    """What submitit runs: a function, by reference."""
    train(steps, step_s=0.5, every_steps=50)


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
                # Stopped 100 s after the start: some steps are done by then, and never all 105 s of them.
                "time_limit_s": 120,
                "warning_lead_s": 20,
                "node_types": [
                    {"nodes": 2, "tasks_per_node": 2, "cpus_per_task": 1, "constraint": "a100", "mem_gb": 2}
                ],
            },
            run_dir=cluster.work / "limit",
            steps=STEPS,
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    return job


@pytest.fixture(scope="module")
def own_clock(cluster_of_session):
    """A run that is not warned before its time limit."""
    return Scenario(
        cluster_of_session, "own-clock", steps=STEPS + 50, step_s=0.5, limit_s=120, lead_s=0, mem_gb=0.5,
        constraint="a100", every_steps=None, train="checkpoint={'every_s': 20}",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def background(long_run, own_clock):
    """Start the long runs before anything else."""


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


def test_a_signal_to_one_rank_and_on_to_the_other_node_type_with_another_number_of_ranks(cluster):
    run = Scenario(cluster, "elsewhere", nodes=2, constraint="v100", steps=50)
    run.wait_for_progress()
    os.kill(run.pid_of_rank(1), signal.SIGUSR2)
    run.wait_for(lambda: cluster.state(run.job) == "PENDING", 60, "it is requeued")
    cluster.run("scontrol", "update", f"JobId={run.job}", "NumNodes=1", "NumTasks=1", "Features=a100")
    assert run.wait_until_over() == "COMPLETED", run.log()
    first, second = run.status()["attempts"]
    assert (first["world_size"], first["node_type"]) == (2, "main/v100")
    assert (second["world_size"], second["node_type"]) == (1, "main/a100")
    assert (first["cause"], second["cause"]) == ("signal", "done")
    assert run.status()["steps_lost"] == 0
    events = read_events(run.root / "attempts/0001/events.jsonl", {"stop_requested"})
    assert [event["rank"] for event in events] == [1]
    assert cluster.job(run.job)["Restarts"] == "1"
    assert "in place" not in run.log()  # a signal by hand gives the allocation back
    assert verify_run(run.root) == []


def test_no_accounting_service_is_needed(cluster):
    assert "accounting storage is disabled" in cluster.run("sacct", check=False)


@pytest.mark.timeout(1200)
def test_two_nodes_and_four_ranks_through_the_time_limit_and_back(cluster, long_run):
    def over():
        return status(Path(long_run.run_dir)).to_json()["state"] in {"done", "failed", "cancelled"}

    cluster.wait_for(over, 900, "the long run is done")
    found = status(Path(long_run.run_dir)).to_json()
    assert found["state"] == "done", f"{found}\n{long_run.log()}"
    attempts = found["attempts"]
    assert len(attempts) >= 2
    assert {attempt["cause"] for attempt in attempts[:-1]} == {"time_limit"}, attempts
    assert found["steps_lost"] == 0
    run = RunDirectory(Path(long_run.run_dir))
    stopped = [m for _, m in store.newest_first(run) if getattr(m, "reason", "") == "stop"]
    assert {(m.world_size, len(m.shards)) for m in stopped} == {(4, 4)}
    assert {shard.node for m in stopped for shard in m.shards} == {"big1", "big2"}
    _, last = store.find(run)
    assert (last.step, last.samples) == (STEPS, STEPS * GLOBAL_BATCH)
    assert verify_run(run.root) == []


@pytest.mark.timeout(1200)
def test_a_job_without_a_warning_saves_by_its_own_clock_and_loses_nothing(cluster, own_clock):
    run, log = RunDirectory(own_clock.root), own_clock.log
    assert "--signal" not in own_clock.script.read_text()
    assert own_clock.wait_until_over(900) == "COMPLETED", log()
    found = own_clock.status()
    assert found["state"] == "done", log()
    *interrupted, last = found["attempts"]
    assert interrupted
    assert {(each["cause"], each["decision"]) for each in interrupted} == {("time_limit", "continue")}
    assert found["steps_lost"] == 0
    assert (last["cause"], store.find(run)[1].step) == ("done", STEPS + 50)
    for attempt in interrupted:
        events = read_events(run.attempt(attempt["attempt"]) / "events.jsonl")
        (end_s,) = [event["ends_at_s"] for event in events if event["event"] == "end_of_job"]
        (asked,) = [event for event in events if event["event"] == "stop_requested"]
        assert asked["signal"] == "DEADLINE"
        assert "measured), so a lead of" in asked["evidence"]
        assert end_s - 30 < asked["t"] < end_s - 2
        assert attempt["ended"] < end_s
    assert verify_run(run.root) == []
