"""Metrics of a run, put together from all ranks and attempts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import JsonObject
from hpc_resume.journal import read_events
from hpc_resume.rollbacks import read_rollbacks, standing
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import open_regular

#: The last line of a metrics file is in here.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """Metrics of one step.

    Parameters
    ----------
    step
        Index of the step, from 0.
    attempt
        The attempt whose step counts: the last one that did it.
    values
        Mean over the ranks that logged each.
    """

    step: int
    attempt: int
    values: dict[str, float]


def read_metrics(root: Path) -> list[MetricRow]:
    """Read the metrics of a run.

    Parameters
    ----------
    root
        The run directory.

    Returns
    -------
    list of MetricRow
        By ascending step, each step once. Steps that a rollback has taken back are left out until they are done
        again.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    """
    run = RunDirectory(root)
    run.identity()
    rows: dict[int, MetricRow] = {}
    rollbacks = standing(read_rollbacks(run))
    for attempt in run.attempt_numbers():
        until = min((each.step for each in rollbacks if each.after >= attempt), default=None)
        for step, samples in _by_step(run.attempt(attempt)).items():
            if until is not None and step >= until:
                continue
            means = {name: sum(values) / len(values) for name, values in samples.items()}
            rows[step] = MetricRow(step=step, attempt=attempt, values=means)
    return [rows[step] for step in sorted(rows)]


def _by_step(folder: Path) -> dict[int, dict[str, list[float]]]:
    """All ranks' values of an attempt, by step and name."""
    found: dict[int, dict[str, list[float]]] = {}
    for path in sorted(folder.glob("metrics-rank-*.jsonl")):
        for line in read_events(path):
            step = line.get("step")
            if not isinstance(step, int):
                continue
            values = found.setdefault(step, {})
            for name, value in line.items():
                if name not in {"step", "t"} and isinstance(value, int | float):
                    values.setdefault(name, []).append(float(value))
    return found


def last_row(path: Path) -> JsonObject:
    """Read the last whole line of a metrics file, however long that is; empty if there is none."""
    try:
        fd = open_regular(path, follow=True)
    except OSError:
        return {}
    with os.fdopen(fd, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row
    return {}
