"""How to save: whole or only what has changed, and what still fits before the end of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: A shard that refers to others must save at least this part of the time of a whole one: it also costs the
#: reader more files, and keeps older checkpoints from being deleted.
_WORTHWHILE = 0.25
#: A save that writes less than this part of the state is not used to measure the speed of writing.
_TELLING = 0.25
#: Weight of the newest measurement in an estimate.
_NEWEST = 0.5
#: Part of the time left that a save may take by its estimate: estimates of a shared filesystem are rough.
SAFE_PART = 0.7
#: How long ranks wait for each other's shards: so long, and so many times what they took for their own.
_LEAST_PATIENCE_S = 120.0
_PATIENCE_FACTOR = 10.0
#: Longest pause, in saves, between two looks at what changes.
_LONGEST_PAUSE = 16


@dataclass(slots=True)
class Estimate:
    """What saving was measured to cost, over the saves so far.

    Attributes
    ----------
    write_bytes_per_s
        From the first byte to durable; None until measured.
    look_bytes_per_s
        Comparing a state with the checkpoint before; None until measured.
    overhead_s
        Seconds of a save in which nothing is written: layout, receipts, commit.
    """

    write_bytes_per_s: float | None = None
    look_bytes_per_s: float | None = None
    overhead_s: float = 0.0

    def add(
        self,
        *,
        written_bytes: int,
        state_bytes: int,
        write_s: float,
        whole_s: float,
        look_s: float = 0.0,
    ) -> None:
        """Learn from a save.

        Parameters
        ----------
        written_bytes, state_bytes
            Of this rank's part: what was written, and all of it.
        write_s, whole_s
            From the first byte to durable, and until the receipt was; without ``look_s``.
        look_s
            Comparing it with the checkpoint before, if that was done.
        """
        if look_s > 0 and state_bytes > 0:
            self.look_bytes_per_s = _blend(self.look_bytes_per_s, state_bytes / look_s)
        if written_bytes < _TELLING * state_bytes:
            # A few bytes take as long as the disk's answer: that tells nothing about its speed.
            self.overhead_s = _blend(self.overhead_s or None, whole_s)
            return
        self.overhead_s = _blend(self.overhead_s or None, max(whole_s - write_s, 0.0))
        if written_bytes > 0 and write_s > 0:
            self.write_bytes_per_s = _blend(self.write_bytes_per_s, written_bytes / write_s)

    def seconds(self, size_bytes: int, *, looked_at_bytes: int = 0) -> float | None:
        """Time that a save of a size is going to take, if so much is compared first.

        None if nothing was measured yet.
        """
        if self.write_bytes_per_s is None:
            return None
        # Hashing is never slower than writing.
        look_s = looked_at_bytes / (self.look_bytes_per_s or self.write_bytes_per_s)
        return self.overhead_s + size_bytes / self.write_bytes_per_s + look_s


def told_s(costs: Mapping[str, Any]) -> tuple[float, ...]:
    """Give what the costs in a manifest tell of the time of a save: one number, or none."""
    try:
        write_s, written, state = (float(costs[key]) for key in ("write_s", "written_bytes", "state_bytes"))
    except (LookupError, TypeError, ValueError):
        return ()
    return (write_s,) if write_s > 0 and written >= _TELLING * state else ()


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
    # Finding out what has changed has been paid for either way.
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


def what_fits(left_s: float | None, needs_s: Mapping[str, float | None]) -> tuple[str, str]:
    """Choose what to save before a job ends.

    Parameters
    ----------
    left_s
        Seconds until the job is killed; None if that is not known.
    needs_s
        Seconds that each choice takes by measurement, the best choice first; None if nothing was measured:
        ``{"full": …, "changed": …, "model": …}``.

    Returns
    -------
    (str, str)
        The choice, and in words why it is not the first one; empty if it is. If not even the last one fits,
        the first is tried all the same: estimates err, and half a model helps nobody.

    Examples
    --------
    >>> what_fits(60, {"full": 30.0, "model": 10.0})
    ('full', '')
    >>> what_fits(30, {"full": 60.0, "model": 10.0})
    ('model', '30 s were left; everything needs 60 s by measurement, this 10 s')
    """
    first, *others = needs_s
    needed_s = needs_s[first]
    if left_s is None or needed_s is None or needed_s <= SAFE_PART * left_s:
        return first, ""
    for choice in others:
        seconds = needs_s[choice]
        if seconds is not None and seconds <= SAFE_PART * left_s:
            left, needed, this = (_text(value) for value in (left_s, needed_s, seconds))
            return choice, f"{left} s were left; everything needs {needed} s by measurement, this {this} s"
    return first, ""


def patience_s(own_s: float, left_s: float | None) -> float:
    """Tell how long to wait for the other ranks' shards before a save counts as failed.

    Shards are alike, so a rank that takes ten times as long as this one is not coming any more.

    Parameters
    ----------
    own_s
        What this rank took for its own.
    left_s
        Seconds until the job is killed, if that is known: the last word needs some of them.
    """
    limit_s = _LEAST_PATIENCE_S + _PATIENCE_FACTOR * own_s
    return limit_s if left_s is None else min(limit_s, SAFE_PART * left_s)


def _text(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


def _blend(before: float | None, now: float) -> float:
    return now if before is None else (1 - _NEWEST) * before + _NEWEST * now
