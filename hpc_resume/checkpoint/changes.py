"""What has changed since the checkpoint before: which blocks to write, and where the others lie.

Blocks whose checksum is the same are not written again; the new shard's index refers to the file that holds
them. It refers to the bytes themselves, never to another index, so reading costs one look-up however old they
are, and the manifest names every checkpoint that must be kept.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from hpc_resume.checkpoint.blocks import Edges, Partitions, count_checksums
from hpc_resume.checkpoint.hashing import Bytes, Job
from hpc_resume.checkpoint.image import Image, Piece, changed_image
from hpc_resume.checkpoint.index import Entry, Run
from hpc_resume.checkpoint.shard import ShardWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A committed shard that a later one may refer to.

    Parameters
    ----------
    checkpoint, file
        Where it is.
    pieces
        What it holds; only a snapshot of the very same pieces can refer to it.
    image
        Its layout, with the index.
    checksums
        Of all its blocks and segments.
    """

    checkpoint: str
    file: str
    pieces: tuple[Piece, ...]
    image: Image
    checksums: bytes

    @property
    def refers(self) -> set[str]:
        """Names of the checkpoints whose bytes a shard that refers to this one may need."""
        return {self.checkpoint, *(checkpoint for checkpoint, _ in self.image.files)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """A comparison of a snapshot with its base.

    Parameters
    ----------
    base
        What it was compared with.
    checksums
        Of the snapshot's blocks and segments.
    changed
        For each piece, which of its blocks differ.
    changed_bytes, total_bytes
        Of the blocks that differ, and of all.
    """

    base: Base
    checksums: bytes
    changed: tuple[npt.NDArray[np.bool_], ...]
    changed_bytes: int
    total_bytes: int

    @classmethod
    def since(
        cls, base: Base, writer: ShardWriter, data: Sequence[Bytes], cuts: Sequence[Partitions]
    ) -> Changes:
        """Hash a snapshot and compare it with a base.

        Segments first: of blocks only those are hashed that lie in a segment that differs.
        """
        old = np.frombuffer(base.checksums, np.uint64)
        table = old.copy()
        firsts = [0, *accumulate(count_checksums(cut) for cut in cuts)]
        coarse = [
            Job(first + count_checksums(cut[:-1]), piece, cut[-1])
            for first, piece, cut in zip(firsts, data, cuts, strict=False)
        ]
        writer.hash(coarse, table)
        touched = [table[job.first : job.last] != old[job.first : job.last] for job in coarse]
        blocks: list[Job] = []
        for first, job, cut, flags in zip(firsts, coarse, cuts, touched, strict=False):
            if len(cut) > 1 and flags.any():
                blocks += _blocks_of_segments(Job(first, job.piece, cut[0]), cut[1], flags)
        writer.hash(blocks, table)
        changed, changed_bytes = [], 0
        for first, cut in zip(firsts, cuts, strict=False):
            last = first + len(cut[0]) - 1
            flags = table[first:last] != old[first:last]
            changed.append(flags)
            if flags.any():
                changed_bytes += int(np.diff(cut[0])[flags].sum())
        return cls(
            base=base,
            checksums=table.tobytes(),
            changed=tuple(changed),
            changed_bytes=changed_bytes,
            total_bytes=sum(map(len, data)),
        )

    def shard(self, data: Sequence[Bytes], cuts: Sequence[Partitions]) -> tuple[Image, list[Bytes]]:
        """Lay out the shard that holds the changed bytes alone.

        Returns
        -------
        Image
            The file.
        list of arrays
            The changed bytes, in their order in it.
        """
        base = self.base
        files: dict[tuple[str, str], int] = {}
        own: list[Bytes] = []
        drafts: list[list[Run]] = []
        position = 0
        for entry, piece, cut, flags in zip(base.image.entries, data, cuts, self.changed, strict=True):
            older = _Older(base, entry, files)
            runs: list[Run] = []
            for low, high, differs in _stretches(flags, cut[0]):
                if differs:
                    own.append(piece[low:high])
                    runs.append(Run(0, position, high - low))
                    position += high - low
                else:
                    runs += older.runs(low, high)
            drafts.append(runs)

        def entries_at(offset: int) -> tuple[Entry, ...]:
            return tuple(
                Entry(
                    entry.name,
                    entry.dtype,
                    entry.shape,
                    entry.box,
                    tuple(run if run.file else Run(0, run.offset + offset, run.length) for run in runs),
                )
                for entry, runs in zip(base.image.entries, drafts, strict=True)
            )

        return changed_image(position, entries_at, tuple(files), len(self.checksums) // 8), own


def _blocks_of_segments(job: Job, segments: Edges, flags: npt.NDArray[np.bool_]) -> Iterator[Job]:
    """Give the blocks of a piece that lie in segments that differ; ``job`` are all of its blocks."""
    for number in np.flatnonzero(flags).tolist():
        low = bisect_left(job.edges, segments[number])
        high = bisect_left(job.edges, segments[number + 1])
        yield Job(job.first + low, job.piece, job.edges[low : high + 1])


def _stretches(flags: npt.NDArray[np.bool_], edges: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """Merge neighbouring blocks that are alike: byte range, and whether they differ from the base."""
    turns = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    for low, high in pairwise(turns):
        if low < high:
            yield edges[low], edges[high], bool(flags[low])


class _Older:
    """Where bytes of a box lie by the base's index."""

    def __init__(self, base: Base, entry: Entry, files: dict[tuple[str, str], int]) -> None:
        self._base = base
        self._runs = entry.runs
        self._starts = [0, *accumulate(run.length for run in entry.runs)]
        self._files = files

    def runs(self, low: int, high: int) -> Iterator[Run]:
        """Give the runs of bytes ``low`` to ``high``."""
        place = bisect_right(self._starts, low) - 1
        while low < high:
            run, start = self._runs[place], self._starts[place]
            end = min(high, start + run.length)
            base = self._base
            holder = (base.checkpoint, base.file) if run.file == 0 else base.image.files[run.file - 1]
            number = self._files.setdefault(holder, len(self._files) + 1)
            yield Run(number, run.offset + low - start, end - low)
            low = end
            place += 1
