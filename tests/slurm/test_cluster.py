"""The private cluster itself: it starts anywhere, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cluster as cluster_module
import pytest
from cluster import NODES, PrivateCluster


def processes_of(base):
    """Processes with the cluster in their environment, whatever they are called; zombies have none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={base}/".encode() in (folder / "environ").read_bytes():
                found.append((int(folder.name), (folder / "comm").read_text().strip()))
        except OSError:
            continue
    return found


def wait_until(predicate, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def second(cluster_of_session):
    """Another cluster beside the session's: ports and folders are its own."""
    other = PrivateCluster()
    yield other
    other.stop()


def test_nodes_partitions_and_gpus(cluster):
    assert sorted(cluster.run("sinfo", "-h", "-p", "main", "-N", "-o", "%N %f").split("\n")[:-1]) == [
        f"{name} {gpu}" for name, gpu in sorted(NODES.items())
    ]
    script = "#!/bin/bash\nsrun bash -c 'echo $SLURMD_NODENAME sees $CUDA_VISIBLE_DEVICES'"
    job = cluster.sbatch(script, "--constraint=v100", "--gpus-per-node=2")
    cluster.wait_state(job, "COMPLETED")
    assert re.fullmatch(r"small[12] sees 0,1\n", cluster.output(job))


def test_a_failing_command_says_what_slurm_said(cluster):
    with pytest.raises(AssertionError, match="invalid partition"):
        cluster.sbatch("#!/bin/bash\n", "--partition=none")
    assert cluster.job("4711") == {}
    with pytest.raises(AssertionError, match="not within 0 s: never"):
        cluster.wait_for(lambda: False, 0, "never")


def test_stop_leaves_nothing_behind(second):
    second.start()
    stubborn = "#!/bin/bash\ntrap '' TERM\nsrun bash -c 'trap \"\" TERM; setsid sleep 1000 & wait; wait' & wait; wait"
    job = second.sbatch(stubborn)
    wait_until(lambda: any(name == "sleep" for _, name in processes_of(second.base)))
    assert second.state(job) == "RUNNING"
    names = {name for _, name in processes_of(second.base)}
    assert {"slurmctld", "slurmd", "slurmstepd"} <= names
    begin = time.monotonic()
    second.stop()
    assert time.monotonic() - begin < 10
    assert processes_of(second.base) == []
    assert not second.base.exists()


def test_its_owners_death_stops_it():
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(Path(cluster_module.__file__).parent)!r})\n"
        "from cluster import PrivateCluster\n"
        "c = PrivateCluster(); c.start(); print(c.base, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # That this returns at all shows that no daemon holds the pipe.
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=180, check=False
    )
    assert done.returncode == -signal.SIGKILL
    base = Path(done.stdout.strip())
    wait_until(lambda: not base.exists() and not processes_of(base))


def test_command_line(tmp_path, monkeypatch):
    base = Path(f"/tmp/hpcr-slurm-test-{os.getpid()}")
    environ = {**os.environ, "HPC_RESUME_CLUSTER": str(base)}
    program = [sys.executable, cluster_module.__file__]

    def call(*words):
        return subprocess.run(
            [*program, *words], env=environ, capture_output=True, text=True, timeout=180, check=False
        )

    try:
        started = call("start")
        assert started.returncode == 0, started.stderr
        assert call("start").returncode == 1  # one is enough
        shown = subprocess.run(
            ["bash", "-c", f"{started.stdout}\nsleep 1.2; sinfo --noheader --format=%D --partition=main"],
            env=environ, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert shown.stdout == "4\n", shown.stderr
    finally:
        assert call("stop").returncode == 0
    assert processes_of(base) == []
    assert not base.exists()
    assert call("restart").returncode == 2


def test_a_dead_node_comes_back(second):
    second.start()
    job = second.sbatch("#!/bin/bash\nsrun sleep 1000", "--nodelist=big2")
    wait_until(lambda: any(name == "sleep" for _, name in processes_of(second.base)))
    others = {pid for pid, _ in processes_of(second.base)}
    second.kill_node("big2")
    gone = others - {pid for pid, _ in processes_of(second.base)}
    assert not any(name in {"sleep", "slurmstepd"} for _, name in processes_of(second.base))
    assert len([name for _, name in processes_of(second.base) if name == "slurmd"]) == len(NODES) - 1
    assert gone
    second.cancel(job)
    second.restore_node("big2")
    job = second.sbatch("#!/bin/bash\nsrun hostname", "--nodelist=big2")
    second.wait_state(job, "COMPLETED")
