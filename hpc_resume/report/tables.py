"""Tables for people: aligned lines, or for a notebook HTML; and numbers as people read them."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpc_resume.checkpoint.health import Health
from hpc_resume.checkpoint.manifest import MODEL
from hpc_resume.files import JsonObject
from hpc_resume.policy.recommendation import Recommendation
from hpc_resume.policy.retention import RetentionPlan
from hpc_resume.provenance.datarecord import DataRecord
from hpc_resume.provenance.finding import Finding
from hpc_resume.report.checkpoints import CheckpointSummary
from hpc_resume.report.status import AttemptStatus, RunStatus
from hpc_resume.rundir import checkpoint_step
from hpc_resume.untrusted import printable

#: Causes in words; what is not here is its own word.
CAUSES = {
    "time_limit": "time limit",
    "preemption": "preempted",
    "requeue": "requeued",
    "cancel": "cancelled",
    "node_failure": "node failed",
    "bad_node": "left a bad node",
    "crash": "crashed",
    "out_of_memory": "out of memory",
    "hang": "hung",
    "no_progress": "no progress",
    "unknown": "killed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A heading, columns and rows of text; ``right`` says which columns are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    note: str = ""

    def lines(self) -> list[str]:
        """Aligned lines of text; what names in files could tell a terminal to do is spelled out."""
        lines = [printable(self.title)] if self.title else []
        if self.rows:
            grid = (self.columns, *(tuple(map(cell_text, row)) for row in self.rows))
            widths = [max(len(row[place]) for row in grid) for place in range(len(self.columns))]
            for row in grid:
                cells = [
                    cell.rjust(width) if column in self.right else cell.ljust(width)
                    for cell, width, column in zip(row, widths, self.columns, strict=True)
                ]
                lines.append("  ".join(cells).rstrip())
        return [*lines, printable(self.note)] if self.note else lines

    def html(self) -> str:
        """HTML for a notebook."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if self.rows else ""
        return f"<p><b>{html.escape(self.title)}</b></p>{table}{note}"


def status_table(status: RunStatus, *, now_s: float | None = None) -> Table:
    """Show a run's attempts."""
    now_s = time.time() if now_s is None else now_s
    attempts = len(status.attempts)
    title = f"{status.name}: {status.state} at step {status.step}, {_count(attempts, 'attempt')}, "
    title += f"{_count(status.steps_lost, 'step')} lost"
    if not attempts:
        title = f"{status.name}: {status.state}, no attempt has begun a journal yet"
    return Table(
        title=title,
        columns=("attempt", "node type", "ranks", "steps", "ended by", "lost", "took"),
        right=("attempt", "ranks", "lost", "took"),
        rows=tuple(_attempt_row(attempt, now_s) for attempt in status.attempts),
        note=_note(status),
    )


def checkpoint_table(title: str, checkpoints: Sequence[CheckpointSummary]) -> Table:
    """Show a run's checkpoints; their data, too, if one of them says what it was."""
    columns: tuple[str, ...] = (
        "step",
        "checkpoint",
        "why",
        "ranks",
        "node type",
        "size",
        "attempt",
        "written",
    )
    rows = [_checkpoint_row(each) for each in checkpoints]
    if any(each.data is not None for each in checkpoints):
        columns = (*columns, "data")
        rows = [(*row, (each.data or "")[:8]) for row, each in zip(rows, checkpoints, strict=True)]
    return Table(
        title=title,
        columns=columns,
        right=("step", "ranks", "size", "attempt"),
        rows=tuple(rows),
        note="\n".join(
            [
                *(f"step {each.step}: {_model_only(each.note)}" for each in checkpoints if _partial(each)),
                *(
                    f"step {each.step}: {_not_finite(each.held_back)}"
                    for each in checkpoints
                    if each.held_back
                ),
                *dict.fromkeys(each.shared for each in checkpoints if each.shared),
                *dict.fromkeys(each.set_aside for each in checkpoints if each.set_aside),
            ]
        ),
    )


def pruning_table(plan: RetentionPlan, *, done: bool) -> Table:
    """Show what is kept of a run's checkpoints, and why, and what is not; newest first."""
    removed = dict.fromkeys(plan.remove, "deleted" if done else "to be deleted")
    rows = sorted({**plan.keep, **removed}.items(), key=lambda row: checkpoint_step(row[0]), reverse=True)
    many = _count(len(plan.remove), "checkpoint")
    return Table(
        title=f"{many} deleted" if done else f"{many} to be deleted, {len(plan.keep)} kept",
        columns=("step", "checkpoint", "", "why"),
        right=("step",),
        rows=tuple(
            (
                str(checkpoint_step(name)),
                name,
                "keep" if name in plan.keep else why,
                why if name in plan.keep else "",
            )
            for name, why in rows
        ),
    )


def findings_table(findings: Sequence[tuple[str, Finding]], advice: Recommendation | None = None) -> Table:
    """Show what was looked at, by area, and how runs are continued best."""
    bad = sum(finding.level == "bad" for _, finding in findings)
    note = f"continuation: {advice.continuation} ({'; '.join(advice.reasons)})" if advice else ""
    return Table(
        title=f"{_count(bad, 'problem')}" if bad else "nothing stands in the way",
        columns=("area", "what", "", "how it is"),
        rows=tuple(
            (area, each.what, "" if each.level == "ok" else each.level, each.detail)
            for area, each in findings
        ),
        note=note,
    )


