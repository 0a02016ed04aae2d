"""Runs that are interrupted where it was drawn, and the samples that they used."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.subjects import Cut, samples_used, train
from tests.ranks import Attempt

#: Part of the interruptions that leave no time to save.
_KILLED = 0.25
_PATIENCE_S = 300.0


def cuts(rng: random.Random, steps: int, interruptions: int) -> list[Cut]:
    """Draw where a run is interrupted, by ascending step."""
    chosen = sorted(rng.sample(range(1, steps - 1), interruptions))
    return [Cut(step=step, how="kill" if rng.random() < _KILLED else "signal") for step in chosen]


def go(
    run_dir: Path,
    subject: str,
    sharding: str,
    steps: int,
    *,
    sizes: Sequence[int],
    at: Sequence[Cut],
    **how: Any,
) -> None:
    """Train to the end, over attempts on so many ranks each.

    Raises
    ------
    RuntimeError
        If an attempt ends otherwise than it should.
    """
    for size, cut in zip(sizes, [*at, None], strict=True):
        attempt = Attempt(run_dir, size, _train, subject, sharding, steps, {**how, "cut": cut})
        codes = attempt.wait(_PATIENCE_S)
        # A rank that has not killed itself yet may see first that others are gone. And an attempt whose last steps
        # came before the signal was heard is done.
        expected = [{0}] if cut is None else [{-9}, {-9, 75}] if cut.how == "kill" else [{75}, {0}]
        if set(codes) not in expected:
            raise RuntimeError(
                f"{run_dir.name}: exit codes {codes}, not {expected}:\n{attempt.log.read_text()[-4000:]}"
            )
        if codes[0] == 0:
            return


def _train(subject: str, sharding: str, steps: int, how: dict[str, Any]) -> None:
    train(subject, sharding, steps, **how)


def wrong_samples(one: Path, two: Path) -> int:
    """Count the steps whose samples, or their order, differ between two runs, or between two times of doing them."""
    mine, other = samples_used(one), samples_used(two)
    steps = mine.keys() | other.keys()
    return sum(
        any(done != mine.get(step, [None])[0] for done in [*mine.get(step, []), *other.get(step, [None])])
        for step in steps
    )
