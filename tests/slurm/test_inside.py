"""What happens inside an allocation, and what can be found out about a cluster: on the real Slurm."""

import json
import os
import signal
import stat
import sys
from pathlib import Path

from click.testing import CliRunner

import hpc_resume as hr
from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.launch.script import render
from hpc_resume.report.explain import explain
from tests.run.training import train
from tests.slurm.scenario import Scenario

ROOT = Path(__file__).parents[2]


class Inside(Scenario):
    """One whose script and settings are the test's own."""

    def __init__(
        self, cluster, name, *, script, command=(sys.executable,), settings=None, environ=None, **node_type
    ):
        self.cluster = cluster
        self.root = cluster.work / name
        self.train = cluster.work / f"{name}.py"
        self.train.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}")
        base = {
            "name": name,
            "run_dir": str(self.root),
            "scheduler": "slurm",
            "time_limit_s": 600,
            "warning_lead_s": 30,
            "node_types": [{"name": name, "cpus_per_task": 1, "mem_gb": 1, **node_type}],
            "environment.variables.OMP_NUM_THREADS": "1",
        }
        self.config = Config.load(overrides={**base, **(settings or {})})
        self.script = cluster.work / f"{name}.sbatch"
        self.script.write_text(render(self.config, command=[*command, str(self.train)], run_dir=self.root))
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in (environ or {}).items())])
        self.job = cluster.sbatch(self.script, f"--export={exported}")
        cluster.names.add(name)


TRAIN = "from tests.run.training import train\ntrain(60, step_s=0.1, every_steps=10)\n"
#: Dies at its first step, of a signal that nobody can answer.
DIES = "import torch\ntorch.nn.Linear.forward = lambda *_: os.kill(os.getpid(), 9)\n" + TRAIN


def doctor(*arguments):
    done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, json.loads(done.stdout)


def details(found, area):
    return {each["what"]: each["detail"] for each in found["findings"] if each["area"] == area}


