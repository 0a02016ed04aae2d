"""Two finished runs of the same training, compared: final state, samples, metrics of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.difference import (
    TensorDifference,
    ValueDifference,
    tensor_differences,
    value_differences,
)
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.report.metrics import MetricRow, read_metrics

#: Uninterrupted runs on other numbers of ranks differ by chance; another one may differ so many times as much.
_CHANCE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDifference:
    """Values of a metric at one step; NaN where it was not logged."""

    step: int
    name: str
    one: float
    two: float

    @property
    def relative(self) -> float:
        """Difference over the larger of both; infinite if one is not there."""
        if math.isfinite(self.one) and math.isfinite(self.two):
            return abs(self.one - self.two) / max(abs(self.one), abs(self.two))
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a run differs from another one.

    Parameters
    ----------
    steps, samples
        Of the one and the other, at the end.
    tensors, metrics
        How many tensors, and how many values of metrics, there are in the one.
    differing, values, logged
        What is not the same bit for bit: tensors, other values, metrics (by ascending step).
    """

    steps: tuple[int, int]
    samples: tuple[int, int]
    tensors: int
    metrics: int
    differing: tuple[TensorDifference, ...]
    values: tuple[ValueDifference, ...]
    logged: tuple[MetricDifference, ...]

    @property
    def identical(self) -> bool:
        """Whether nothing differs, bit for bit."""
        return self._same_length and not (self.differing or self.values or self.logged)

    @property
    def apart(self) -> dict[str, float]:
        """Relative differences of the state by name, tensors first, the largest first."""
        return {
            **{each.name: each.relative for each in self.differing},
            **{each.name: each.relative for each in self.values},
        }

    @property
    def _same_length(self) -> bool:
        return self.steps[0] == self.steps[1] and self.samples[0] == self.samples[1]

    def within(self, tolerance: float, *, chance: Comparison | None = None) -> bool:
        """Whether all differences are small.

        Parameters
        ----------
        tolerance
            Relative, for norms of tensors and for numbers; what is no floating-point number must be the same.
        chance
            How uninterrupted runs differ by chance: a tensor may differ a few times as much.
        """
        return self._same_length and not self.beyond(tolerance, chance=chance)

    def beyond(self, tolerance: float, *, chance: Comparison | None = None) -> list[str]:
        """Name what differs by more; see :meth:`within`."""
        usual = {} if chance is None else chance.apart
        logged = 0.0 if chance is None else max((each.relative for each in chance.logged), default=0.0)
        found = [
            name
            for name, relative in self.apart.items()
            if relative > max(tolerance, _CHANCE * usual.get(name, 0.0))
        ]
        found += [each.name for each in self.logged if each.relative > max(tolerance, _CHANCE * logged)]
        return list(dict.fromkeys(found))


def compare_runs(one: Path, two: Path, *, generators: bool) -> Comparison:
    """Compare the newest checkpoints and the metrics of two runs.

    Parameters
    ----------
    one, two
        Run directories.
    generators
        Compare the ranks' random generators, too: both runs were on the same ranks throughout.

    Raises
    ------
    CheckpointNotFound
        If one of them has none.
    IntegrityError
        If something is damaged.
    """
    with Checkpoint(one) as mine, Checkpoint(two) as other:
        first, second = read_metrics(one), read_metrics(two)
        return Comparison(
            steps=(mine.step, other.step),
            samples=(mine.manifest.samples, other.manifest.samples),
            tensors=len(mine),
            metrics=sum(len(row.values) for row in first),
            differing=tuple(tensor_differences(mine, other, generators=generators)),
            values=tuple(value_differences(mine, other)),
            logged=tuple(_metric_differences(first, second)),
        )


def _metric_differences(one: Sequence[MetricRow], two: Sequence[MetricRow]) -> list[MetricDifference]:
    mine = {(row.step, name): value for row in one for name, value in row.values.items()}
    other = {(row.step, name): value for row in two for name, value in row.values.items()}
    return [
        MetricDifference(step=step, name=name, one=left, two=right)
        for step, name in sorted(mine.keys() | other.keys())
        if (left := mine.get((step, name), math.nan)) != (right := other.get((step, name), math.nan))
        and not (math.isnan(left) and math.isnan(right))
    ]
