"""What has changed since the checkpoint before: which blocks to write, and where the others lie.

Blocks whose checksum is the same are not written again; the new shard's index refers to the file that holds
them. It refers to the bytes themselves, never to another index, so reading costs one look-up however old they
are, and the manifest names every checkpoint that must be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hpc_resume.checkpoint.image import Image, Piece, changed_image
from hpc_resume.checkpoint.index import Entry, Run
from hpc_resume.checkpoint.shard import Bytes


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
        Of all its blocks.
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
    """A comparison of a snapshot's checksums with those of its base.

    Parameters
    ----------
    base
        What it was compared with.
    changed
        For each block whether it differs.
    changed_bytes, total_bytes
        Of the blocks that differ, and of all.
    """

    base: Base
    changed: npt.NDArray[np.bool_]
    changed_bytes: int
    total_bytes: int

    @classmethod
    def since(cls, base: Base, table: bytes, edges: Sequence[Sequence[int]]) -> Changes:
        """Compare checksums with those of a base."""
        changed = np.frombuffer(table, np.uint64) != np.frombuffer(base.checksums, np.uint64)
        lengths = np.concatenate([np.diff(each) for each in edges]) if edges else np.zeros(0, np.int64)
        return cls(
            base=base,
            changed=changed,
            changed_bytes=int(lengths[changed].sum()),
            total_bytes=int(lengths.sum()),
        )

    def shard(self, data: Sequence[Bytes], edges: Sequence[Sequence[int]]) -> tuple[Image, list[Bytes]]:
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
        position, first = 0, 0
        for entry, piece, marks in zip(base.image.entries, data, edges, strict=True):
            runs: list[Run] = []
            flags = self.changed[first : first + len(marks) - 1]
            first += len(marks) - 1
            for low, high, differs in _stretches(flags, marks):
                if differs:
                    own.append(piece[low:high])
                    runs.append(Run(0, position, high - low))
                    position += high - low
                else:
                    runs += _older(base, entry, low, high, files)
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

        return changed_image(position, entries_at, tuple(files), len(self.changed)), own


def _stretches(flags: npt.NDArray[np.bool_], marks: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Merge neighbouring blocks that are alike: byte range, and whether they differ from the base."""
    turns = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return [(marks[low], marks[high], bool(flags[low])) for low, high in pairwise(turns) if low < high]


def _older(base: Base, entry: Entry, low: int, high: int, files: dict[tuple[str, str], int]) -> list[Run]:
    """Where bytes ``low`` to ``high`` of a box lie by the base's index."""
    found = []
    position = 0
    for run in entry.runs:
        begin, end = max(low, position), min(high, position + run.length)
        if begin < end:
            holder = (base.checkpoint, base.file) if run.file == 0 else base.image.files[run.file - 1]
            number = files.setdefault(holder, len(files) + 1)
            found.append(Run(number, run.offset + begin - position, end - begin))
        position += run.length
    return found
