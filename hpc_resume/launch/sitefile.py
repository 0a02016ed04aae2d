"""A site's settings as a YAML file, commented, for ``configs/``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_resume._version import __version__
from hpc_resume.errors import UsageError
from hpc_resume.files import DISK, Filesystem
from hpc_resume.launch.doctorslurm import kind_name
from hpc_resume.policy.recommendation import Recommendation
from hpc_resume.scheduler.site import NodeKind, Partition, Site

#: Short jobs start sooner, and the run carries on by itself.
_LIMIT_S = 86400.0
_LEAD_S = 300.0
#: Of a node's memory: what Slurm counts as the node's includes what its system needs.
_MEMORY = 0.9


def write_site_file(
    path: Path, site: Site, advice: Recommendation, partition: str | None, *, fs: Filesystem = DISK
) -> None:
    """Write the file; see :func:`site_file`.

    Raises
    ------
    UsageError
        If there is one already, or it can't be written.
    """
    text = site_file(site, advice, partition)
    if path.exists():
        raise UsageError(f"{path}: is there already; give another name, or move it away")
    try:
        fs.write_file(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror})") from error


def site_file(site: Site, advice: Recommendation, partition: str | None = None) -> str:
    """Write a site's settings: the node types of one partition, what its limits ask for, and why.

    Parameters
    ----------
    site
        As Slurm describes it.
    advice
        How runs are continued best.
    partition
        Whose node types; by default the default one's.

    Raises
    ------
    SchedulerError
        If there is no such partition.
    """
    chosen = site.partition(partition)
    limit_s = min(chosen.max_time_s or _LIMIT_S, _LIMIT_S)
    lead_s = min(_LEAD_S, limit_s / 4)
    kinds = sorted(
        (kind for kind in site.node_kinds if chosen.name in kind.partitions),
        key=lambda kind: (-kind.gpus, -len(kind.names)),
    )
    lines = [
        f"# {site.name}, partition {chosen.name}, as Slurm {site.version} describes it.",
        f"# Written by hpc_resume {__version__}: hpc-resume doctor --write FILE. Look it over, and change what you know better.",
        "",
        "run_dir: runs/{name}             # on the parallel filesystem, where all nodes see it; not in $HOME",
        "scheduler: slurm",
        f"time_limit_s: {limit_s:g}            # {_most(chosen)}",
        f"warning_lead_s: {lead_s:g}             # a save must fit in, and Slurm looks every 30 s",
        "",
        *(f"# {reason}" for reason in advice.reasons),
        f"continuation: {advice.continuation}",
        "",
        "# In the order of preference; wait_limit_s has a job ask for the next one. One rank for each GPU.",
        "node_types:",
        *_node_types(chosen, kinds, several=advice.continuation != "array"),
        "",
        "slurm:",
        "  account: null                  # --account, if your site wants one",
        f"  requeue: {'false' if 'CANCEL' in chosen.preempt_mode else 'true'}",
        "  check_nodes: false             # true: look at each node before the ranks start, and leave unfit ones",
        "",
        "environment:",
        "  modules: []                    # such as [cuda/12.4]",
        "  activate: null                 # a venv's folder, or a conda environment's name",
        "",
        "site:",
        "  purge_after_days: null         # your site's documentation says whether it deletes files",
    ]
    return "\n".join(lines) + "\n"


def _most(partition: Partition) -> str:
    if partition.max_time_s is None:
        return "no limit here; short jobs start sooner"
    return f"{partition.max_time_s:g} s at most here; short jobs start sooner"


def _node_types(partition: Partition, kinds: Sequence[NodeKind], *, several: bool) -> Iterator[str]:
    if not kinds:
        yield "  - name: default"
    names: list[str] = []
    for kind in kinds:
        name = re.sub(r"[^A-Za-z0-9._+-]", "-", kind_name(kind)) or "node"
        names.append(f"{name}-{names.count(name) + 1}" if name in names else name)
        active = several or len(names) == 1  # the elements of an array are alike
        for line in _node_type(names[-1], kind, partition, kinds):
            yield line if active else f"  # {line[2:]}"


def _node_type(name: str, kind: NodeKind, partition: Partition, others: Sequence[NodeKind]) -> Iterator[str]:
    tasks = max(kind.gpus, 1)
    yield f"  - name: {name:<23}# {len(kind.names)} of them: {_some(kind.names)}"
    yield f"    partition: {partition.name}"
    constraint = _constraint(kind, others)
    if constraint:
        yield f"    constraint: {constraint}"
    elif len(others) > 1:
        yield "    # No feature tells these from the other types of this partition; ask for them by slurm.gres."
    yield "    nodes: 1"
    yield f"    tasks_per_node: {tasks}"
    if kind.gpus:
        yield f"    gpus_per_node: {kind.gpus}"
    yield f"    cpus_per_task: {max(kind.cpus // tasks, 1)}"
    if kind.memory_mb > 1:  # 1 is what Slurm has where nobody said
        yield f"    mem_gb: {max(int(_MEMORY * kind.memory_mb / 1024 * 10) / 10, 0.1):g}"


def _constraint(kind: NodeKind, others: Sequence[NodeKind]) -> str | None:
    """Name features that no other type of the partition has."""
    rest = [other for other in others if other is not kind]
    if not rest:
        return None
    for feature in kind.features:
        if all(feature not in other.features for other in rest):
            return feature
    whole = "&".join(kind.features)
    return whole if whole and all(not set(kind.features) <= set(other.features) for other in rest) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
