"""How a run is: its attempts, why each ended, and what was lost. Read from the run directory alone."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.errors import IntegrityError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import read_events
from hpc_resume.lineage import read_lineage
from hpc_resume.report.metrics import last_row
from hpc_resume.report.remarks import REMARKS, remark
from hpc_resume.rollbacks import active_names, read_rollbacks, standing
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.scheduler.cause import Cause
from hpc_resume.scheduler.local import LocalState, process_ticks, state_path
from hpc_resume.untrusted import parse_json, read_regular

#: Without a scheduler's word, an attempt whose journal has been silent for longer counts as interrupted.
_SILENCE_S = 600.0
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("t", "started", "delay_s"), (int, float)),
    **dict.fromkeys(("step", "exit_code", "restart_count", "world_size"), int),
    **dict.fromkeys(("job_id", "node_type", "cause", "decision", "rendezvous", "kind", "event"), str),
    "nodes": list,
}
#: A longer attempt.json is none.
_LONGEST_RECORD_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStatus:
    """One attempt.

    Parameters
    ----------
    kind
        What started it; see :class:`~hpc_resume.scheduler.environment.JobEnvironment`.
    cause
        Why it ended, a value of :class:`~hpc_resume.scheduler.cause.Cause`; ``None`` while it runs.
    evidence
        What the cause was concluded from.
    decision
        ``"continue"``, ``"stop"``, ``"done"``, or ``None`` if it had no last word.
    because
        Why that was decided.
    delay_s, exclude, move_on
        How it was to go on; see :class:`~hpc_resume.policy.decision.Decision`.
    diagnosed_by
        The attempt that found the cause out afterwards; ``None`` if it is this one's own word.
    remarks
        What it found about states and checkpoints that a person should look at.
    drift
        What was not as when its checkpoint was taken, what is harmless aside.
    started, ended
        Unix seconds.
    first_step, last_step
        Completed steps at its start and at its end; ``None`` if it never got that far.
    steps_lost
        Steps that the next attempt did again; after the last one, those that a next one would.
    """

    attempt: int
    kind: str | None
    job_id: str | None
    restart_count: int | None
    world_size: int | None
    node_type: str | None
    nodes: tuple[str, ...]
    cause: str | None
    evidence: str
    decision: str | None
    started: float | None
    ended: float | None
    first_step: int | None
    last_step: int | None
    steps_lost: int
    exit_code: int | None
    because: str
    delay_s: float
    exclude: tuple[str, ...]
    move_on: bool
    diagnosed_by: int | None
    remarks: tuple[str, ...] = ()
    drift: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run.

    Parameters
    ----------
    state
        ``"done"``, ``"running"``, ``"waiting"`` (its next attempt will begin by itself), ``"interrupted"``
        (it will not), ``"cancelled"`` or ``"failed"``.
    step
        Completed steps.
    why
        What the state was concluded from.
    last_sign
        Unix time of the last entry of the journal.
    newest
        Name of the checkpoint that a resume would take: the newest that is whole and finite, else one that can't be
        read from here.
    branching
        Where it was forked from, and how it was rolled back, a line each.
    """

    run_id: str
    name: str
    state: str
    why: str
    step: int
    attempts: tuple[AttemptStatus, ...]
    steps_lost: int
    checkpoints: tuple[str, ...]
    newest: str | None
    last_sign: float | None
    branching: tuple[str, ...] = ()

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return dataclasses.asdict(self)


