"""How to save: whole or only what has changed, and what still fits before the end of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: A shard that refers to others must save at least this part of the time of a whole one: it also costs the
#: reader more files, and keeps older checkpoints from being deleted.
_WORTHWHILE = 0.25
#: Weight of the newest measurement in an estimate.
_NEWEST = 0.5
#: Part of the time left that a save may take by its estimate: estimates of a shared filesystem are rough.
_SAFE = 0.7
#: Longest pause, in saves, between two looks at what changes.
_LONGEST_PAUSE = 16


@dataclass(slots=True)
class Estimate:
    """What saving was measured to cost, over the saves so far.

    Attributes
    ----------
    write_bytes_per_s
        From the first byte to durable; None until measured.
    overhead_s
        Seconds of a save in which nothing is written: layout, receipts, commit.
    """

    write_bytes_per_s: float | None = None
    overhead_s: float = 0.0

    def add(self, *, written_bytes: int, write_s: float, whole_s: float) -> None:
        """Learn from a save of ``written_bytes`` that took ``write_s`` of the ``whole_s`` until committed."""
        self.overhead_s = _blend(self.overhead_s or None, max(whole_s - write_s, 0.0))
        if written_bytes > 0 and write_s > 0:
            self.write_bytes_per_s = _blend(self.write_bytes_per_s, written_bytes / write_s)

    def seconds(self, size_bytes: int) -> float | None:
        """Time that a save of a size is going to take; None if nothing was measured yet."""
        if self.write_bytes_per_s is None:
            return None
        return self.overhead_s + size_bytes / self.write_bytes_per_s


def refer_to_older(
    *, changed_bytes: int, total_bytes: int, estimate: Estimate, chain: int, longest_chain: int
) -> bool:
    """Decide whether a shard holds only what has changed.

    Parameters
    ----------
    changed_bytes, total_bytes
        By comparing checksums.
    estimate
        Measured so far.
    chain
        Number of older checkpoints that it would refer to.
    longest_chain
        How many there may be.
    """
    if chain > longest_chain or total_bytes == 0:
        return False
    whole_s = estimate.seconds(total_bytes)
    part_s = estimate.seconds(changed_bytes)
    if whole_s is None or part_s is None or whole_s <= 0:
        return changed_bytes <= (1 - _WORTHWHILE) * total_bytes
    return part_s <= (1 - _WORTHWHILE) * whole_s


@dataclass(slots=True)
class Looking:
    """When to hash everything first to see what has changed: not each time where it never helps."""

    _pause: int = 0
    _wait: int = field(default=0)

    def due(self) -> bool:
        """Whether to look at this save."""
        if self._wait > 0:
            self._wait -= 1
            return False
        return True

    def found(self, *, worthwhile: bool) -> None:
        """Say what the look has brought; pauses double while it brings nothing."""
        self._pause = 0 if worthwhile else min(max(2 * self._pause, 1), _LONGEST_PAUSE)
        self._wait = self._pause


def what_fits(left_s: float | None, sizes: Mapping[str, int], estimate: Estimate) -> tuple[str, str]:
    """Choose what to save before a job ends.

    Parameters
    ----------
    left_s
        Seconds until the job is killed; None if that is not known.
    sizes
        Bytes of each choice, the best one first: ``{"full": …, "model": …}``.
    estimate
        Measured so far.

    Returns
    -------
    (str, str)
        The choice, and in words why it is not the first one; empty if it is. If not even the last one fits,
        the first is tried all the same: estimates err, and half a model helps nobody.
    """
    first, *others = sizes
    needed_s = estimate.seconds(sizes[first])
    if left_s is None or needed_s is None or needed_s <= _SAFE * left_s:
        return first, ""
    for choice in others:
        seconds = estimate.seconds(sizes[choice])
        if seconds is not None and seconds <= _SAFE * left_s:
            return choice, (
                f"{left_s:.0f} s were left; everything needs {needed_s:.0f} s by measurement, "
                f"this {seconds:.0f} s"
            )
    return first, ""


def _blend(before: float | None, now: float) -> float:
    return now if before is None else (1 - _NEWEST) * before + _NEWEST * now
