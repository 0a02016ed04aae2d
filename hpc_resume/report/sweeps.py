"""How the runs of an array are: one row for each. Read from their directories, and a word of each one's job."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_resume.errors import HpcResumeError
from hpc_resume.files import JsonObject
from hpc_resume.report.metrics import last_row
from hpc_resume.report.status import RunStatus, status
from hpc_resume.report.tables import Table
from hpc_resume.rundir import RunDirectory

#: More metrics than this make no table that fits a screen.
_METRICS = 4
#: In this order they are counted in the heading.
_STATES = ("done", "running", "waiting", "interrupted", "cancelled", "failed", "not submitted", "damaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWord:
    """How a run's newest job is.

    Parameters
    ----------
    job_id
        Its id.
    state
        Slurm's word.
    over
        Whether nothing more happens to it; ``None`` if that is not known.
    """

    job_id: str
    state: str
    over: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementStatus:
    """One run of an array.

    Parameters
    ----------
    state
        As :class:`~hpc_resume.report.status.RunStatus` has it; besides, ``"not submitted"`` and ``"damaged"``.
    why
        What the state was concluded from.
    metrics
        What rank 0 logged last.
    """

    name: str
    run_dir: str
    arguments: JsonObject
    state: str
    why: str
    step: int
    attempts: int
    job_id: str | None
    metrics: dict[str, float]

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return dataclasses.asdict(self)


def read_element(run: RunDirectory, job: JobWord | None) -> ElementStatus:
    """Read how one run of an array is.

    Parameters
    ----------
    run
        Its directory.
    job
        Its newest job, if there ever was one.
    """
    arguments: JsonObject = {}
    job_id = None if job is None else job.job_id
    named: dict[str, Any] = {"name": run.root.name, "run_dir": str(run.root), "job_id": job_id}
    try:
        recorded = run.identity().get("arguments")
        arguments = recorded if isinstance(recorded, dict) else {}
        found = status(run.root)
    except HpcResumeError as error:
        return ElementStatus(
            **named, arguments=arguments, state="damaged", why=str(error), step=0, attempts=0, metrics={}
        )
    return ElementStatus(
        **named,
        arguments=arguments,
        state=_state(found, job),
        why=found.why,
        step=found.step,
        attempts=len(found.attempts),
        metrics=_last_metrics(run),
    )


def sweep_table(name: str, elements: Sequence[ElementStatus], *, note: str = "") -> Table:
    """Show the runs of an array."""
    counts = Counter(element.state for element in elements)
    told = ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state])
    arguments = _union(element.arguments for element in elements)
    metrics = _union(element.metrics for element in elements)[:_METRICS]
    return Table(
        title=f"{name}: {len(elements)} run{'' if len(elements) == 1 else 's'}{': ' if told else ''}{told}",
        columns=(*arguments, "state", "step", "attempts", "job", *metrics),
        right=("step", "attempts", *metrics),
        rows=tuple(
            (
                *(_text(element.arguments.get(key)) if key in element.arguments else "" for key in arguments),
                element.state,
                str(element.step),
                str(element.attempts),
                element.job_id or "",
                *(_number(element.metrics.get(key)) for key in metrics),
            )
            for element in elements
        ),
        note=note,
    )


def _state(found: RunStatus, job: JobWord | None) -> str:
    """Put together what the run's directory and its job's state say; the directory is the truth."""
    if found.state in {"done", "cancelled", "failed"} and (job is None or job.over is not False):
        return found.state
    if job is None:
        return found.state if found.attempts else "not submitted"
    if job.over is None:
        return found.state
    if not job.over:
        return "waiting" if job.state == "PENDING" else "running"
    if found.attempts:
        return "interrupted"
    # It ended before it had a journal, or never writes one: the job's word is all there is.
    words = {"COMPLETED": "done", "CANCELLED": "cancelled", "FAILED": "failed", "OUT_OF_MEMORY": "failed"}
    return words.get(job.state, "interrupted")


def _last_metrics(run: RunDirectory) -> dict[str, float]:
    for number in reversed(run.attempt_numbers()):
        if row := last_row(run.attempt(number) / "metrics-rank-00000.jsonl"):
            return {
                name: float(value)
                for name, value in row.items()
                if name not in {"step", "t", "#"} and isinstance(value, (int, float))
            }
    return {}


def _union(mappings: Iterable[JsonObject]) -> list[str]:
    return list(dict.fromkeys(key for each in mappings for key in each))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