def script_file(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# -- started again in place -------------------------------------------------------------------------------


def test_kill_9_of_rank_0_restarts_in_place(cluster):
    run = Scenario(cluster, "in-place", nodes=2, constraint="v100")
    run.wait_for_progress()
    began = cluster.job(run.job)["StartTime"]
    os.kill(run.pid_of_rank(0), signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    run.was_started_again_in_place(began)
    # Unknown: a peer is gone, and nobody is left to say why.
    assert run.status()["attempts"][0]["cause"] in {"crash", "unknown"}


def test_a_crash_loop_ends_when_its_budget_is_spent(cluster):
    """Killed at the first step, again and again: in place until the node is to blame, then elsewhere, then no more."""
    run = Inside(cluster, "loop", script=DIES, constraint="v100")
    assert run.wait_until_over() == "FAILED", run.log()
    assert cluster.job(run.job)["Restarts"] == "1"
    found = run.status()
    assert found["state"] == "failed"
    attempts = [(each["restart_count"], each["nodes"], each["cause"]) for each in found["attempts"]]
    assert attempts[:2] == [(0, ("small1",), "crash")] * 2
    assert attempts[2] == (0, ("small1",), "bad_node")
    assert {each[:2] for each in attempts[3:]} == {(1, ("small2",))}
    assert len(attempts) <= 6
    told = explain(run.root).attempts[2].lines
    assert any("small1 is avoided: it failed in attempts 1 and 2" in line for line in told), told
    assert run.log().count("started again in place") == len(attempts) - 2


# -- nodes are looked at ----------------------------------------------------------------------------------


def test_an_unfit_node_is_left_and_avoided(cluster):
    """One node has been given GPUs that nobody can use."""
    python = script_file(
        cluster.work / "python-of-the-cluster",
        '#!/bin/bash\n[ "$SLURMD_NODENAME" != small1 ] || export SLURM_GPUS_ON_NODE=2\n'
        f'exec {sys.executable} "$@"\n',
    )
    settings = {"slurm.check_nodes": True, "environment.python": str(python)}
    run = Inside(cluster, "unfit", script=TRAIN, settings=settings, constraint="v100")
    assert run.wait_until_over() == "COMPLETED", run.log()
    job = cluster.job(run.job)
    assert (job["Restarts"], job["ExcNodeList"], job["NodeList"]) == ("1", "small1", "small2")
    (note,) = map(json.loads, (run.root / "jobs/unfit-nodes.jsonl").read_text().splitlines())
    assert (note["job_id"], list(note["nodes"])) == (run.job, ["small1"])
    assert "sees 0; the job was given 2" in note["nodes"]["small1"]
    (only,) = run.status()["attempts"]
    assert (only["nodes"], only["cause"]) == (("small2",), "done")


# -- containers and environments --------------------------------------------------------------------------


def test_a_run_in_a_container_and_an_activated_environment_goes_on_in_place(cluster):
    """No container runs here: what stands for apptainer writes down how it is called, and runs the command."""
    tools = cluster.work / "tools"
    tools.mkdir()
    script_file(
        tools / "apptainer",
        f'#!/bin/bash\necho "$*" >> {cluster.work}/containers\n'
        'while [[ $1 == exec || $1 == --* ]]; do shift; done\nshift\nexec "$@"\n',
    )
    script_file(
        tools / "module.sh", f'module() {{ echo "$*" >> {cluster.work}/modules; export LOADED=$2; }}\n'
    )
    (tools / "init").mkdir()
    (tools / "module.sh").rename(tools / "init/bash")
    settings = {
        "slurm.container": {"image": "torch 2.sif", "args": ["--nv"], "mounts": ["/tmp"]},
        "environment.modules": ["cuda/12.4"],
        "environment.activate": str(Path(sys.executable).parents[1]),
        "environment.setup": ["set -euo pipefail", f"PATH={tools}:$PATH", '[ "$LOADED" = cuda/12.4 ]'],
    }
    run = Inside(
        cluster, "contained", script=TRAIN, command=["python"], settings=settings, environ={"LMOD_PKG": tools},
        constraint="v100",
    )  # fmt: skip
    run.wait_for_progress()
    os.kill(run.pid_of_rank(0), signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    assert cluster.job(run.job)["Restarts"] == "0", run.log()
    called = (cluster.work / "containers").read_text().splitlines()
    folder = cluster.work
    assert set(called) == {
        f"exec --bind={run.root} --bind=/tmp --bind={folder} --pwd={folder} --nv torch 2.sif python {run.train}"
    }
    assert len(called) == 2  # started twice
    assert (cluster.work / "modules").read_text() == "load cuda/12.4\n"


# -- doctor -----------------------------------------------------------------------------------------------


def test_doctor_tells_what_is_known_of_this_cluster(cluster, tmp_path):
    code, found = doctor("--run-dir", str(tmp_path / "run"))
    assert (code, found["fit"]) == (0, True), found
    slurm = details(found, "Slurm")
    assert slurm["KillWait"].startswith("5 s from SIGTERM to SIGKILL")
    assert slurm["requeue delay"].startswith("5 s")
    assert slurm["arrays"].startswith("up to 1001")
    assert slurm["accounting"].startswith("none")
    partitions = details(found, "partition")
    assert set(partitions) == {"main (default)", "low", "low0", "spot", "high"}
    assert "preempted jobs are requeued, after 20 s of grace" in partitions["low"]
    assert "without grace" in partitions["low0"]
    assert "preempted jobs are cancelled" in partitions["spot"]
    assert details(found, "nodes") == {
        "a100": "2 nodes, 4 GPUs (a100), 16 CPUs, 3.9 GiB; in main, low, low0, spot, high",
        "v100": "2 nodes, 2 GPUs (v100), 16 CPUs, 3.9 GiB; in main, low, low0, spot, high",
    }
    assert found["continuation"]["continuation"] == "requeue"
    where_jobs_are_cancelled = doctor("--run-dir", str(tmp_path / "run"), "--partition", "spot")[1]
    assert where_jobs_are_cancelled["continuation"]["continuation"] == "chain"
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_is_compared_with_what_there_is(cluster, tmp_path):
    wish = {"name": "big", "constraint": "a100", "nodes": 2, "gpus_per_node": 4, "mem_gb": 3.5}
    wrong = [
        {"constraint": "h100"}, {"gpus_per_node": 8}, {"time_limit_s": 7200}, {"nodes": 3}, {"mem_gb": 64},
        {"tasks_per_node": 4, "cpus_per_task": 5},
    ]  # fmt: skip
    for change in ({}, *wrong):
        given = json.dumps([{**wish, **change}])
        code, found = doctor(
            "--run-dir", str(tmp_path / "run"), "-o", "scheduler=slurm", "-o", f"node_types={given}"
        )
        bad = [each["what"] for each in found["findings"] if each["level"] == "bad"]
        assert (code, bad) == ((1, ["node type big"]) if change else (0, [])), (change, found)


def test_doctor_asks_a_compute_node(cluster):
    code, found = doctor("--probe", "--run-dir", str(cluster.work / "probed/run"), "--partition", "low")
    assert code == 0, found
    told = details(found, "compute node")
    assert told["job"].startswith("ran on ")
    assert told["scontrol"] == told["sbatch"] == told["scontrol for ranks"] == "works on compute nodes"
    assert told["Python"].startswith(f"{sys.executable}, ")
    assert {"writing", "clock", "free space", "memory", "ports", "GPUs"} <= set(told)
    assert "a compute node sees it" in details(found, "files")["run directory"]
    assert found["continuation"]["reasons"][0] == "scontrol works on compute nodes"
    assert (
        doctor("--probe", "--partition", "spot", "--run-dir", str(cluster.work / "run"))[1]["continuation"][
            "continuation"
        ]
        == "chain"
    )
    assert not list(cluster.work.glob(".hpc-resume-probe*"))


def test_doctor_finds_a_python_that_compute_nodes_have_not(cluster):
    given = ["-o", "environment.python=/usr/local/no/python"]
    code, found = doctor("--probe", "--run-dir", str(cluster.work / "run"), *given)
    assert code == 1
    assert "does not start on a compute node" in details(found, "compute node")["Python"]


def test_the_site_file_is_one_that_a_run_can_be_submitted_with(cluster, monkeypatch):
    path = cluster.work / "site.yaml"
    code, _ = doctor("--write", str(path), "--partition", "low")
    assert code == 0
    config = Config.load(path)
    assert [each.name for each in config.node_types] == ["a100", "v100"]
    assert [each.ranks for each in config.node_types] == [4, 2]
    assert {each.partition for each in config.node_types} == {"low"}
    assert (config.scheduler, config.time_limit_s) == ("slurm", 3600)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = hr.submit(few_steps, config=path, run_dir=cluster.work / "from-site")
    cluster.wait_for(lambda: job.state == "COMPLETED", 300, "the run is done")
    found = job.status()
    assert (found.state, found.step) == ("done", 12)
    assert [attempt.world_size for attempt in found.attempts] == [4]


def few_steps():
    train(12, every_steps=5)
