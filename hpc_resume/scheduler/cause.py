"""Why is this job being stopped? Pure rules on a signal and the scheduler's facts.

Each rule was measured on Slurm 22.05 and is checked on a real cluster by ``tests/slurm``. Where the facts do
not say, the answer is the one after which a person's ``scancel`` stays a ``scancel``: ``scontrol requeue``
would bring a cancelled job back to life.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hpc_resume.scheduler.base import ALIVE, NONE, UNKNOWN, JobFacts

#: slurmctld looks at time limits and at ``--signal`` every 30 s; 5 s for clocks that differ.
#: Source: PERIODIC_TIMEOUT in slurmctld/controller.c; measured.
_TIMER_SLACK_S = 35.0

_WARNINGS = frozenset({"SIGUSR1", "SIGUSR2"})
#: Stands for a signal where there was none: our own clock says that the job is about to end.
DEADLINE = "DEADLINE"


class Cause(str, Enum):
    """Why an attempt ended, or is about to."""

    TIME_LIMIT = "time_limit"
    PREEMPTION = "preemption"
    #: Someone requeued the job.
    REQUEUE = "requeue"
    CANCEL = "cancel"
    NODE_FAILURE = "node_failure"
    #: It was started on a node that had failed the run before, and left at once.
    BAD_NODE = "bad_node"
    #: A rank raised an exception, or died.
    CRASH = "crash"
    OUT_OF_MEMORY = "out_of_memory"
    #: No step boundary came, or ranks did not answer, though nothing says that they died.
    HANG = "hang"
    #: A bare signal: from a person, or because another rank died.
    SIGNAL = "signal"
    DONE = "done"
    #: The run can't go on on these nodes, or on this number of ranks.
    DECLINED = "declined"
    #: The run, as it stands or as it was started, can't go on anywhere: a person has to decide.
    REFUSED = "refused"
    NO_PROGRESS = "no_progress"
    UNKNOWN = "unknown"


#: What a job that is already ending says about why.
_REASONS = {
    "TimeLimit": Cause.TIME_LIMIT,
    "NodeDown": Cause.NODE_FAILURE,
    "NodeFail": Cause.NODE_FAILURE,
    "OutOfMemory": Cause.OUT_OF_MEMORY,
    "NonZeroExitCode": Cause.CRASH,
    "RaisedSignal": Cause.CRASH,
}
_STATES = {
    "TIMEOUT": Cause.TIME_LIMIT,
    "PREEMPTED": Cause.PREEMPTION,
    "NODE_FAIL": Cause.NODE_FAILURE,
    "BOOT_FAIL": Cause.NODE_FAILURE,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "FAILED": Cause.CRASH,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The cause of a stop.

    Parameters
    ----------
    cause
        What it is.
    already_requeued
        The scheduler runs the job again by itself: save and leave, ask for nothing.
    evidence
        What it was concluded from, for the journal.
    nodes
        Those that failed, or on which a rank did.
    """

    cause: Cause
    already_requeued: bool = False
    evidence: str
    nodes: tuple[str, ...] = ()


#: What a scheduler says for certain; whatever else is seen then is a consequence of it.
CERTAIN = frozenset(
    {Cause.TIME_LIMIT, Cause.PREEMPTION, Cause.REQUEUE, Cause.CANCEL, Cause.NODE_FAILURE, Cause.OUT_OF_MEMORY}
)


def classify(
    signal_name: str, facts: JobFacts, *, own_restarts: int, now_s: float, warning_lead_s: float
) -> Verdict:
    """Tell the cause of a signal.

    Parameters
    ----------
    signal_name
        ``"SIGTERM"``, ``"SIGUSR2"`` …, or ``DEADLINE``.
    facts
        The job as the scheduler described it after the signal.
    own_restarts
        Restart count of this attempt; more of them in ``facts`` mean that the next one is on its way.
    now_s
        Unix time in seconds.
    warning_lead_s
        How long before the time limit the warning was asked for.
    """
    requeued = facts.restarts is not None and facts.restarts > own_restarts
    if signal_name == "SIGINT":
        cause, why = Cause.CANCEL, "interrupted from the keyboard"
    elif facts.state in {NONE, UNKNOWN}:
        cause, why = _blind_rule(facts, signal_name=signal_name)
    elif requeued:
        cause, why = _requeued_rule(facts)
    elif facts.state in ALIVE:
        cause, why = _alive_rule(facts, signal_name=signal_name, now_s=now_s, warning_lead_s=warning_lead_s)
    else:
        cause, why = _ending_rule(facts)
    return Verdict(
        cause=cause,
        already_requeued=requeued,
        evidence=f"{signal_name}; {facts.evidence}: {why}",
        nodes=facts.failed_nodes if cause is Cause.NODE_FAILURE else (),
    )


def cause_of_end(state: str, reason: str | None) -> Cause | None:
    """Tell the cause from what a scheduler says of a job that is being ended or over; ``None`` if it says none."""
    return _REASONS.get(reason or "") or _STATES.get(state)


def _blind_rule(facts: JobFacts, *, signal_name: str) -> tuple[Cause, str]:
    if signal_name == DEADLINE:
        return Cause.TIME_LIMIT, "the end of the job was known before"
    if facts.state == NONE:
        return Cause.SIGNAL, "sent by hand or by another launcher"
    if signal_name in _WARNINGS:
        return Cause.SIGNAL, "a warning, and no cancel sends one"
    return Cause.CANCEL, "cannot be told from a cancel, so it counts as one"


def _requeued_rule(facts: JobFacts) -> tuple[Cause, str]:
    if facts.preempt_time_s is not None:
        return Cause.PREEMPTION, "preempted, and requeued by Slurm"
    if _REASONS.get(facts.reason or "") is Cause.NODE_FAILURE:
        return Cause.NODE_FAILURE, "requeued by Slurm"
    return Cause.REQUEUE, "the job has been requeued"


def _alive_rule(
    facts: JobFacts, *, signal_name: str, now_s: float, warning_lead_s: float
) -> tuple[Cause, str]:
    if facts.preempt_time_s is not None:
        return Cause.PREEMPTION, "in the grace time of a preemption"
    left_s = None if facts.end_time_s is None else facts.end_time_s - now_s
    near = left_s is not None and left_s <= warning_lead_s + _TIMER_SLACK_S
    if signal_name == DEADLINE or (signal_name in _WARNINGS and near):
        when = "before the time limit" if left_s is None else f"{left_s:.0f} s before the time limit"
        return Cause.TIME_LIMIT, when
    return Cause.SIGNAL, "the job goes on: sent by hand, or a step is being ended"


def _ending_rule(facts: JobFacts) -> tuple[Cause, str]:
    if facts.preempt_time_s is not None:
        return Cause.PREEMPTION, "preempted, and not requeued by Slurm"
    cause = cause_of_end(facts.state, facts.reason)
    if cause is not None:
        return cause, "the job is being ended"
    return Cause.CANCEL, "the job is being ended, and nothing but a cancel explains it"
