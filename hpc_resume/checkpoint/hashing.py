"""What is hashed of a shard, and in which order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpc_resume.checkpoint.blocks import SEGMENT_BYTES, Edges, Partitions

#: Bytes of a tensor as one flat array; the writer reads it and nothing else.
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Job:
    """Stretches of a piece to be hashed.

    Parameters
    ----------
    first
        Place of the first checksum in the table.
    piece
        The bytes.
    edges
        Where the stretches begin, and where the last one ends.
    """

    first: int
    piece: Bytes
    edges: Sequence[int]

    @property
    def last(self) -> int:
        """Place one past the last checksum."""
        return self.first + len(self.edges) - 1


def jobs_of(data: Sequence[Bytes], cuts: Sequence[Partitions]) -> Iterator[Job]:
    """List what is to be hashed of all pieces: of each its blocks, then its segments."""
    first = 0
    for piece, cut in zip(data, cuts, strict=True):
        for edges in cut:
            yield Job(first, piece, edges)
            first += len(edges) - 1


def shares(jobs: Sequence[Job], count: int, most_bytes: int) -> list[list[Job]]:
    """Cut jobs into shares of at most about so many bytes, and at least one for each thread."""
    found: list[list[Job]] = [[]]
    total = sum(job.edges[-1] - job.edges[0] for job in jobs)
    goal = max(min(most_bytes, total // count), 1)
    filled = 0
    for job in jobs:
        edges, first = job.edges, 0
        while first < len(edges) - 1:
            last = min(max(bisect_right(edges, edges[first] + goal - filled), first + 1), len(edges) - 1)
            found[-1].append(Job(job.first + first, job.piece, edges[first : last + 1]))
            filled += edges[last] - edges[first]
            if filled >= goal:
                found.append([])
                filled = 0
            first = last
    return [share for share in found if share]


class Order:
    """The blocks and segments of all pieces of a shard by their places in the file; depends on no values.

    Parameters
    ----------
    extents
        Offset and length of each piece in the file.
    cuts
        The blocks and segments of each piece.
    """

    def __init__(self, extents: Sequence[tuple[int, int]], cuts: Sequence[Partitions]) -> None:
        self.cuts = cuts
        #: Pieces of one block, of which there may be very many: where they begin, their numbers, their checksums' places.
        self._single: list[tuple[int, int, int]] = []
        self._others: list[tuple[int, int, list[tuple[int, Edges]]]] = []
        place = 0
        for number, ((start, _), cut) in enumerate(zip(extents, cuts, strict=True)):
            if len(cut) == 1:
                self._single.append((start, number, place))
                place += 1
                continue
            firsts = []
            for edges in cut:
                firsts.append((place, edges))
                place += len(edges) - 1
            self._others.append((start, number, firsts))
        self._single.sort()
        self._others.sort(key=lambda other: other[0])
        self._single_starts = [start for start, _, _ in self._single]
        self._other_starts = [start for start, _, _ in self._others]

    def within(self, begin: int, end: int, data: Sequence[Bytes]) -> Iterator[tuple[int, memoryview]]:
        """Give what begins in a range of the file, with the places of the checksums.

        The blocks and segments of a mebibyte come one after the other: it is read from memory once, and then from
        the cache.
        """
        for low in range(begin, end, SEGMENT_BYTES):
            high = min(low + SEGMENT_BYTES, end)
            starts = self._single_starts
            for _, number, place in self._single[bisect_left(starts, low) : bisect_left(starts, high)]:
                yield place, data[number].data
            for at in range(max(bisect_right(self._other_starts, low) - 1, 0), len(self._others)):
                start, number, parts = self._others[at]
                if start >= high:
                    break
                view = data[number].data
                for first, edges in parts:
                    turn = bisect_left(edges, low - start)
                    while turn < len(edges) - 1 and start + edges[turn] < high:
                        yield first + turn, view[edges[turn] : edges[turn + 1]]
                        turn += 1
