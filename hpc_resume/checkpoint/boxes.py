"""Boxes: axis-aligned pieces of tensors. Sharding, replicas and resharding are arithmetic on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


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
        """Return the box that is the whole tensor; one object for all tensors of a shape."""
        return _whole(tuple(shape))

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


#: So many boxes are compared pair by pair; more must be told apart by cuts.
_FEW = 32
#: How often boxes are cut apart. Meshes cut a tensor once a dimension, if that.
_MAX_CUTS = 16


@lru_cache(maxsize=1 << 14)
def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes tile a tensor: every element in exactly one of them.

    Boxes are told apart by cuts through the whole tensor, as meshes make them, which takes little more than
    sorting them. More than :data:`_FEW` that can't be cut apart count as no tiling: comparing all with all
    would take as long as somebody wants who made them up.
    """
    if sum(box.volume for box in boxes) != math.prod(shape) or not all(box.within(shape) for box in boxes):
        return False
    groups = [([box for box in boxes if box.volume], 0)]
    while groups:
        group, depth = groups.pop()
        parts = _cut(group) if len(group) > 1 and depth < _MAX_CUTS else []
        if len(parts) > 1:
            groups += [(part, depth + 1) for part in parts]
        elif len(group) > _FEW or any(a.intersect(b) for a, b in itertools.combinations(group, 2)):
            return False
    return True


def _cut(boxes: list[Box]) -> list[list[Box]]:
    """Cut boxes apart in the first dimension in which a cut goes through none of them."""
    for dim in range(len(boxes[0].start)):
        parts: list[list[Box]] = []
        reach = -1
        for box in sorted(boxes, key=lambda box: box.start[dim]):
            if box.start[dim] >= reach:
                parts.append([])
            parts[-1].append(box)
            reach = max(reach, box.start[dim] + box.size[dim])
        if len(parts) > 1:
            return parts
    return []
