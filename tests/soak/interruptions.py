"""The ways in which the soak interrupts runs: each does one thing to one run, on the real cluster."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpc_resume.errors import HpcResumeError
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
    one_node_at_a_time
        Held while a node is dead.
    """

    cluster: PrivateCluster
    disk: Path | None
    rng: random.Random
    one_node_at_a_time: threading.Lock = field(default_factory=threading.Lock)


def warn(place: Field, victim: Victim) -> None:
    """The warning signal."""
    send(place, victim, "USR2")


def terminate(place: Field, victim: Victim) -> None:
    """A bare SIGTERM to every rank, as when a step is being ended."""
    send(place, victim, "TERM")


def send(place: Field, victim: Victim, name: str) -> None:
    """Signal every rank of a run."""
    # For an element of an array that has others waiting, scancel signals it, says that it can't, and tries again.
    place.cluster.run("timeout", "2", "scancel", f"--signal={name}", victim.job_id, check=False)


def preempt(place: Field, victim: Victim) -> None:
    """A more important job takes the node."""
    node = first_node(place, victim)
    other = place.cluster.sbatch(
        "#!/bin/bash\nsleep 1\n", "-p", "high", "-w", node, "--exclusive", "-t", "1", "-o", "/dev/null"
    )
    over = {"COMPLETED", "GONE", "FAILED", "CANCELLED"}
    place.cluster.wait_for(lambda: place.cluster.state(other) in over, _LONGEST_WAIT_S, "it was preempted")


def requeue(place: Field, victim: Victim) -> None:
    """An administrator requeues the job."""
    place.cluster.run("scontrol", "requeue", victim.job_id, check=False)


def cancel(place: Field, victim: Victim) -> None:
    """A person cancels the job, and submits it again."""
    job_id = victim.job_id
    place.cluster.run("scancel", job_id, check=False)
    over = {"CANCELLED", "GONE", "COMPLETED", "FAILED", "TIMEOUT"}
    place.cluster.wait_for(lambda: place.cluster.state(job_id) in over, _LONGEST_WAIT_S, "it was cancelled")
    place.cluster.wait_for(lambda: resubmitted(victim), _LONGEST_WAIT_S, "it was submitted again")


def resubmitted(victim: Victim) -> bool:
    """Try to submit a run again; the disk may be full just now, or another run of its array still be ending."""
    try:
        victim.resubmit()
    except (OSError, HpcResumeError):
        return False
    return True


def kill_node(place: Field, victim: Victim) -> None:
    """The power of a node fails, and comes back later."""
    with place.one_node_at_a_time:
        node = first_node(place, victim)
        place.cluster.kill_node(node)
        time.sleep(_DEAD_S)
        place.cluster.restore_node(node)


def kill_rank(place: Field, victim: Victim) -> None:
    """``kill -9`` of one rank."""
    ranks = processes_of(victim.job_id)
    if ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(place.rng.choice(ranks), signal.SIGKILL)


def fill_disk(place: Field, victim: Victim) -> None:
    """The disk is full for a while: for all runs."""
    assert place.disk is not None
    filler = place.disk / "filler"
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


def draw(place: Field) -> str:
    """Choose a kind."""
    names = [name for name in KINDS if name != "full disk" or place.disk is not None]
    return place.rng.choices(names, [WEIGHTS.get(name, 3) for name in names])[0]


def first_node(place: Field, victim: Victim) -> str:
    """Name the first node of a running job."""
    listed = place.cluster.job(victim.job_id)["NodeList"]
    return place.cluster.run("scontrol", "show", "hostnames", listed).split()[0]


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
