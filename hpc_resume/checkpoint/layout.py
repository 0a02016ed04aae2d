"""Layouts: how a tensor is spread over ranks, as arithmetic that any process can redo for any rank.

A layout says which ranks form a mesh and which of its dimensions split which dimensions of the tensor. The
box of every rank follows from it, so a checkpoint that thousands of ranks write records a layout once instead
of a box for every rank and tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.files import JsonObject
from hpc_resume.untrusted import brief

#: Dimensions of a mesh; PyTorch has no use for as many.
_MAX_MESH_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Layout:
    """A mesh of ranks, and the dimensions of a tensor that it splits.

    Each split cuts what the splits before it have left into ``k`` chunks of ``ceil(n / k)`` indices, as
    ``torch.chunk`` does; the last chunks may be smaller or empty. Ranks that differ only in mesh dimensions
    that split nothing hold the same box.

    Parameters
    ----------
    mesh
        Extent of each mesh dimension.
    ranks
        The ranks in row-major order.
    splits
        ``(mesh dimension, tensor dimension)``, in the order in which they are applied.

    Raises
    ------
    ValueError
        If it contradicts itself.
    """

    mesh: tuple[int, ...]
    ranks: tuple[int, ...]
    splits: tuple[tuple[int, int], ...] = ()
    _place: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Before they are multiplied: numbers of any length can stand in a file.
        if len(self.mesh) > _MAX_MESH_DIMENSIONS or any(not 1 <= n <= len(self.ranks) for n in self.mesh):
            raise ValueError(f"a mesh of {brief(self.mesh)} has not {len(self.ranks)} ranks")
        if math.prod(self.mesh) != len(self.ranks):
            raise ValueError(f"a mesh of {self.mesh} has not {len(self.ranks)} ranks")
        dims = [mesh_dim for mesh_dim, _ in self.splits]
        if len(set(dims)) != len(dims) or any(not 0 <= dim < len(self.mesh) for dim in dims):
            raise ValueError(f"splits {brief(self.splits)} of a mesh of {len(self.mesh)} dimensions")
        if any(dim < 0 for _, dim in self.splits):
            raise ValueError(f"splits {brief(self.splits)}")
        place = {rank: index for index, rank in enumerate(self.ranks)}
        if len(place) != len(self.ranks) or min(self.ranks) < 0:
            raise ValueError("a rank stands twice in a mesh, or is negative")
        object.__setattr__(self, "_place", place)

    @classmethod
    def replicated(cls, ranks: Sequence[int]) -> Layout:
        """Return the layout of a tensor that all these ranks hold whole."""
        return cls((len(ranks),), tuple(ranks))

    @property
    def groups(self) -> int:
        """Number of different boxes."""
        return math.prod(self.mesh[mesh_dim] for mesh_dim, _ in self.splits)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has the dimensions that are split."""
        return not self.splits or all(dim < len(shape) for _, dim in self.splits)

    def group_of(self, rank: int) -> int | None:
        """Give the number of the box that a rank holds; None if it is not in the mesh."""
        place = self._place.get(rank)
        if place is None:
            return None
        coordinate = _unravel(place, self.mesh)
        group = 0
        for mesh_dim, _ in self.splits:
            group = group * self.mesh[mesh_dim] + coordinate[mesh_dim]
        return group

    def holders(self, group: int) -> tuple[int, ...]:
        """Ranks that hold a box, ascending."""
        if not self.splits:
            return tuple(sorted(self.ranks))
        fixed = dict(zip((mesh_dim for mesh_dim, _ in self.splits), self._digits(group), strict=True))
        choices = [(fixed[dim],) if dim in fixed else range(extent) for dim, extent in enumerate(self.mesh)]
        places = (_ravel(coordinate, self.mesh) for coordinate in itertools.product(*choices))
        return tuple(sorted(self.ranks[place] for place in places))

    def box(self, shape: Sequence[int], group: int) -> Box:
        """Box with a number, of a tensor of a shape; may be empty."""
        start, size = [0] * len(shape), list(shape)
        for (mesh_dim, dim), digit in zip(self.splits, self._digits(group), strict=True):
            first, last = _chunk(size[dim], self.mesh[mesh_dim], digit)
            start[dim] += first
            size[dim] = last - first
        return Box(tuple(start), tuple(size))

    def overlapping(self, shape: Sequence[int], want: Box) -> Iterator[tuple[int, Box]]:
        """Give the boxes that share elements with ``want``, with their numbers, without looking at the others."""

        def descend(depth: int, group: int, start: list[int], size: list[int]) -> Iterator[tuple[int, Box]]:
            if depth == len(self.splits):
                yield group, Box(tuple(start), tuple(size))
                return
            mesh_dim, dim = self.splits[depth]
            parts = self.mesh[mesh_dim]
            chunk = -(-size[dim] // parts)
            low = max(want.start[dim] - start[dim], 0)
            high = min(want.start[dim] + want.size[dim] - start[dim], size[dim])
            if low >= high:
                return
            for digit in range(low // chunk, (high - 1) // chunk + 1):
                first, last = _chunk(size[dim], parts, digit)
                child_start, child_size = list(start), list(size)
                child_start[dim] += first
                child_size[dim] = last - first
                yield from descend(depth + 1, group * parts + digit, child_start, child_size)

        if want.volume and math.prod(shape):
            yield from descend(0, 0, [0] * len(shape), list(shape))

    def spread_over(self, larger: Layout) -> Layout | None:
        """Give the layout that is this one on every slice of a larger mesh like the one that it lies on.

        Under FSDP over tensor parallelism, what tensor parallelism leaves alone is sharded on the other mesh
        dimension only: each rank says so of its own slice of the mesh, and all slices hold the same.

        Returns
        -------
        Layout or None
            None if these ranks are no slice of the larger mesh, or all of it.
        """
        places = [larger._place.get(rank, -1) for rank in self.ranks]
        if min(places) < 0 or len(places) == len(larger.ranks):
            return None
        coordinates = [_unravel(place, larger.mesh) for place in places]
        varying = [len(set(digits)) > 1 for digits in zip(*coordinates, strict=True)]
        along = [range(n) if varies else range(1) for n, varies in zip(larger.mesh, varying, strict=True)]
        across = [range(1) if varies else range(n) for n, varies in zip(larger.mesh, varying, strict=True)]
        slices = []
        for base in itertools.product(*across):
            places = [
                _ravel([a + b for a, b in zip(base, step, strict=True)], larger.mesh)
                for step in itertools.product(*along)
            ]
            slices.append(tuple(larger.ranks[place] for place in places))
        if self.ranks not in slices:
            return None
        splits = tuple((mesh_dim + 1, dim) for mesh_dim, dim in self.splits)
        return Layout((len(slices), *self.mesh), tuple(itertools.chain(*slices)), splits)

    def to_json(self) -> JsonObject:
        """JSON form; runs of consecutive ranks are written as ``[first, count]``."""
        runs: list[list[int]] = []
        for rank in self.ranks:
            if runs and rank == sum(runs[-1]):
                runs[-1][1] += 1
            else:
                runs.append([rank, 1])
        return {"mesh": list(self.mesh), "ranks": runs, "splits": [list(split) for split in self.splits]}

    @classmethod
    def from_json(
        cls, record: Mapping[str, Any], *, world_size: int, most_ranks: int | None = None
    ) -> Layout:
        """From JSON; see :meth:`to_json`.

        Parameters
        ----------
        record
            The layout.
        world_size
            Ranks that there are.
        most_ranks
            Ranks that it may have, if not all.

        Raises
        ------
        ValueError, TypeError, KeyError
            If it is none, or names a rank that there is not.
        """
        if not all(isinstance(record[key], list) for key in ("mesh", "ranks", "splits")):
            raise TypeError("a layout whose mesh, ranks or splits are no list")
        ranks: list[int] = []
        most = world_size if most_ranks is None else min(world_size, most_ranks)
        for first, count in record["ranks"]:
            if type(first) is not int or type(count) is not int or first < 0 or count < 1:
                raise ValueError(f"ranks {brief(first)}, {brief(count)}")
            if first + count > world_size or len(ranks) + count > most:
                raise ValueError(f"{brief(count)} ranks from {brief(first)} of {world_size}: too many")
            ranks += range(first, first + count)
        mesh = tuple(record["mesh"])
        splits = tuple((mesh_dim, dim) for mesh_dim, dim in record["splits"])
        if any(type(value) is not int for value in (*mesh, *itertools.chain(*splits))):
            raise TypeError("a layout of something else than numbers")
        return cls(mesh, tuple(ranks), splits)

    def _digits(self, group: int) -> tuple[int, ...]:
        return _unravel(group, [self.mesh[mesh_dim] for mesh_dim, _ in self.splits])


def _unravel(place: int, extents: Sequence[int]) -> tuple[int, ...]:
    """Coordinates of a place in row-major order."""
    digits = []
    for extent in reversed(extents):
        place, digit = divmod(place, extent)
        digits.append(digit)
    return tuple(reversed(digits))


def _ravel(coordinate: Sequence[int], extents: Sequence[int]) -> int:
    """Place of coordinates in row-major order."""
    place = 0
    for digit, extent in zip(coordinate, extents, strict=True):
        place = place * extent + digit
    return place


def spread(layouts: Iterable[Layout]) -> dict[Layout, Layout]:
    """Spread layouts on slices of meshes over the whole meshes, as far as others of them show those.

    Every rank of a mesh comes to the same layout, whichever slice of it is its own.

    Parameters
    ----------
    layouts
        Of all tensors that are sharded on a rank.

    Returns
    -------
    dict
        For each of them what it is instead, or itself.
    """
    known = sorted(set(layouts), key=lambda each: (len(each.ranks), each.mesh, each.ranks, each.splits))
    found = {}
    for layout in known:
        current = layout
        for larger in known:
            if len(larger.ranks) > len(current.ranks):
                current = current.spread_over(larger) or current
        found[layout] = current
    return found


def _chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """First index of a chunk, and one past its last."""
    chunk = -(-extent // parts)
    return min(index * chunk, extent), min((index + 1) * chunk, extent)


#: A replicated tensor smaller than this is stored whole by one of its holders.
WHOLE_BELOW_BYTES = 64 * 1024


def split_replicas(
    members: Sequence[tuple[str, Box, int]], holders: Sequence[int]
) -> dict[str, list[tuple[int, Box]]]:
    """Say who stores what of the boxes that the same ranks hold alike.

    The boxes are laid end to end in the order given and cut into as many equal byte ranges as there are
    holders; cuts are moved to whole rows, and past tensors under :data:`WHOLE_BELOW_BYTES`. Everybody computes
    the same cuts, so nobody has to talk, and the shares differ by at most a row or a small tensor.

    Parameters
    ----------
    members
        Name, box and bytes of an element, of each tensor.
    holders
        The ranks, ascending.

    Returns
    -------
    dict
        By name, the shares in order: the rank that stores it, and its box.
    """
    sizes = [box.volume * item_bytes for _, box, item_bytes in members]
    total, count = sum(sizes), len(holders)
    shares: dict[str, list[tuple[int, Box]]] = {}
    begin = 0
    for (name, box, _), size_bytes in zip(members, sizes, strict=True):
        found = shares.setdefault(name, [])
        if size_bytes:
            # The holder whose range [i * total // count, (i + 1) * total // count) has the first byte.
            owner = ((begin + 1) * count - 1) // total
            if size_bytes < WHOLE_BELOW_BYTES:
                found.append((holders[owner], box))
            else:
                found += _cut_rows(box, size_bytes, begin, total, holders, owner)
        begin += size_bytes
    return shares


def _cut_rows(
    box: Box, size_bytes: int, begin: int, total: int, holders: Sequence[int], owner: int
) -> Iterator[tuple[int, Box]]:
    """Cut one box at the byte cuts that fall into it, moved up to whole rows."""
    rows = box.size[0]
    first = 0
    while first < rows:
        cut = (owner + 1) * total // len(holders) - begin
        last = rows if owner == len(holders) - 1 else min(-(-cut * rows // size_bytes), rows)
        if last > first:
            yield holders[owner], Box((box.start[0] + first, *box.start[1:]), (last - first, *box.size[1:]))
        first, owner = max(first, last), owner + 1
