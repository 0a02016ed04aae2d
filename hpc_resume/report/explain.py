"""What became of a run, in words: each attempt, what ended it, what was decided and why, and what comes next."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_resume.files import Clock, JsonObject
from hpc_resume.report.status import AttemptStatus, RunStatus, status
from hpc_resume.report.tables import duration_text
from hpc_resume.rundir import checkpoint_step
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, JobFacts
from hpc_resume.scheduler.slurm import SlurmScheduler
from hpc_resume.untrusted import printable

_CAUSES = {
    "time_limit": "its time limit",
    "preemption": "a preemption, for another job",
    "requeue": "a requeue, by the scheduler or an administrator",
    "cancel": "a person, who cancelled it",
    "node_failure": "a node that failed",
    "bad_node": "itself, at once: it was started on a node that had failed before",
    "crash": "a rank that crashed",
    "out_of_memory": "a lack of memory",
    "hang": "a hang: ranks lived, but no step ended",
    "signal": "a signal of which the scheduler knows nothing",
    "done": "itself: all steps are done",
    "no_progress": "itself, at once: the attempts before it made no progress",
    "refused": "itself: it refused to go on as things stand",
    "declined": "itself, at once: these nodes do not fit it",
    "unknown": "something unknown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A heading, and lines below it."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A run's story; shows itself as text, and in a notebook as HTML.

    Parameters
    ----------
    status
        What it was told from.
    attempts
        The story of each.
    outlook
        What comes next, and what a person has to do for it.
    """

    status: RunStatus
    attempts: tuple[Told, ...]
    outlook: Told

    @property
    def parts(self) -> tuple[Told, ...]:
        """The attempts and the outlook, with nothing in them that steers a terminal."""
        return tuple(
            Told(title=_line(each.title), lines=tuple(map(_line, each.lines)))
            for each in (*self.attempts, self.outlook)
        )

    def to_json(self) -> JsonObject:
        """JSON form."""
        records = [
            {**asdict(attempt), "told": list(told.lines)}
            for attempt, told in zip(self.status.attempts, self.attempts, strict=True)
        ]
        return {
            "run_id": self.status.run_id,
            "name": self.status.name,
            "state": self.status.state,
            "step": self.status.step,
            "attempts": records,
            "next": list(self.outlook.lines),
        }

    def __repr__(self) -> str:
        return "\n".join(
            line for each in self.parts for line in (each.title, *(f"    {line}" for line in each.lines))
        )

    def _repr_html_(self) -> str:
        return "".join(
            f"<p><b>{html.escape(each.title)}</b><br>{'<br>'.join(map(html.escape, each.lines))}</p>"
            for each in self.parts
        )


def explain(
    root: Path,
    *,
    clock: Clock = time.time,
    look_up: Callable[[str], JobFacts] = lambda job_id: SlurmScheduler(job_id).facts(),
) -> Explanation:
    """Tell what became of a run.

    Parameters
    ----------
    root
        The run directory.
    clock
        Unix time in seconds.
    look_up
        Asks Slurm about a job, where the next attempt is one of Slurm's.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    IntegrityError
        If its identity is damaged.
    """
    found = status(root, clock=clock)
    now_s = clock()
    return Explanation(
        status=found,
        attempts=tuple(
            Told(title=_title(each, now_s), lines=tuple(_attempt(each))) for each in found.attempts
        ),
        outlook=Told(title=f"{found.name} is {_STATES[found.state]}", lines=tuple(_outlook(found, look_up))),
    )


_STATES = {
    "done": "done",
    "running": "running",
    "waiting": "waiting for its next attempt",
    "interrupted": "interrupted",
    "cancelled": "cancelled",
    "failed": "stopped",
}


def _title(each: AttemptStatus, now_s: float) -> str:
    if each.started is None:
        return f"attempt {each.attempt}"
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.started))
    took = duration_text((each.ended or now_s) - each.started)
    return f"attempt {each.attempt}: began {began}, {'took' if each.ended else 'runs for'} {took}"


