"""The ways in which the soak interrupts runs: each does one thing to one run, on the real cluster."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.slurm.cluster import PrivateCluster

#: A node daemon that is dead for so long counts as failed: more than the cluster's SlurmdTimeout.
_DEAD_S = 20.0
#: The disk stays full at most for so long.
_FULL_S = 8.0
_LONGEST_WAIT_S = 90.0


class Victim(Protocol):
    """A run that can be interrupted."""

    @property
    def run_dir(self) -> Path:
        """Its folder."""
        ...

    @property
    def job_id(self) -> str:
        """Its present job, as ``scancel`` takes it."""
        ...

    def resubmit(self) -> None:
        """Submit it again after a cancel."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Where the interruptions happen.

    Parameters
    ----------
    cluster
        The private cluster.
    disk
        The filesystem of the runs, if it is one of its own that may be filled up.
    rng
        Chooses ranks and nodes.
    """

    cluster: PrivateCluster
    disk: Path | None
    rng: random.Random


def warn(field: Field, victim: Victim) -> None:
    """The warning signal."""
    field.cluster.run("scancel", "--signal=USR2", victim.job_id, check=False)


def terminate(field: Field, victim: Victim) -> None:
    """A bare SIGTERM to every rank, as when a step is being ended."""
    field.cluster.run("scancel", "--signal=TERM", victim.job_id, check=False)


def preempt(field: Field, victim: Victim) -> None:
    """A more important job takes the node."""
    node = first_node(field, victim)
    other = field.cluster.sbatch(
        "#!/bin/bash\nsleep 1\n", "-p", "high", "-w", node, "--exclusive", "-t", "1", "-o", "/dev/null"
    )
    over = {"COMPLETED", "GONE", "FAILED", "CANCELLED"}
    field.cluster.wait_for(lambda: field.cluster.state(other) in over, _LONGEST_WAIT_S, "it was preempted")


def requeue(field: Field, victim: Victim) -> None:
    """An administrator requeues the job."""
    field.cluster.run("scontrol", "requeue", victim.job_id, check=False)


def cancel(field: Field, victim: Victim) -> None:
    """A person cancels the job, and submits it again."""
    job_id = victim.job_id
    field.cluster.run("scancel", job_id, check=False)
    over = {"CANCELLED", "GONE", "COMPLETED", "FAILED", "TIMEOUT"}
    field.cluster.wait_for(lambda: field.cluster.state(job_id) in over, _LONGEST_WAIT_S, "it was cancelled")
    victim.resubmit()


def kill_node(field: Field, victim: Victim) -> None:
    """The power of a node fails, and comes back later."""
    node = first_node(field, victim)
    field.cluster.kill_node(node)
    time.sleep(_DEAD_S)
    field.cluster.restore_node(node)


def kill_rank(field: Field, victim: Victim) -> None:
    """``kill -9`` of one rank."""
    ranks = processes_of(victim.job_id)
    if ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(field.rng.choice(ranks), signal.SIGKILL)


def fill_disk(field: Field, victim: Victim) -> None:
    """The disk is full for a while: for all runs."""
    assert field.disk is not None
    filler = field.disk / "filler"
    deadline = time.monotonic() + _FULL_S
    try:
        with filler.open("ab", buffering=0) as file:
            while time.monotonic() < deadline:
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    time.sleep(0.02)  # whatever is freed meanwhile is taken, too
    finally:
        filler.unlink(missing_ok=True)


KINDS: dict[str, Callable[[Field, Victim], None]] = {
    "warning signal": warn,
    "SIGTERM": terminate,
    "preemption": preempt,
    "requeue": requeue,
    "cancel and resubmit": cancel,
    "node failure": kill_node,
    "kill -9 of a rank": kill_rank,
    "full disk": fill_disk,
}
#: How often each is drawn; a dead node takes half a minute.
WEIGHTS = {"node failure": 1, "full disk": 1, "preemption": 2, "cancel and resubmit": 2}


def draw(field: Field) -> str:
    """Choose a kind."""
    names = [name for name in KINDS if name != "full disk" or field.disk is not None]
    return field.rng.choices(names, [WEIGHTS.get(name, 3) for name in names])[0]


def first_node(field: Field, victim: Victim) -> str:
    """Name the first node of a running job."""
    listed = field.cluster.job(victim.job_id)["NodeList"]
    return field.cluster.run("scontrol", "show", "hostnames", listed).split()[0]


def processes_of(job_id: str) -> list[int]:
    """Find the ranks' processes of a job on this machine."""
    array, _, element = job_id.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={element}"}
    if not element:
        wanted = {f"SLURM_JOB_ID={array}"}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if wanted <= set(environ) and b"submitit.core._submit" in words and b"srun" not in words[0]:
                found.append(int(folder.name))
    return found
