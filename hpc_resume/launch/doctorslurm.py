"""What Slurm's settings mean for runs on a site."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpc_resume.config import Config
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.site import NodeKind, Partition, Site
from hpc_resume.settings import NodeType

#: A checkpoint of a large model takes longer than that to become durable.
_SHORT_S = 30.0
#: Source: slurm.conf(5), MaxBatchRequeue.
_USUAL_REQUEUES = 5


def slurm_findings(site: Site) -> Iterator[Finding]:
    """Tell what the site's settings mean."""
    yield _finding("version", f"Slurm {site.version}, cluster {site.name}")
    kill_wait_s = site.number("KillWait") or 0
    short = "; less than a save may take, so the warning signal must come early enough"
    yield _finding(
        "KillWait", f"{kill_wait_s} s from SIGTERM to SIGKILL{short if kill_wait_s < _SHORT_S else ''}"
    )
    yield _finding("requeue delay", f"{site.requeue_delay_s:g} s at least (AuthInfo cred_expire)")
    if site.most_requeues is None:
        yield _finding(
            "requeues", f"not said; {_USUAL_REQUEUES} by default (MaxBatchRequeue), after which a job is held"
        )
    else:
        yield _finding("requeues", f"{site.most_requeues} (MaxBatchRequeue), after which a job is held")
    if site.number("JobRequeue") == 0:
        yield _finding(
            "JobRequeue", "0: only jobs with --requeue are; slurm.requeue is true by default", note=True
        )
    else:
        yield _finding("JobRequeue", "jobs are requeued after a node failure")
    yield _preemption(site)
    yield _finding("dead nodes", f"noticed after {site.number('SlurmdTimeout') or 0} s (SlurmdTimeout)")
    yield _finding("arrays", f"up to {site.number('MaxArraySize') or 0} elements (MaxArraySize)")
    age_s = site.number("MinJobAge") or 0
    yield _finding(
        "finished jobs", f"are forgotten after {age_s} s (MinJobAge); a dependency must be made before"
    )
    yield _finding("bad exits", "one failed rank ends its step: our srun says so, whatever KillOnBadExit is")
    if site.requeue_codes:
        yield _finding("RequeueExit", f"Slurm requeues on exit code {', '.join(site.requeue_codes)}")
    if site.accounting:
        yield _finding("accounting", "there is an accounting service (sacct); it is not needed")
    else:
        yield _finding("accounting", "none, so sacct tells nothing; it is not needed")


def partition_findings(site: Site) -> Iterator[Finding]:
    """Tell what a job must expect in each partition."""
    for each in site.partitions:
        limit = "no time limit" if each.max_time_s is None else f"at most {_clock(each.max_time_s)}"
        if each.default_time_s is not None and each.default_time_s != each.max_time_s:
            limit += f", {_clock(each.default_time_s)} if time_limit_s is not set"
        words = [f"{each.nodes} nodes", limit, _preempted(each)]
        if each.submit_hosts is not None:
            words.append(f"jobs come from {each.submit_hosts} only")
        words += [] if each.up else ["not up"]
        name = f"{each.name}{' (default)' if each.default else ''}"
        risky = "CANCEL" in each.preempt_mode or not each.up or each.submit_hosts is not None
        yield _finding(name, "; ".join(words), note=risky)


def node_findings(site: Site) -> Iterator[Finding]:
    """Tell which node types there are."""
    for kind in site.node_kinds:
        words = [f"{len(kind.names)} nodes" if len(kind.names) > 1 else "1 node"]
        words.append(f"{kind.gpus} GPUs{f' ({kind.gpu})' if kind.gpu else ''}" if kind.gpus else "no GPU")
        words += [f"{kind.cpus} CPUs", f"{kind.memory_mb / 1024:.1f} GiB"]
        yield _finding(
            kind_name(kind), f"{', '.join(words)}; in {', '.join(kind.partitions) or 'no partition'}"
        )


def kind_name(kind: NodeKind) -> str:
    """Call a node type by its features, else by its GPUs."""
    return "+".join(kind.features) or kind.gpu or "node"


def wish_findings(site: Site, config: Config) -> Iterator[Finding]:
    """Compare the configured node types with what there is."""
    known = {each.name: each for each in site.partitions}
    for node_type in config.node_types:
        what = f"node type {node_type.name}"
        partition = known.get(node_type.partition) if node_type.partition else site.partition()
        if partition is None:
            yield _bad(what, f"there is no partition {node_type.partition}; there are: {', '.join(known)}")
            continue
        limit_s = node_type.time_limit_s or config.time_limit_s
        if limit_s is not None and partition.max_time_s is not None and limit_s > partition.max_time_s:
            yield _bad(
                what,
                f"time limit {_clock(limit_s)}, but {partition.name} allows {_clock(partition.max_time_s)}: "
                "the job would wait for ever",
            )
        there = sum(len(kind.names) for kind in site.node_kinds if _fits(node_type, kind, partition.name))
        if there < node_type.nodes:
            yield _bad(
                what, f"asks for {node_type.nodes} nodes, but {there} of {partition.name} are like that"
            )
        else:
            yield _finding(
                what, f"{there} nodes of {partition.name} are like that, {node_type.nodes} are asked for"
            )


def _fits(wish: NodeType, kind: NodeKind, partition: str) -> bool:
    if partition not in kind.partitions or wish.tasks_per_node * (wish.cpus_per_task or 1) > kind.cpus:
        return False
    if (wish.gpus_per_node or 0) > kind.gpus or (wish.mem_gb or 0) * 1024 > kind.memory_mb:
        return False
    # Of Slurm's expressions only the simplest is read here; any other is believed.
    plain = wish.constraint is None or re.fullmatch(r"[\w.-]+", wish.constraint) is None
    return plain or wish.constraint in kind.features


def _preemption(site: Site) -> Finding:
    if site.setting("PreemptType") in {None, "preempt/none"}:
        return _finding("preemption", "nobody is preempted (PreemptType)")
    how = (
        "the warning signal"
        if site.warns_of_preemption
        else "SIGTERM, which hpc_resume takes as a warning, too"
    )
    return _finding("preemption", f"{site.setting('PreemptType')}; announced by {how}")


def _preempted(partition: Partition) -> str:
    if "OFF" in partition.preempt_mode:
        return "never preempted"
    what = {"REQUEUE": "requeued", "CANCEL": "cancelled", "SUSPEND": "suspended"}
    done = next(
        (word for mode, word in what.items() if mode in partition.preempt_mode), partition.preempt_mode
    )
    grace = (
        f"after {partition.grace_s:g} s of grace" if partition.grace_s else "without grace (KillWait alone)"
    )
    return f"preempted jobs are {done}, {grace}"


def _clock(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _finding(what: str, detail: str, *, note: bool = False) -> Finding:
    return Finding(what=what, level="note" if note else "ok", detail=detail)


def _bad(what: str, detail: str) -> Finding:
    return Finding(what=what, level="bad", detail=detail)