def _attempt(each: AttemptStatus) -> Iterator[str]:
    yield _where(each)
    if each.first_step is None:
        yield "before its first step"
    elif each.last_step is None:
        yield f"from step {each.first_step}"
    else:
        again = f", of which the next attempt did {each.steps_lost} again" if each.steps_lost else ""
        yield f"from step {each.first_step} to step {each.last_step}{again}"
    for told in each.drift:
        yield f"not as when its checkpoint was saved: {told}"
    yield from each.remarks
    if each.cause is None:
        return
    yield f"ended by {_CAUSES.get(each.cause, each.cause)}"
    if each.evidence and each.cause != "done":
        yield f"as told by: {each.evidence}"
    if each.diagnosed_by is not None:
        yield f"found out by attempt {each.diagnosed_by}"
    if each.decision != "done":
        yield _decided(each)


def _where(each: AttemptStatus) -> str:
    ranks = "" if each.world_size is None else f"{each.world_size} rank{'' if each.world_size == 1 else 's'}"
    place = (", ".join(each.nodes) or "this machine") + (f" ({each.node_type})" if each.node_type else "")
    job = ""
    if each.job_id is not None:
        job = f", job {each.job_id}"
        if each.restart_count:
            job += f", restart {each.restart_count}"
    return f"{ranks or 'ranks'} on {place}{job}"


def _decided(each: AttemptStatus) -> str:
    if each.decision is None:
        return "decided nothing: it had no time for a last word; what was saved by then is what the next one goes on from"
    what = "to go on" if each.decision == "continue" else "to stop"
    how = [
        f"after {duration_text(each.delay_s)}" if each.delay_s else "",
        f"without {', '.join(each.exclude)}" if each.exclude else "",
        "on the next node type" if each.move_on else "",
    ]
    words = " ".join([what, *filter(None, how)])
    return f"decided {words}" + (f": {each.because}" if each.because else "")


def _outlook(found: RunStatus, look_up: Callable[[str], JobFacts]) -> Iterator[str]:
    saved = (
        f"it goes on from step {checkpoint_step(found.newest)} ({found.newest})"
        if found.newest
        else "no checkpoint is there to go on from, so it begins anew"
    )
    last = found.attempts[-1] if found.attempts else None
    if found.state == "done":
        yield "nothing is left to do"
    elif found.state == "running":
        yield found.why
    elif found.state == "waiting" and last is not None and last.kind == "slurm" and last.job_id is not None:
        yield from _pending(last.job_id, look_up(last.job_id), saved)
    elif found.state == "waiting":
        yield f"{found.why}; it begins by itself, and {saved}"
    elif found.state == "cancelled":
        yield f"a person ended it for good; to have it go on, submit it again: {saved}"
    elif found.state == "interrupted":
        yield f"{found.why}; nobody continues it by itself: start or submit it again, and {saved}"
    else:
        yield found.why
        yield f"when it is mended, submit it again: {saved}"
    yield from found.branching


def _pending(job_id: str, facts: JobFacts, saved: str) -> Iterator[str]:
    if facts.state == "PENDING":
        yield f"job {job_id} is in the queue ({facts.reason or 'no reason given'}); it begins by itself, and {saved}"
    elif facts.state in ALIVE or facts.state == "COMPLETING":
        yield f"job {job_id} is {facts.state}; {saved}"
    elif facts.state == UNKNOWN:
        yield f"job {job_id}: nothing is known of it here ({facts.evidence})"
        yield f"if squeue does not show it, submit it again: {saved}"
    else:
        yield f"job {job_id} is {facts.state}, so nothing continues it: submit it again, and {saved}"


def _line(text: str) -> str:
    return printable(" | ".join(filter(None, map(str.strip, text.splitlines())))).replace("\t", "\\t")
