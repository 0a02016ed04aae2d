"""Whether a node is fit for a run: a quick look before the ranks start."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import DISK, Clock, Filesystem, JsonObject
from hpc_resume.provenance.filesystem import check_space, check_writing, existing
from hpc_resume.provenance.finding import Finding, patiently
from hpc_resume.run.addresses import own_addresses
from hpc_resume.run.gpus import check_gpus
from hpc_resume.rundir import RunDirectory

#: Of one look; the batch script waits no longer than two minutes for them all.
_PATIENCE_S = 45.0
_CONNECT_S = 5.0
#: Whatever the state's size, a run writes journals and logs.
_LEAST_SPACE_BYTES = 1 << 30
#: DataLoader's worker processes hand their batches over in /dev/shm.
_LEAST_SHM_BYTES = 1 << 30
#: Of the memory that the job was given. The page cache counts as free; what is missing is another job's.
_LEAST_MEMORY = 0.5
#: Of all memory, where the scheduler does not say what the job was given.
_LEAST_OF_ALL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeHealth:
    """What was found on a node.

    Parameters
    ----------
    node
        Its name, as the scheduler spells it.
    findings
        In the order of the looks.
    """

    node: str
    findings: tuple[Finding, ...]

    @property
    def fit(self) -> bool:
        """Whether nothing is bad."""
        return all(each.level != "bad" for each in self.findings)

    @property
    def verdict(self) -> str:
        """One line, which the batch script reads."""
        if self.fit:
            return f"hpc_resume: node {self.node} is fit"
        why = "; ".join(f"{each.what}: {each.detail}" for each in self.findings if each.level == "bad")
        return f"hpc_resume: node {self.node} is unfit: {' '.join(why.split())}"

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {**dataclasses.asdict(self), "fit": self.fit}


def check_node(
    run_dir: Path, environ: Mapping[str, str], *, fs: Filesystem = DISK, clock: Clock = time.time
) -> NodeHealth:
    """Look at this node.

    Parameters
    ----------
    run_dir
        The run's folder; it need not be there yet.
    environ
        Variables of a process of the job; without a job the whole machine is looked at.
    fs
        The calls that reach the disk.
    clock
        Unix time in seconds.
    """
    folder = existing(run_dir)
    findings = [
        *patiently(
            "run directory",
            lambda: [
                *check_writing(folder, fs=fs, clock=clock),
                *check_space(folder, need_bytes=space_needed(run_dir)),
            ],
            patience_s=_PATIENCE_S,
            hint="its filesystem hangs",
        ),
        *check_machine(environ),
    ]
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    return NodeHealth(node=node, findings=tuple(findings))


def check_machine(environ: Mapping[str, str]) -> list[Finding]:
    """Look at a machine's memory, network and GPUs; see :func:`check_node`."""
    looks: tuple[tuple[str, Callable[[], list[Finding]], str], ...] = (
        ("memory", lambda: check_memory(environ), "the kernel hangs"),
        ("ports", check_ports, "the network, or the look-up of names, hangs"),
        ("GPUs", lambda: check_gpus(environ), "a GPU hangs, or importing torch takes too long"),
    )
    return [
        finding
        for what, look, hint in looks
        for finding in patiently(what, look, patience_s=_PATIENCE_S, hint=hint)
    ]


def space_needed(run_dir: Path) -> int:
    """Tell how many bytes the next checkpoint takes at most, by the newest one."""
    run = RunDirectory(run_dir)
    names = run.checkpoint_names()
    if not names:
        return _LEAST_SPACE_BYTES
    with os.scandir(run.checkpoints / names[-1]) as entries:
        return max(_LEAST_SPACE_BYTES, sum(entry.stat().st_size for entry in entries))


def check_ports(
    addresses: Callable[[], Sequence[str]] = lambda: own_addresses(one_node=False),
) -> list[Finding]:
    """Listen as rank 0 does, and connect as the others do."""
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))  # noqa: S104 - as the rendezvous does: other nodes must reach it
        server.listen()
        port = server.getsockname()[1]
        problems = []
        for host in addresses():
            try:
                with socket.create_connection((host, port), timeout=_CONNECT_S):
                    alone = host.startswith("127.")
                    where = "this node alone: its name leads to itself only" if alone else host
                    return [
                        Finding(what="ports", level="note" if alone else "ok", detail=f"reachable as {where}")
                    ]
            except OSError as error:
                problems.append(f"{host}: {error.strerror or error}")
    return [
        Finding(what="ports", level="bad", detail=f"other nodes can't reach this one ({'; '.join(problems)})")
    ]


def check_memory(
    environ: Mapping[str, str],
    *,
    meminfo: str | None = None,
    shm: Path = Path("/dev/shm"),  # noqa: S108
) -> list[Finding]:
    """Compare the memory that is free with what the job was given.

    Parameters
    ----------
    environ
        Has ``SLURM_MEM_PER_NODE``, in MiB, if the job asked for memory by the node.
    meminfo
        Text of ``/proc/meminfo``; without it the kernel is asked.
    shm
        Where processes share memory.
    """
    text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
    sizes = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in text.splitlines())
    }
    free_bytes, total_bytes = sizes["MemAvailable"], sizes["MemTotal"]
    given = environ.get("SLURM_MEM_PER_NODE", "")
    least_bytes = _LEAST_MEMORY * (int(given) << 20) if given.isdecimal() else _LEAST_OF_ALL * total_bytes
    found = [
        Finding(
            what="memory",
            level="ok" if free_bytes >= least_bytes else "bad",
            detail=f"{free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB are free"
            + (f"; the job was given {(int(given) << 20) / 1e9:.1f}" if given.isdecimal() else ""),
        )
    ]
    try:
        facts = os.statvfs(shm)
    except OSError:
        return found
    shared_bytes = facts.f_bavail * facts.f_frsize
    if shared_bytes < _LEAST_SHM_BYTES:
        detail = f"{shared_bytes / 1e6:.0f} MB are free in {shm}: DataLoader's workers may die of SIGBUS"
        found.append(Finding(what="shared memory", level="note", detail=detail))
    return found