def contents_table(described: JsonObject) -> Table:
    """Show what :func:`~hpc_resume.report.checkpoints.describe` tells of a checkpoint."""
    tensors = described["tensors"]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(described["created"]))
    shapes = {name: " x ".join(map(str, tensor["shape"])) or "scalar" for name, tensor in tensors.items()}
    return Table(
        title=f"{described['name']}: step {described['step']}, {described['samples']} samples, "
        f"saved ({described['reason']}) by {_count(described['world_size'], 'rank')} of attempt {described['attempt']} "
        f"at {written}, {size_text(described['size_bytes'])}",
        columns=("tensor", "shape", "type", "size", "ranks"),
        right=("size", "ranks"),
        rows=tuple(
            (name, shapes[name], tensor["dtype"], size_text(tensor["size_bytes"]), str(tensor["ranks"]))
            for name, tensor in tensors.items()
        ),
        note="\n".join(_remarks(described)),
    )


def _remarks(described: JsonObject) -> Iterator[str]:
    if described["objects"]:
        yield f"besides: {', '.join(described['objects'])}"
    if described["content"] == MODEL:
        yield _model_only(described["note"])
    if data := DataRecord.from_json(described["environment"].get("data")):
        yield f"trained on: {data.sentence()}"
    yield from _health(described["health"])
    if described["missing_ranks"]:
        ranks = ", ".join(map(str, described["missing_ranks"]))
        yield f"ranks that died while it was saved: {ranks}; others wrote what they held alike"
    if described["set_aside"]:
        yield f"set aside: {described['set_aside']}"
    if described["shared"]:
        yield described["shared"]
    if described["refers"]:
        yield f"unchanged bytes lie in: {', '.join(described['refers'])}"


def _health(health: JsonObject) -> Iterator[str]:
    if told := Health.from_json(health).told:
        yield _not_finite(told)
    if noticed := health.get("noticed"):
        yield f"NaN, in no parameter: {', '.join(noticed)}"
    for module, norm in health.get("norms", {}).items():
        before = health.get("jumped", {}).get(module)
        yield f"norm of {module}: {norm:.6g}" + (
            "" if before is None else f", after {before:.6g} before: look at it"
        )
    if probe := health.get("probe"):
        ranks = probe["values"]
        values = ", ".join(f"{name} {value}" for name, value in ranks[0].items())
        yield f"the probe gave {values}" + (
            "" if len(ranks) == 1 else f" on rank 0, and others on {len(ranks) - 1} more"
        )


def _not_finite(what: str) -> str:
    return f"not finite: {what}; it is not resumed from"


def _partial(each: CheckpointSummary) -> bool:
    return each.content == MODEL


def _model_only(note: str) -> str:
    return f"the model only: {note}; it is not resumed from" if note else "the model only"


def attempt_sentence(attempt: AttemptStatus) -> str:
    """Tell of an attempt in one line; a new one when it has ended."""
    where = f"attempt {attempt.attempt} on {attempt.node_type or 'this machine'}, {_count(attempt.world_size or 0, 'rank')}"
    if attempt.cause is None:
        return f"{where}: began"
    steps = (
        "before its first step"
        if attempt.first_step is None
        else (f"step {attempt.first_step} → {_text(attempt.last_step)}")
    )
    return f"{where}: {steps}, {CAUSES.get(attempt.cause, attempt.cause)}"


def _checkpoint_row(each: CheckpointSummary) -> tuple[str, ...]:
    if each.problem is not None:
        return (str(each.step), each.name, f"damaged: {each.problem}", "", "", "", "", "")
    return (
        str(each.step),
        each.name,
        ", ".join(_marks(each)),
        _text(each.world_size),
        _text(each.node_type),
        size_text(each.size_bytes or 0),
        _text(each.attempt),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created or 0)),
    )


def _marks(each: CheckpointSummary) -> Iterator[str]:
    yield each.reason or ""
    if _partial(each):
        yield "model only"
    if each.held_back:
        yield "held back"
    if each.shared:
        yield "from the fork's parent"
    if each.set_aside:
        yield "set aside"


def _attempt_row(attempt: AttemptStatus, now_s: float) -> tuple[str, ...]:
    cause = "running" if attempt.cause is None else CAUSES.get(attempt.cause, attempt.cause)
    took = "" if attempt.started is None else duration_text((attempt.ended or now_s) - attempt.started)
    steps = "" if attempt.first_step is None else f"{attempt.first_step} → {_text(attempt.last_step)}"
    return (
        str(attempt.attempt),
        _text(attempt.node_type) or ", ".join(attempt.nodes),
        _text(attempt.world_size),
        steps,
        cause,
        str(attempt.steps_lost),
        took,
    )


def _note(status: RunStatus) -> str:
    lines = [] if status.state in {"done", "running"} else [status.why]
    if status.state == "interrupted" and status.newest:
        lines[0] += f"; it goes on from step {checkpoint_step(status.newest)}"
    return "\n".join([*lines, *status.branching])


def duration_text(seconds: float) -> str:
    """Write a duration in its two largest units: ``"2 h 05 min"``."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {below}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def size_text(size_bytes: float) -> str:
    """Write a size with its decimal unit: ``"1.5 GB"``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} PB"


def cell_text(text: str) -> str:
    """Text of a cell: one line, with nothing in it that steers a terminal."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
