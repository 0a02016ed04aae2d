"""Every fact about Slurm that our code leans on, looked at on a real cluster.

Slurm's own timers are slow (30 s for time limits), so all jobs run side by side: each ``scenario_x`` runs in a
thread of its own, and ``test_x`` looks at what came of it.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.launch.script import render
from hpc_resume.scheduler.command import run_command
from hpc_resume.scheduler.slurm import SlurmScheduler

PROBE = Path(__file__).parent / "probe.py"
ROOT = Path(__file__).parents[2]
END = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


class Job:
    """A job of a scenario: ranks that run the probe or a line of shell, under our batch script."""

    def __init__(self, cluster, name, command, *sbatch, ranks=1, nodes=1):
        self.cluster = cluster
        self.records_path = cluster.work / f"{name}.jsonl"
        if not isinstance(command, str):
            command = [sys.executable, str(PROBE), str(self.records_path), *command]
        config = Config.load(
            overrides={
                "name": name,
                "warning_lead_s": 10,
                "time_limit_s": 600,
                "node_types": [{"nodes": nodes, "tasks_per_node": ranks}],
                "environment.variables": {"PYTHONPATH": str(ROOT)},
            }
        )
        run_dir = cluster.work / "runs" / name
        text = render(config, command=command, run_dir=run_dir, output="slurm-%j.out")
        self.id = cluster.sbatch(text, *sbatch)

    def records(self, event=None, restart=None):
        try:
            lines = self.records_path.read_text().splitlines()
        except FileNotFoundError:
            return []
        records = map(json.loads, lines)
        return [r for r in records if event in {None, r["event"]} and restart in {None, r["restart_count"]}]

    def wait_records(self, count, event, restart=None, timeout_s=180):
        self.cluster.wait_for(
            lambda: len(self.records(event, restart)) >= count, timeout_s, f"{count} {event} of {self.id}"
        )
        return self.records(event, restart)

    def wait_end(self, timeout_s=180):
        return self.cluster.wait_state(self.id, *END, timeout_s=timeout_s)

    def scheduler(self, job_id=None):
        """As on a login node."""
        return SlurmScheduler(job_id or self.id, runner=partial(run_command, environ=self.cluster.environ))

    @property
    def log(self):
        return self.cluster.output(self.id)


# -- what happens to each job -----------------------------------------------------------------------------


def scenario_warning(cluster):
    job = Job(cluster, "warning", ["75"], "--nodelist=small1", ranks=2)
    job.wait_records(2, "started")
    cluster.run("scancel", "--signal=USR2", job.id)
    return job, job.wait_end()


def scenario_cancel(cluster):
    job = Job(cluster, "cancel", ["requeue"], "--nodelist=small1")
    job.wait_records(1, "started")
    job.scheduler().cancel()
    return job, job.wait_end()


def scenario_cancel_of_a_stubborn_job(cluster):
    job = Job(cluster, "stubborn", ["stubborn"], "--nodelist=small1")
    job.wait_records(1, "started")
    job.scheduler().cancel()
    return job, job.wait_end()


def scenario_requeue_by_a_person(cluster):
    job = Job(cluster, "person", ["requeue"], "--nodelist=small1")
    job.wait_records(1, "started")
    first = job.scheduler().requeue()
    raw = cluster.run("scontrol", "requeue", job.id, check=False)  # what the second of two requeuers is told
    return job, job.wait_end(), first, raw, job.scheduler().requeue()


def scenario_requeue_by_a_rank(cluster):
    job = Job(cluster, "rank", ["requeue"], "--nodelist=small1")
    job.wait_records(1, "started")
    cluster.run("scancel", "--signal=USR2", job.id)
    return job, job.wait_end()


def scenario_preemption_with_grace(cluster):
    job = Job(cluster, "grace", ["requeue"], "--nodelist=big1", "--partition=low")
    job.wait_records(1, "started")
    other = cluster.sbatch("#!/bin/bash\nsleep 1000", "--nodelist=big1", "--partition=high", "--exclusive")
    job.wait_records(1, "signal")
    cluster.cancel(other)
    return job, job.wait_end()


def scenario_preemption_without_grace(cluster):
    job = Job(cluster, "no-grace", ["75"], "--nodelist=big2", "--partition=low0")
    job.wait_records(1, "started")
    other = cluster.sbatch("#!/bin/bash\nsleep 1000", "--nodelist=big2", "--partition=high", "--exclusive")
    job.wait_records(1, "signal")
    cluster.cancel(other)
    return job, job.wait_end()


def scenario_array(cluster):
    job = Job(cluster, "array", ["75"], "--nodelist=small1", "--array=0-1")
    started = job.wait_records(2, "started")
    # The element whose SLURM_JOB_ID is the array's: the trap.
    raw = {cluster.job(f"{job.id}_{element}")["JobId"]: element for element in (0, 1)}
    trapped = f"{job.id}_{raw[job.id]}"
    other = f"{job.id}_{1 - raw[job.id]}"
    cluster.run("scancel", "--signal=USR2", trapped)
    cluster.wait_for(lambda: cluster.job(trapped)["Restarts"] == "1", 30, "the element is requeued")
    facts = job.scheduler(trapped).facts(), job.scheduler(other).facts()
    cluster.wait_state(trapped, *END, timeout_s=180)
    cluster.cancel(other)
    return started, trapped, facts


def scenario_time_limit_warning(cluster):
    job = Job(cluster, "limit-warning", ["75"], "--nodelist=small1")
    job.wait_records(1, "started")
    # Slurm looks every 30 s, and warns if less than lead + 30 s are left: here at the next look, whenever it is.
    cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+35")
    return job, job.wait_end(90)


def scenario_time_limit(cluster):
    job = Job(cluster, "limit", ["75", "TERM"], "--nodelist=small1")
    job.wait_records(1, "started")
    cluster.run("scontrol", "update", f"JobId={job.id}", "EndTime=now+1")
    return job, job.wait_end(120)


def scenario_node_failure(cluster):
    job = Job(cluster, "node", ["75"], "--nodelist=small1,small2", nodes=2)
    job.wait_records(2, "started")
    cluster.kill_node("small2")
    signals = job.wait_records(1, "signal")
    cluster.restore_node("small2")
    return job, job.wait_end(), signals


def scenario_killed_rank(cluster):
    line = "bash -c '[ -n \"$SLURM_RESTART_COUNT\" ] || kill -KILL $$'"
    job = Job(cluster, "killed", line, "--nodelist=small1")
    return job, job.wait_end()


def scenario_failure(cluster):
    job = Job(cluster, "failed", "bash -c 'exit 3'", "--nodelist=small1")
    return job, job.wait_end()


def scenario_no_requeue_allowed(cluster):
    job = Job(cluster, "refused", ["requeue"], "--nodelist=small1", "--no-requeue")
    job.wait_records(1, "started")
    cluster.run("scancel", "--signal=USR2", job.id)
    return job, job.wait_end()


def scenario_python_without_srun(cluster):
    path = cluster.work / "bare.jsonl"
    line = f"PYTHONPATH={ROOT} {sys.executable} {PROBE} {path} 75 USR2 & wait"
    job = cluster.sbatch(f"#!/bin/bash\n{line}", "--nodelist=big2", "--ntasks=4", "--partition=main")
    cluster.wait_for(path.exists, 30, "the probe has started")
    cluster.cancel(job)
    return json.loads(path.read_text().splitlines()[0])


@pytest.fixture(scope="module")
def scenarios(cluster_of_session):
    found = {name: function for name, function in globals().items() if name.startswith("scenario_")}
    with ThreadPoolExecutor(len(found)) as pool:
        futures = {name: pool.submit(function, cluster_of_session) for name, function in found.items()}
        yield lambda name: futures[f"scenario_{name}"].result()
        for future in futures.values():
            future.exception()  # all are over before the cluster is used for anything else
    cluster_of_session.cancel()


@pytest.fixture
def outcome(scenarios, request):
    return scenarios(request.node.name.removeprefix("test_"))


def only(records):
    assert len(records) == 1
    return records[0]


# -- what came of it --------------------------------------------------------------------------------------


def test_warning(outcome):
    """A bare warning is told from a time limit; leaving with 75 continues the job, under the same log."""
    job, state = outcome
    assert state == "COMPLETED"
    assert {(r["rank"], r["signal"], r["cause"]) for r in job.records("signal")} == {
        (0, "SIGUSR2", "signal"),
        (1, "SIGUSR2", "signal"),
    }
    assert re.search(r"JobState=(RUNNING|SIGNALING) Reason=None", job.records("signal")[0]["evidence"])
    first, second = ([r["environment"] for r in job.records("started", restart)] for restart in (0, 1))
    assert [
        sorted((e["rank"], e["world_size"], e["local_world_size"]) for e in es) for es in (first, second)
    ] == [[(0, 2, 2), (1, 2, 2)]] * 2
    assert {e["rendezvous"] for e in first} == {f"slurm-{job.id}-0-0"}
    assert {e["rendezvous"] for e in second} == {f"slurm-{job.id}-1-0"}
    assert all(e["launcher_requeues"] and e["node"] == "small1" for e in first)
    assert {r["node_type"] for r in job.records("started")} == {"main/v100"}
    assert "is requeued and will go on" in job.log  # appended to, not truncated, by the second attempt


def test_cancel(outcome):
    """A cancel stays one, though the rank asks for a requeue and leaves with 75."""
    job, state = outcome
    assert state == "CANCELLED"
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "cancel", False)
    assert "JobState=COMPLETING Reason=None" in record["evidence"]
    assert "not requeued, because it is being ended" in record["answer"]
    assert job.cluster.job(job.id)["Restarts"] == "0"
    assert "does not requeue" in job.log


def test_cancel_of_a_stubborn_job(outcome):
    """Killed after KillWait: the script sees a code above 128, and still leaves the job alone."""
    job, state = outcome
    assert state == "CANCELLED"
    assert job.cluster.job(job.id)["Restarts"] == "0"


def test_requeue_by_a_person(outcome):
    """The next attempt is on its way: Restarts says so, and a second requeue is no error."""
    job, state, first, raw, second = outcome
    assert state == "COMPLETED"
    assert first is True
    assert "is pending execution" in raw
    assert second is True
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "requeue", True)
    assert record["answer"] is True
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_requeue_by_a_rank(outcome):
    """One requeue, although rank and script both ask; our commands outlive the SIGTERM that follows."""
    job, state = outcome
    assert state == "COMPLETED"
    record = only(job.records("signal"))
    assert (record["cause"], record["answer"]) == ("signal", True)
    protected, plain = record["children"]
    assert protected == 0
    assert plain == -12  # Slurm signals the children of tasks, too: without protection, scontrol dies
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_preemption_with_grace(outcome):
    """SIGTERM while RUNNING (or, for a moment, SIGNALING), with PreemptTime; a requeue in the grace time is accepted."""
    job, state = outcome
    assert state == "COMPLETED"
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "preemption", False), record
    assert re.search(r"JobState=(RUNNING|SIGNALING) .*PreemptTime=\d{10}", record["evidence"])
    assert record["answer"] is True
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_preemption_without_grace(outcome):
    """Slurm has requeued the job when the signal comes; squeue still knows why."""
    job, state = outcome
    assert state == "COMPLETED"
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "preemption", True)
    assert re.search(r"JobState=COMPLETING .*Restarts=1 .*PreemptTime=\d{10}", record["evidence"])


def test_array(outcome):
    """One element has the array's number as SLURM_JOB_ID; its requeue leaves the others running."""
    started, trapped, (own, others) = outcome
    assert {r["environment"]["job_id"] for r in started} >= {trapped}
    assert own.restarts == 1
    assert (others.state in {"RUNNING", "SIGNALING"}, others.restarts) == (True, 0)


