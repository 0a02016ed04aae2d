"""A picture of the ratios: one bar a row, its target as a mark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paired import Result


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the rows that have a target; shorter is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [result for result in results if result.target is not None][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2), layout="constrained")
    colours = ["#3b7dd8" if row.met else "#d9822b" for row in rows]
    axes.barh(range(len(rows)), [row.ratio for row in rows], color=colours, height=0.62)
    for place, row in enumerate(rows):
        axes.plot([row.target] * 2, [place - 0.42, place + 0.42], color="#222222", linewidth=1.6)
        axes.text(row.ratio * 1.06, place, f"{row.ratio:.3g}", va="center", fontsize=7, color="#222222")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.axvline(1.0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel("ours ÷ theirs (log scale); the black mark is the target", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
