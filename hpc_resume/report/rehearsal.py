"""What came out of a rehearsal, for people and programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_resume.files import JsonObject
from hpc_resume.report.comparison import Comparison
from hpc_resume.report.tables import Table

Verdict = Literal["equal", "differs", "nondeterministic", "failed"]


#: So many differences are shown.
_SHOWN = 5
#: What makes uninterrupted runs differ.
RANDOMNESS = (
    "something is random without a seed: a generator made without one, os.urandom, the time, the order of a set or of "
    "files; on GPUs also torch.use_deterministic_algorithms(False)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One allocation of the interrupted run.

    Parameters
    ----------
    interrupted_by, moment
        What happened to it, and when; None for the last one.
    saved_after_s
        From the interruption to the committed checkpoint; None if there was none.
    """

    ranks: int
    interrupted_by: str | None
    moment: str | None
    first_step: int | None
    last_step: int | None
    steps_lost: int
    saved_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What came out of a rehearsal; shows itself as a table.

    Parameters
    ----------
    verdict
        ``"equal"``; ``"differs"``; ``"nondeterministic"``: uninterrupted runs differ among themselves, so nothing
        can be said; ``"failed"``: it did not get that far.
    why
        In words.
    hints
        What typically causes it.
    comparison
        Of the interrupted run with the uninterrupted one.
    folder
        Where both runs are, if they were kept.
    """

    what: str
    verdict: Verdict
    why: str
    seed: int
    hints: tuple[str, ...] = ()
    acts: tuple[Act, ...] = ()
    comparison: Comparison | None = None
    folder: Path | None = None

    def to_json(self) -> JsonObject:
        """JSON form; what is no finite number is null."""
        record: JsonObject = _plain(dataclasses.asdict(self))
        return record

    def table(self) -> Table:
        """Show the interruptions, and what was found."""
        rows = tuple(
            (
                str(place + 1),
                str(act.ranks),
                act.interrupted_by or "-",
                act.moment or "-",
                "-" if act.first_step is None else f"{act.first_step} → {act.last_step}",
                str(act.steps_lost),
                "-" if act.saved_after_s is None else f"{act.saved_after_s:.2f} s",
            )
            for place, act in enumerate(self.acts)
        )
        notes = [self.why, *self._differences(), *(f"hint: {hint}" for hint in self.hints)]
        if self.folder is not None:
            notes.append(f"both runs are kept in {self.folder}")
        return Table(
            title=f"rehearsal of {self.what} (seed {self.seed}): {self.verdict}",
            columns=("attempt", "ranks", "interrupted by", "when", "steps", "lost", "saved after"),
            rows=rows,
            right=("attempt", "ranks", "lost"),
            note="\n".join(notes),
        )

    def _differences(self) -> Iterator[str]:
        if self.comparison is not None and self.verdict != "equal":
            differ = self.verdict == "differs"
            yield from _findings(
                self.comparison, ("uninterrupted", "interrupted") if differ else ("once", "again")
            )

    def __repr__(self) -> str:
        return "\n".join(self.table().lines())

    def _repr_html_(self) -> str:
        return self.table().html()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _findings(comparison: Comparison, names: tuple[str, str]) -> Iterator[str]:
    """Say what differs between two runs, the most telling first."""
    mine, other = names
    for what, (one, two) in (("steps", comparison.steps), ("samples", comparison.samples)):
        if one != two:
            yield f"{what}: {one} {mine}, {two} {other}"
    for metric in comparison.logged[:1]:
        many = len({each.step for each in comparison.logged})
        yield (
            f"metrics: {metric.name} differs first at step {metric.step} ({metric.one:.8g} {mine}, {metric.two:.8g} {other}), "
            f"and at {many} steps in all"
        )
    for value in comparison.values[:_SHOWN]:
        yield f"state: {value.name} is {value.one} {mine}, {value.two} {other}"
    for tensor in comparison.differing[:_SHOWN]:
        by = (
            "is not of the same shape, type or place"
            if math.isinf(tensor.largest)
            else (f"differs by up to {tensor.largest:.2e} (relative {tensor.relative:.1e})")
        )
        yield f"state: {tensor.name} {by}"
    if (more := len(comparison.differing) - _SHOWN) > 0:
        yield f"state: {more} more of {comparison.tensors} tensors differ"


def causes(found: Comparison, untracked: Sequence[str]) -> Iterator[str]:
    """Name what typically causes such differences.

    Parameters
    ----------
    found
        The differences.
    untracked
        What the script has that has a state and is not tracked.
    """
    kept = [name for name in untracked if ".dataset" in name.partition(" ")[0]]
    if forgotten := [name for name in untracked if name not in kept]:
        yield f"not tracked, though it has a state: {', '.join(forgotten)}; give it to run.track(…)"
    if kept:
        yield (
            f"kept by a dataset for itself, and begun anew by each worker and attempt: {', '.join(kept)}; draw from "
            "random, np.random or torch in __getitem__, or from np.random.default_rng(hr.sample_key())"
        )
    names = [each.name for each in found.values]
    if any(name.rpartition("/")[2] in {"lr", "last_epoch", "_last_lr"} for name in names):
        yield "the learning rate differs: is its scheduler tracked?"
    if found.samples[0] != found.samples[1] or any("/samples" in name for name in names):
        yield "other samples were used: does the position of the data come back (run.loader, tracked)?"
    if found.differing and all(each.name.startswith("ranks/") for each in found.differing):
        yield "only random generators differ: something draws from them once an attempt, such as at its start"


def apart(found: Comparison) -> str:
    """Say how far two runs are apart."""
    metric = max((each.relative for each in found.logged), default=0.0)
    name, state = max(found.apart.items(), key=lambda each: each[1], default=("", 0.0))
    return f"metrics {metric:.0e} apart at most, the state {state:.0e}{f' ({name})' if name else ''}"


def equal(found: Comparison) -> str:
    """Say what is equal."""
    return (
        f"{counted(found.tensors, 'tensor')}, everything else in the state, {counted(found.samples[0], 'sample')} and "
        f"{counted(found.metrics, 'metric')} of {counted(found.steps[0], 'step')} are equal"
    )


def counted(number: int, noun: str) -> str:
    """Give a number and its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