def test_time_limit_warning(outcome):
    """The warning comes while RUNNING, with EndTime at most lead + 30 s away."""
    job, state = outcome
    assert state == "COMPLETED"
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"]) == ("SIGUSR2", "time_limit")
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_time_limit(outcome):
    """At the limit itself Slurm gives the reason, and the script can still requeue."""
    job, state = outcome
    assert state == "COMPLETED"
    record = only(job.records("signal"))
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "time_limit", False)
    assert "Reason=TimeLimit" in record["evidence"]
    assert job.cluster.job(job.id)["Restarts"] == "1"


def test_node_failure(outcome):
    """The survivors are told by SIGTERM; sinfo says which node is down."""
    job, state, signals = outcome
    assert state == "COMPLETED"
    record = only(signals)
    assert (record["signal"], record["cause"], record["requeued"]) == ("SIGTERM", "node_failure", True)
    assert "(small2 down)" in record["evidence"]
    assert len(job.records("started", restart=1)) == 2


def test_killed_rank(outcome):
    job, state = outcome
    assert state == "COMPLETED"
    assert job.cluster.job(job.id)["Restarts"] == "1"
    assert "exit code 137" in job.log


def test_failure(outcome):
    job, state = outcome
    assert state == "FAILED"
    assert job.cluster.job(job.id)["ExitCode"] == "3:0"
    assert job.cluster.job(job.id)["Restarts"] == "0"


