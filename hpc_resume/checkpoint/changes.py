"""What has changed since the checkpoint before: which blocks to write, and where the others lie.

Blocks whose checksum is the same are not written again; the new shard's index refers to the file that holds
them. It refers to the bytes themselves, never to another index, so reading costs one look-up however old they
are, and the manifest names every checkpoint that must be kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from hpc_resume.checkpoint.blocks import Partitions, count_checksums
from hpc_resume.checkpoint.image import Image, Piece, changed_image
from hpc_resume.checkpoint.index import Entry, Run
from hpc_resume.checkpoint.shard import Bytes, Job, ShardWriter


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

        Of segments only those are hashed in which a block differs.
        """
        old = np.frombuffer(base.checksums, np.uint64)
        table = old.copy()
        firsts = [0, *accumulate(count_checksums(cut) for cut in cuts)]
        blocks = [Job(first, piece, cut[0]) for first, piece, cut in zip(firsts, data, cuts, strict=False)]
        writer.hash(blocks, table)
        changed, segments, changed_bytes = [], [], 0
        for job, cut in zip(blocks, cuts, strict=True):
            last = job.first + len(cut[0]) - 1
            flags = table[job.first : last] != old[job.first : last]
            changed.append(flags)
            if flags.any():
                changed_bytes += int(np.diff(cut[0])[flags].sum())
                segments += list(_touched_segments(job, cut, flags))
        writer.hash(segments, table)
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


def _touched_segments(job: Job, cut: Partitions, flags: npt.NDArray[np.bool_]) -> Iterator[Job]:
    """Give the segments of a piece in which a block differs; ``job`` are its blocks."""
    if len(cut) == 1:
        return
    blocks, segments = cut
    first = job.first + len(blocks) - 1
    touched = {bisect_right(segments, blocks[number]) - 1 for number in np.flatnonzero(flags).tolist()}
    for number in sorted(touched):
        yield Job(first + number, job.piece, segments[number : number + 2])


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