def status(root: Path, *, clock: Clock = time.time) -> RunStatus:
    """Read how a run is.

    Parameters
    ----------
    root
        The run directory.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    IntegrityError
        If its identity is damaged.
    """
    run = RunDirectory(root)
    identity = run.identity()
    traces = [_Trace(run, number) for number in run.attempt_numbers()]
    names = run.checkpoint_names()
    rollbacks, lineage, active = read_rollbacks(run), read_lineage(run), active_names(run)
    last = traces[-1].number if traces else 0
    back = [each for each in standing(rollbacks) if each.after == last]
    alive, state, why = _state(run, traces, clock())
    if back and state in {"done", "failed", "cancelled", "interrupted"}:
        state, why = "interrupted", f"{back[-1].sentence}; start or submit it again"
    diagnoses = {
        event["attempt"]: (trace.number, event)
        for trace in traces
        for event in trace.events
        if event.get("event") == "diagnosed" and isinstance(event.get("attempt"), int)
    }
    newest = _newest(run, active)
    # Where a next attempt would begin, if there is to be one and none has begun.
    would = None if alive or state == "done" else checkpoint_step(newest) if newest else 0
    attempts = []
    for place, trace in enumerate(traces):
        over = place < len(traces) - 1 or not alive
        next_first = _next_first_step(traces[place + 1 :], would)
        # What a person set aside is not lost; what had not been saved by then is.
        until = [each.newest_step for each in standing(rollbacks) if each.after == trace.number]
        next_first = max(until) if until else next_first
        attempts.append(trace.status(over=over, next_first=next_first, diagnosis=diagnoses.get(trace.number)))
    known = [trace.last_step for trace in traces if trace.last_step is not None]
    steps = ([] if back else known[-1:]) or [checkpoint_step(name) for name in active[-1:]] or [0]
    return RunStatus(
        run_id=identity["run_id"],
        name=str(identity.get("name", root.name)),
        state=state,
        why=why,
        step=steps[0],
        attempts=tuple(attempts),
        steps_lost=sum(attempt.steps_lost for attempt in attempts),
        checkpoints=tuple(names),
        newest=newest,
        last_sign=traces[-1].last_sign if traces else None,
        branching=(*([lineage.sentence] if lineage else []), *(each.sentence for each in rollbacks)),
    )


def _newest(run: RunDirectory, names: Sequence[str]) -> str | None:
    """Name the checkpoint that a resume would take; the newest that can't be read where no other serves."""
    unread = None
    for name in reversed(names):
        try:
            if read_manifest(run.checkpoints / name).resumable:
                return name
        except IntegrityError:
            unread = unread or name
    return unread


class _Trace:
    """What an attempt has left on disk."""

    def __init__(self, run: RunDirectory, number: int) -> None:
        self.number = number
        self.record = _typed(_json_object(run.attempt(number) / "attempt.json"))
        self.events = [_typed(event) for event in read_events(run.attempt(number) / "events.jsonl")]
        self.ended = _last(self.events, {"ended"})
        begun = _last(self.events, {"restored", "fresh"})
        self.first_step = None if begun is None else begun.get("step", 0)
        self.last_step = self._last_step(run.attempt(number))

    @property
    def last_sign(self) -> float | None:
        times = [event["t"] for event in self.events if isinstance(event.get("t"), (int, float))]
        return times[-1] if times else self.record.get("started")

    def _last_step(self, folder: Path) -> int | None:
        if self.ended is not None and isinstance(self.ended.get("step"), int):
            # One that ended before it restored anything counted from nowhere.
            return None if self.first_step is None else int(self.ended["step"])
        steps = [event["step"] for event in self.events if isinstance(event.get("step"), int)]
        metrics = [last_row(path).get("step") for path in folder.glob("metrics-rank-*.jsonl")]
        steps += [step + 1 for step in metrics if isinstance(step, int)]  # a metric's step counts from 0
        return max(steps, default=None)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes of all ranks, or as long as they have not met, of rank 0."""
        ranks = (_last(self.events, {"met"}) or {}).get("ranks")
        return tuple(
            str(node) for node in (ranks if isinstance(ranks, dict) else self.record.get("nodes", ()))
        )

    def status(
        self, *, over: bool, next_first: int | None, diagnosis: tuple[int, JsonObject] | None
    ) -> AttemptStatus:
        stop = _last(self.events, {"stop_requested"}) or {}
        ended = self.ended or {}
        by, found = diagnosis or (None, {})
        cause = (
            found.get("cause")
            or ended.get("cause")
            or (stop.get("cause") or Cause.UNKNOWN.value if over else None)
        )
        evidence = found.get("evidence") or ended.get("evidence") or ended.get("why") or stop.get("evidence")
        lost = 0 if next_first is None or self.last_step is None else max(0, self.last_step - next_first)
        record = self.record
        exclude = ended.get("exclude")
        return AttemptStatus(
            attempt=self.number,
            kind=record.get("kind"),
            job_id=record.get("job_id"),
            restart_count=record.get("restart_count"),
            world_size=record.get("world_size"),
            node_type=record.get("node_type"),
            nodes=self.nodes,
            cause=cause,
            evidence=str(evidence or ("left no last word" if over else "")),
            decision=ended.get("decision"),
            started=record.get("started"),
            ended=ended.get("t") or (self.last_sign if over else None),
            first_step=self.first_step,
            last_step=self.last_step,
            steps_lost=lost,
            exit_code=ended.get("exit_code"),
            because=str(ended.get("because") or ended.get("why") or ""),
            delay_s=ended.get("delay_s", 0.0),
            exclude=tuple(map(str, exclude if isinstance(exclude, list) else ())),
            move_on=ended.get("move_on") is True,
            diagnosed_by=by,
            remarks=tuple(remark(event) for event in self.events if event.get("event") in REMARKS),
            drift=self._drift(),
        )

    def _drift(self) -> tuple[str, ...]:
        told = _last(self.events, {"drift"}) or {}
        lists = (told.get("stop"), told.get("look"))
        return tuple(str(each) for found in lists if isinstance(found, list) for each in found)


def _state(run: RunDirectory, traces: Sequence[_Trace], now_s: float) -> tuple[bool, str, str]:
    """Whether the last attempt is alive, and the run's state with the reason for it."""
    last = traces[-1] if traces else None
    ended = (last.ended if last else None) or {}
    if ended.get("decision") == "done":
        return False, "done", str(ended.get("why") or "all steps are done")
    if ended.get("decision") == "stop":
        state = "cancelled" if ended.get("cause") == Cause.CANCEL.value else "failed"
        return False, state, str(ended.get("why", ""))
    job = _local_job(run, last)
    if job is not None:
        count = None if last is None or ended else last.record.get("restart_count", job.restarts)
        return _state_by_job(job, restart_count=count)
    if last is None:
        return False, "waiting", "no attempt has begun"
    if ended:
        scheduled = last.record.get("kind") == "slurm"
        why = str(ended.get("why", ""))
        return (
            False,
            "waiting" if scheduled else "interrupted",
            why if scheduled else f"{why}; start it again",
        )
    if (alive := _process_alive(last.record)) is not None:
        return alive, "running" if alive else "interrupted", "its process " + ("runs" if alive else "is gone")
    silence_s = now_s - (last.last_sign or 0.0)
    alive = silence_s < _SILENCE_S
    return alive, "running" if alive else "interrupted", f"the journal's last entry is {silence_s:.0f} s old"


