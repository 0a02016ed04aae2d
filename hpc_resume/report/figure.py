"""A picture of a run: a metric against the step, attempts coloured, restarts marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_resume.errors import UsageError
from hpc_resume.report.metrics import MetricRow, read_metrics
from hpc_resume.report.status import AttemptStatus, status
from hpc_resume.report.tables import CAUSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that people with any colour vision can tell apart. Source: Okabe and Ito, 2008.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_metric(
    root: Path, target: Path, *, metric: str = "loss", reference: Path | None = None, smooth: int = 1
) -> Path:
    """Draw a metric of a run.

    Parameters
    ----------
    root
        The run directory.
    target
        The picture; its ending says which kind (``.png``, ``.svg``, ``.pdf``).
    metric
        Which one, as ``run.log`` was given it.
    reference
        Another run to compare with, drawn as a thin line.
    smooth
        Steps that each point is the mean of.

    Returns
    -------
    Path
        The picture.

    Raises
    ------
    UsageError
        If matplotlib is missing or the run has no such metric.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError(
            "pictures need matplotlib, which is not installed: pip install 'hpc_resume[report]'"
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = _with(metric, root)
    figure, axes = plt.subplots(figsize=(8, 4), dpi=110, layout="constrained")
    if reference is not None:
        other = _with(metric, reference)
        axes.plot(*_points(other, metric, smooth), color="black", lw=0.7, zorder=3, label="uninterrupted run")
    attempts = status(root).attempts
    for attempt in attempts:
        _draw_attempt(axes, attempt, [row for row in rows if row.attempt == attempt.attempt], metric, smooth)
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.set_title(f"{root.name}: {len(attempts)} attempts, one run", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target)
    plt.close(figure)
    return target


def _with(metric: str, root: Path) -> list[MetricRow]:
    rows = read_metrics(root)
    chosen = [row for row in rows if metric in row.values]
    if not chosen:
        known = sorted({name for row in rows for name in row.values})
        raise UsageError(
            f"{root}: nothing was logged as {metric!r}; there is: {', '.join(known) or 'nothing'}"
        )
    return chosen


def _draw_attempt(
    axes: Axes, attempt: AttemptStatus, rows: Sequence[MetricRow], metric: str, smooth: int
) -> None:
    colour = _COLOURS[(attempt.attempt - 1) % len(_COLOURS)]
    ranks = "1 rank" if attempt.world_size == 1 else f"{attempt.world_size} ranks"
    ended = CAUSES.get(attempt.cause or "running", attempt.cause or "running")
    label = f"attempt {attempt.attempt}: {ranks}, {ended}"
    if rows:
        axes.plot(*_points(rows, metric, smooth), color=colour, lw=2.5, alpha=0.7, label=label)
    else:
        axes.plot([], [], color=colour, lw=2.5, label=f"{label}, no step")
    if attempt.attempt > 1 and attempt.first_step is not None:
        axes.axvline(attempt.first_step, color=colour, lw=1, ls=":")


def _points(rows: Sequence[MetricRow], metric: str, smooth: int) -> tuple[list[int], list[Any]]:
    """Return steps, and the mean of each ``smooth`` values."""
    steps, values = [], []
    for begin in range(0, len(rows), smooth):
        part = rows[begin : begin + smooth]
        steps.append(part[len(part) // 2].step)
        values.append(sum(row.values[metric] for row in part) / len(part))
    return steps, values