def test_no_requeue_allowed(outcome):
    """Both the rank and the script are told why, and what to do."""
    job, state = outcome
    assert state == "FAILED"
    assert "scontrol requeue was refused" in only(job.records("signal"))["answer"]
    assert "does not requeue" in job.log
    assert "submit it again" in job.log
    assert job.cluster.job(job.id)["ExitCode"] == "75:0"


def test_python_without_srun(outcome):
    """In the batch script SLURM_PROCID and SLURM_NTASKS are there, but it is no rank of four."""
    environment = outcome["environment"]
    assert (environment["kind"], environment["rank"], environment["world_size"]) == ("slurm", 0, 1)


def test_facts_of_a_job_that_is_not_there(cluster):
    facts = SlurmScheduler("4711").facts()
    assert facts.state == "UNKNOWN"
    assert "Invalid job id" in facts.evidence


def test_facts_where_slurm_does_not_answer(cluster, monkeypatch, tmp_path):
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", conf))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr("hpc_resume.scheduler.client._ATTEMPTS", 1)
    monkeypatch.setattr("hpc_resume.scheduler.client._COMMAND_TIMEOUT_S", 0.5)
    assert SlurmScheduler("1").facts().state == "UNKNOWN"


def test_sbatch_reads_our_directives(cluster):
    """Quoting, long times and a percent sign in a folder are understood as they are meant."""
    folder = cluster.work / "50% done"
    folder.mkdir()
    config = Config.load(
        overrides={"name": "gpt", "time_limit_s": 3600, "node_types": [{"constraint": "a100|v100"}]}
    )
    config = config.replace(slurm={"additional_parameters": {"comment": 'it\'s "mine"'}})
    text = render(config, command="true", run_dir=folder, output=f"{cluster.work}/50%% done/%x-%j.log")
    job = cluster.sbatch(text)
    shown = cluster.run("scontrol", "show", "job", job)
    assert "TimeLimit=01:00:00" in shown
    assert "Features=a100|v100" in shown
    assert "Requeue=1" in shown
    assert 'Comment=it\'s "mine"' in shown
    cluster.wait_state(job, "COMPLETED")
    assert (folder / f"gpt-{job}.log").exists()