def _state_by_job(job: LocalState, *, restart_count: int | None) -> tuple[bool, str, str]:
    if job.alive():
        state = "waiting" if job.state == "PENDING" else "running"
        return state == "running" and restart_count == job.restarts, state, f"job {job.job_id} is {job.state}"
    words = {"COMPLETED": "done", "CANCELLED": "cancelled", "FAILED": "failed"}
    return False, words.get(job.state, "interrupted"), job.why or f"job {job.job_id} was killed"


def _local_job(run: RunDirectory, last: _Trace | None) -> LocalState | None:
    """Find the newest job of the embedded scheduler, unless the last attempt is another scheduler's."""
    if last is not None and last.record.get("kind") not in {"local", None}:
        return None
    folder = run.root / "jobs"
    paths = [path for path in folder.glob(state_path(Path(), "*").name) if not path.name.startswith(".")]
    newest = max(paths, key=lambda path: path.name, default=None)  # ids begin with the time
    try:
        return None if newest is None else LocalState.read(newest)
    except (OSError, IntegrityError):
        return None


def _process_alive(record: JsonObject) -> bool | None:
    """Whether the single process of a plain run lives; None if that can't be told from here."""
    rendezvous = str(record.get("rendezvous", ""))
    pid = rendezvous.removeprefix("plain-")
    if pid == rendezvous or not pid.isdecimal() or record.get("nodes") != [os.uname().nodename]:
        return None
    return process_ticks(int(pid)) is not None


def _next_first_step(later: Iterable[_Trace], would: int | None) -> int | None:
    return next((trace.first_step for trace in later if trace.first_step is not None), would)


def _last(events: Sequence[JsonObject], kinds: set[str]) -> JsonObject | None:
    return next((event for event in reversed(events) if event.get("event") in kinds), None)


def _typed(record: JsonObject) -> JsonObject:
    """Leave out what is of another type than this program writes: then it says nothing."""
    return {key: value for key, value in record.items() if isinstance(value, _TYPES.get(key, object))}


def _json_object(path: Path) -> JsonObject:
    try:
        record = parse_json(read_regular(path, longest_bytes=_LONGEST_RECORD_BYTES))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
