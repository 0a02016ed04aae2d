"""Boxes: axis-aligned pieces of tensors. Sharding, replicas and resharding are arithmetic on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: A replicated tensor smaller than this is stored whole by one of its holders.
WHOLE_BELOW_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A piece of a tensor.

    Parameters
    ----------
    start
        First index in each dimension.
    size
        Extent in each dimension; ``()`` for a 0-d tensor.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.size) or min((*self.start, *self.size), default=0) < 0:
            raise ValueError(f"no box: start {self.start}, size {self.size}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box that is the whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index in each dimension."""
        return tuple(a + n for a, n in zip(self.start, self.size, strict=True))

    @property
    def volume(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.size)

    def within(self, shape: Sequence[int]) -> bool:
        """Whether the box lies inside a tensor of this shape."""
        return len(shape) == len(self.size) and all(b <= n for b, n in zip(self.stop, shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Elements that both hold, or None where there are none."""
        start = tuple(map(max, self.start, other.start))
        size = tuple(min(b) - a for a, b in zip(start, zip(self.stop, other.stop, strict=True), strict=True))
        return Box(start, size) if all(n > 0 for n in size) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in an array that holds ``outer``."""
        return tuple(
            slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.size, strict=True)
        )

    def element_range_in(self, outer: Box) -> tuple[int, int]:
        """Smallest contiguous range ``[first, last)`` of ``outer``'s elements (C order) that holds this box."""
        if self.volume == 0:
            return 0, 0
        first = last = 0
        for a, b, n, extent in zip(self.start, outer.start, self.size, outer.size, strict=True):
            first = first * extent + (a - b)
            last = last * extent + (a - b + n - 1)
        return first, last + 1


def covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes tile a tensor: every element in exactly one of them.

    Sorted by their first dimension, a box is compared only with those that begin before it ends, so row
    shards of any number of ranks cost one pass.
    """
    if sum(box.volume for box in boxes) != math.prod(shape) or not all(box.within(shape) for box in boxes):
        return False
    ordered = sorted(box for box in boxes if box.volume)
    if not shape:
        return len(ordered) == 1
    active: list[Box] = []
    for box in ordered:
        active = [other for other in active if other.stop[0] > box.start[0]]
        if any(other.intersect(box) for other in active):
            return False
        active.append(box)
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A box that several ranks hold alike.

    Parameters
    ----------
    name
        Of the tensor.
    box
        What each of the holders has.
    item_bytes
        Bytes of one element.
    holders
        The ranks that have it, ascending.
    """

    name: str
    box: Box
    item_bytes: int
    holders: tuple[int, ...]


def split_replicas(replicas: Sequence[Replica], rank: int) -> Iterator[tuple[str, Box | None]]:
    """Say what one rank stores of the boxes that it holds together with others.

    Boxes with the same holders are laid end to end in name order and cut into as many equal byte ranges as
    there are holders; cuts are moved to whole rows, and past tensors under :data:`WHOLE_BELOW_BYTES`. Every
    rank computes the same cuts from its own tensors, so nobody has to talk, and the shares differ by at
    most a row or a small tensor.

    Yields
    ------
    (str, Box or None)
        Name and this rank's share, in name order; None where another holder stores it.
    """
    groups: dict[tuple[int, ...], list[Replica]] = {}
    for replica in sorted(replicas, key=lambda replica: replica.name):
        groups.setdefault(replica.holders, []).append(replica)
    shares = {}
    for holders, members in groups.items():
        total = sum(member.box.volume * member.item_bytes for member in members)
        mine = holders.index(rank)
        low, high = (index * total // len(holders) for index in (mine, mine + 1))
        begin = 0
        for member in members:
            shares[member.name] = _share(member, begin, low, high, last=mine == len(holders) - 1)
            begin += member.box.volume * member.item_bytes
    for name in sorted(shares):
        yield name, shares[name]


def _share(replica: Replica, begin: int, low: int, high: int, *, last: bool) -> Box | None:
    """Rows of one replica between the byte cuts ``low`` and ``high``; its own bytes start at ``begin``."""
    box = replica.box
    size_bytes = box.volume * replica.item_bytes
    rows = box.size[0] if box.size else 1
    if size_bytes == 0:  # nothing to balance; the last holder keeps the shape
        return box if last else None

    def row_at(cut: int) -> int:
        if size_bytes < WHOLE_BELOW_BYTES:
            return rows if cut > begin else 0
        return min(max(-((begin - cut) * rows // size_bytes), 0), rows)

    first, stop = row_at(low), row_at(high)
    if stop <= first:
        return None
    if not box.size:
        return box
    return Box((box.start[0] + first, *box.start[1:]), (stop - first, *box.size[1:]))
