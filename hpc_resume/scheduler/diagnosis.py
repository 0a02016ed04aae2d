"""What ended an attempt that left no last word? Pure rules on what it left, and on what is known afterwards.

The first rule that has a fact to go by decides. Where none has, the cause stays ``unknown``.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpc_resume.errors import EXIT_CONTINUE, EXIT_DONE
from hpc_resume.scheduler.base import PastJob
from hpc_resume.scheduler.cause import CERTAIN, Cause, Verdict, cause_of_end


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What an attempt left behind.

    Parameters
    ----------
    stop
        Why it was being stopped when it ended, if it was.
    fault
        What a rank said went wrong.
    exit_codes
        By rank; or of all together, as ``srun`` gives it, under -1. Negative or above 128: a death by signal.
    ranks
        By node.
    job
        What the scheduler says now.
    oom_kills
        How many processes the kernel has killed for want of memory where rank 0 ran, since the attempt began;
        ``None`` if that can't be told.
    """

    stop: Verdict | None = None
    fault: Verdict | None = None
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    job: PastJob = field(default_factory=PastJob)
    oom_kills: int | None = None


def diagnose(remains: Remains) -> Verdict:
    """Tell what ended an attempt that did not say so itself."""
    stop, job = remains.stop, remains.job
    if stop is not None and stop.cause in CERTAIN:
        return Verdict(
            cause=stop.cause, evidence=f"{stop.evidence}; killed before its last word", nodes=stop.nodes
        )
    if job.failed_nodes:
        return Verdict(cause=Cause.NODE_FAILURE, evidence=job.evidence, nodes=job.failed_nodes)
    by_state = _by_state(job)
    if by_state is not None and by_state.cause is not Cause.CRASH:
        return by_state
    found = remains.fault or _by_exit_codes(remains) or by_state
    if found is not None:
        return found
    if job.requeued and not remains.exit_codes:
        return Verdict(
            cause=Cause.REQUEUE,
            evidence="the job was restarted, and its batch script did not live to leave an exit code",
        )
    if stop is not None:
        return Verdict(cause=stop.cause, evidence=f"{stop.evidence}; killed before its last word")
    known = [_codes(remains.exit_codes), _oom(remains.oom_kills)]
    return Verdict(
        cause=Cause.UNKNOWN,
        evidence="; ".join(["it left no last word, and nothing says what ended it", *filter(None, known)]),
    )


def _by_state(job: PastJob) -> Verdict | None:
    """Judge by the state in which the scheduler has the attempt."""
    if not job.state:
        return None
    cause = cause_of_end(job.state, job.reason)
    if cause is None:
        cause = {"CANCELLED": Cause.CANCEL, "REQUEUED": Cause.REQUEUE}.get(job.state)
    return None if cause is None else Verdict(cause=cause, evidence=job.evidence)


def _by_exit_codes(remains: Remains) -> Verdict | None:
    """Judge by codes other than those that ranks choose after a peer's death."""
    wrong = {
        rank: code for rank, code in remains.exit_codes.items() if code not in (EXIT_DONE, EXIT_CONTINUE)
    }
    if not wrong:
        return None
    signals = {rank: _signal(code) for rank, code in wrong.items()}
    killed = [rank for rank, number in signals.items() if number == signal.SIGKILL]
    oom = _oom(remains.oom_kills)
    first = killed[0] if killed else next(iter(wrong))
    words = _codes(wrong)
    if killed and remains.oom_kills:
        return Verdict(cause=Cause.OUT_OF_MEMORY, evidence=f"{words}; {oom}")
    return Verdict(
        cause=Cause.CRASH,
        evidence=f"{words}; {oom}" if killed and oom else words,
        nodes=_nodes(remains.ranks, first),
    )


def _nodes(ranks: Mapping[str, Sequence[int]], rank: int) -> tuple[str, ...]:
    """Where a rank ran; of all ranks together only if that was one node."""
    if rank < 0:
        return tuple(ranks) if len(ranks) == 1 else ()
    return tuple(node for node, those in ranks.items() if rank in those)


def _signal(code: int) -> int | None:
    """Give the number of the signal that a code tells of."""
    number = -code if code < 0 else code - 128
    return number if 0 < number <= 64 else None


def _codes(codes: Mapping[int, int]) -> str:
    return ", ".join(
        f"{'the ranks' if rank < 0 else f'rank {rank}'} {_left(code)}" for rank, code in codes.items()
    )


def _left(code: int) -> str:
    number = _signal(code)
    if number is None:
        return f"left with exit code {code}"
    try:
        return f"died of {signal.Signals(number).name}"
    except ValueError:
        return f"died of signal {number}"


def _oom(kills: int | None) -> str:
    if kills is None:
        return ""
    many = {0: "no process", 1: "1 process"}.get(kills, f"{kills} processes")
    return f"the kernel killed {many} for want of memory where rank 0 ran"
