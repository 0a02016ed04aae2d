"""What a crash costs in place and by a requeue: from ``kill -9`` of a rank to the next step, on the private cluster.

::

    python -m benchmarks.inplace [--repeats 5]

Both ways start the same processes on the same nodes; what differs is the wait for the allocation. The private
cluster requeues after 5 s (``cred_expire=5``), Slurm's default is 120 s, and then there is the queue.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/slurm"))

from cluster import PrivateCluster

from hpc_resume.config import Config
from hpc_resume.journal import read_events
from hpc_resume.launch.script import render

ROOT = Path(__file__).parents[1]
SCRIPT = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.run.training import train\ntrain(600, step_s=0.05, every_steps=5)\n"


def lost_s(cluster: PrivateCluster, name: str, restarts: int) -> float:
    """Kill one of two ranks on two nodes; seconds until the next attempt has restored."""
    root = cluster.work / name
    program = cluster.work / f"{name}.py"
    program.write_text(SCRIPT)
    config = Config(
        name=name,
        run_dir=str(root),
        time_limit_s=900,
        warning_lead_s=30,
        node_types=[{"nodes": 2, "cpus_per_task": 1, "mem_gb": 1, "constraint": "v100"}],
        budget={"restarts_in_place": restarts},
        environment={"variables": {"OMP_NUM_THREADS": "1"}},
    )
    job = cluster.sbatch(render(config, command=[sys.executable, str(program)], run_dir=root))

    def events(attempt: int, kind: str) -> list[float]:
        journal = root / f"attempts/{attempt:04d}/events.jsonl"
        return [event["t"] for event in read_events(journal) if event["event"] == kind]

    cluster.wait_for(lambda: events(1, "saved"), 120, "a checkpoint")
    began_s = time.time()
    os.kill(rank_of(job), signal.SIGKILL)
    cluster.wait_for(lambda: events(2, "restored"), 120, "the next attempt")
    cluster.cancel(job)
    cluster.wait_state(job, "CANCELLED", "GONE", timeout_s=60)
    return events(2, "restored")[0] - began_s


def rank_of(job: str) -> int:
    """Process id of rank 1 of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), b"SLURM_PROCID=1"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                wanted <= set((folder / "environ").read_bytes().split(b"\0"))
                and b"python" in (folder / "cmdline").read_bytes().split(b"\0")[0]
            ):
                return int(folder.name)
        except OSError:
            continue
    raise SystemExit(f"rank 1 of job {job} is not here")


def main() -> None:
    """Measure both ways in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    cluster = PrivateCluster()
    cluster.start()
    found: dict[str, list[float]] = {"in place": [], "requeue": []}
    try:
        for number in range(repeats):
            for way, restarts in (("in place", 2), ("requeue", 0)):
                found[way].append(lost_s(cluster, f"{way.replace(' ', '-')}-{number}", restarts))
    finally:
        cluster.stop()
    for way, seconds in found.items():
        listed = ", ".join(f"{each:.1f}" for each in seconds)
        print(f"{way}: median {statistics.median(seconds):.1f} s from kill -9 to restored ({listed})")


if __name__ == "__main__":
    main()
