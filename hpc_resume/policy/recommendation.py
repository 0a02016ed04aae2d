"""Which way to continue a run fits a site: pure rules on what can be done from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Continuation = Literal["requeue", "chain", "array", "exit", "login"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a site lets a job do; ``None`` where nobody has tried, which counts as a yes.

    Parameters
    ----------
    scontrol_on_nodes, sbatch_on_nodes
        Whether a batch script can call them.
    scontrol_for_ranks
        Whether a rank can, too; not in most containers.
    requeues_75
        Slurm requeues a job whose batch script leaves with 75 (``RequeueExit``).
    preempt_mode
        What a preemption does to a job of the partition: ``"REQUEUE"``, ``"CANCEL"``, ``"OFF"`` …
    longest_array
        Elements of an array at most.
    """

    scontrol_on_nodes: bool | None = None
    sbatch_on_nodes: bool | None = None
    scontrol_for_ranks: bool | None = None
    requeues_75: bool = False
    preempt_mode: str = "OFF"
    longest_array: int = 1001


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A way to continue, and the reasons for it in words."""

    continuation: Continuation
    reasons: tuple[str, ...]


def recommend(can: Abilities) -> Recommendation:
    """Choose the way that loses least and needs least.

    ``requeue`` keeps the job's id, its place in accounting and its node type, and needs no second job. Where a
    preemption cancels jobs, only a successor that is in the queue already survives it: ``chain``, or ``array``
    where a job may not submit one. ``login`` works everywhere and needs a person or a process there.
    """
    cancels = "CANCEL" in can.preempt_mode
    if can.scontrol_on_nodes is False:
        reasons = ["compute nodes have no scontrol"]
        if can.requeues_75 and not cancels:
            return _advise("exit", *reasons, "Slurm requeues a job that leaves with 75 (RequeueExit)")
        return _without_requeue(can, reasons)
    if cancels:
        return _without_requeue(can, ["a preemption cancels jobs here (PreemptMode=CANCEL), requeue or not"])
    if can.scontrol_for_ranks is False:
        reasons = ["ranks have no scontrol (a container?)", "the batch script has: it acts on exit code 75"]
        return _advise("exit", *reasons)
    if can.scontrol_on_nodes is None:
        return _advise("requeue", "nothing speaks against it; nobody has tried: hpc-resume doctor --probe")
    return _advise("requeue", "scontrol works on compute nodes", "the job keeps its id and its node type")


def _without_requeue(can: Abilities, reasons: list[str]) -> Recommendation:
    if can.sbatch_on_nodes is not False:
        tried = "" if can.sbatch_on_nodes else " (not tried: hpc-resume doctor --probe)"
        return _advise("chain", *reasons, f"a job can submit its successor before it works{tried}")
    reasons.append("jobs may not be submitted from compute nodes")
    if can.longest_array > 1:
        return _advise("array", *reasons, "an array's next element is in the queue already")
    return _advise("login", *reasons, "there are no job arrays; so it is resubmitted from the login node")


def _advise(continuation: Continuation, *reasons: str) -> Recommendation:
    return Recommendation(continuation=continuation, reasons=reasons)
