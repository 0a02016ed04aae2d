"""Two ways to do one thing, measured in turn: A B B A …, so that whatever drifts, drifts for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Result:
    """One row of a benchmark.

    Parameters
    ----------
    name
        What is compared with what.
    ratio
        Ours over theirs: the median of the ratios of pairs.
    target
        What it should be at most; None where a number is only told.
    n
        Number of pairs.
    details
        Seconds, bytes and quartiles, for the table.
    """

    name: str
    ratio: float
    target: float | None
    n: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.target is None or self.ratio <= self.target

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "ratio": round(self.ratio, 4),
            "target": self.target,
            "n": self.n,
            **self.details,
        }


def seconds(function: Callable[[], Any]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare(
    name: str,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    *,
    target: float | None,
    n: int,
    warm_up: int = 1,
) -> Result:
    """Measure two functions, each of which returns its seconds, in turn.

    Parameters
    ----------
    ours, theirs
        Called one after the other, in changing order.
    n
        Pairs that count.
    warm_up
        Pairs before them that do not.
    """
    pairs: list[tuple[float, float]] = []
    for turn in range(-warm_up, n):
        if turn % 2:
            second = theirs()
            first = ours()
        else:
            first = ours()
            second = theirs()
        if turn >= 0:
            pairs.append((first, second))
    return summarise(name, pairs, target=target)


def summarise(
    name: str, pairs: list[tuple[float, float]], *, target: float | None, unit: str = "s"
) -> Result:
    """Make a row of pairs of measurements."""
    ratios = [ours / theirs for ours, theirs in pairs]
    quartiles = statistics.quantiles(ratios)[::2] if len(ratios) > 1 else ratios * 2
    return Result(
        name=name,
        ratio=statistics.median(ratios),
        target=target,
        n=len(pairs),
        details={
            "quartiles": [round(quartile, 4) for quartile in quartiles],
            f"ours_{unit}": round(statistics.median(ours for ours, _ in pairs), 5),
            f"theirs_{unit}": round(statistics.median(theirs for _, theirs in pairs), 5),
        },
    )
