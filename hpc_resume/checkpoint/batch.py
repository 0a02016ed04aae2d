"""Small boxes that are wanted of one shard, read together: thousands of them cost little more than their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.index import Kind, Numbers
from hpc_resume.checkpoint.shardfile import ShardFile
from hpc_resume.checkpoint.structure import TensorRecord

if TYPE_CHECKING:
    import torch

#: Boxes that lie this close together are read in one go ...
_GAP_BYTES = 4096
#: ... up to so many bytes.
_GROUP_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class Group:
    """Boxes that lie side by side in one file, in this order.

    Parameters
    ----------
    file
        By its number in the index.
    places
        Of the boxes in the batch.
    begins, ends
        Of the boxes in the file.
    """

    file: int
    places: Numbers
    begins: Numbers
    ends: Numbers


class Batch:
    """Small boxes of one shard: of one block each, and so of one run.

    Parameters
    ----------
    file
        The shard.
    """

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self._numbers: list[int] = []
        self._outs: list[torch.Tensor] = []
        self._slices: dict[int, tuple[slice, ...]] = {}
        self._records: dict[int, TensorRecord] = {}

    def add(self, number: int, out: torch.Tensor, part: tuple[slice, ...] | None = None) -> None:
        """Add a box of the index, or a part of it."""
        if part is not None:
            self._slices[len(self._numbers)] = part
        self._numbers.append(number)
        self._outs.append(out)

    def add_whole(self, name: str, record: TensorRecord, out: torch.Tensor) -> bool:
        """Add a tensor that is stored whole; False if the index has another one, or none, of its name."""
        index = self._file.index
        number = index.number_of(name)
        if number is None:
            return False
        kind = index.kind_of[number]
        if self._records.get(kind) is not record:
            if not _is_whole(index.kinds[kind], record):
                return False
            self._records[kind] = record
        self._numbers.append(number)
        self._outs.append(out)
        return True

    def groups(self) -> Iterator[Group]:
        """Group what lies close together."""
        index = self._file.index
        runs = index.first_run[np.array(self._numbers, np.int64)]
        files, begins = index.run_files[runs], index.run_offsets[runs]
        order = np.lexsort((begins, files))
        files, begins = files[order], begins[order]
        ends = begins + index.run_lengths[runs][order]
        apart = (files[1:] != files[:-1]) | (begins[1:] - ends[:-1] > _GAP_BYTES)
        for first, last in pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]):
            low = first
            while low < last:
                room = int(np.searchsorted(ends[low:last], begins[low] + _GROUP_BYTES, side="right"))
                high = low + max(room, 1)
                yield Group(int(files[low]), order[low:high], begins[low:high], ends[low:high])
                low = high

    def read(self, group: Group) -> int:
        """Read a group, verify it, and put it where it belongs; returns bytes read."""
        import torch

        begin = int(group.begins[0])
        raw = torch.empty(int(group.ends.max()) - begin, dtype=torch.uint8)
        data = raw.numpy().data
        self._file.read(group.file, begin, data)
        numbers = [self._numbers[place] for place in group.places.tolist()]
        lows, highs = group.begins - begin, group.ends - begin
        spans = zip(lows.tolist(), highs.tolist(), strict=True)
        self._file.verify(numbers, [xxhash.xxh3_64_intdigest(data[low:high]) for low, high in spans])
        targets = [self._outs[place] for place in group.places.tolist()]
        with torch.no_grad():
            torch._foreach_copy_(targets, self._sources(group, numbers, raw, lows, highs))
        return len(raw)

    def _sources(
        self, group: Group, numbers: Sequence[int], raw: torch.Tensor, lows: Numbers, highs: Numbers
    ) -> list[torch.Tensor]:
        """View what was read as what is wanted of it."""
        index = self._file.index
        kinds = (index.kinds[index.kind_of[number]] for number in numbers)
        typed: dict[str, tuple[int, torch.Tensor]] = {}
        sources = []
        for kind, low, high in zip(kinds, lows.tolist(), highs.tolist(), strict=True):
            if kind.dtype not in typed:
                item = dtypes.item_bytes(kind.dtype)
                typed[kind.dtype] = item, as_type(raw, 0, len(raw) // item * item, kind.dtype)
            item, whole = typed[kind.dtype]
            flat = as_type(raw, low, high, kind.dtype) if low % item else whole[low // item : high // item]
            size = kind.box.size
            sources.append(flat if len(size) == 1 else flat.view(size))
        if self._slices:
            for at, place in enumerate(group.places.tolist()):
                if (part := self._slices.get(place)) is not None:
                    sources[at] = sources[at][part]
        return sources


def _is_whole(kind: Kind, record: TensorRecord) -> bool:
    return (
        kind.shape == record.shape
        and kind.dtype == record.dtype
        and kind.box.size == record.shape  # within its shape, so it begins at 0
    )


def as_type(raw: torch.Tensor, low: int, high: int, dtype: str) -> torch.Tensor:
    """View a stretch of bytes as a flat tensor; a copy where it is not aligned for the type."""
    part = raw[low:high]
    if low % dtypes.item_bytes(dtype):  # memory itself is aligned for any type
        part = part.clone()
    return part.view(dtypes.torch_dtype(dtype))
