"""The structure of a state: every global tensor, and by rule which rank stores which box of it.

All ranks that hold a tensor describe it alike, so planning needs no communication; and a reader redoes the same
arithmetic, so a manifest records a tensor once, however many ranks have written it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint.blocks import panels
from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.checkpoint.layout import Layout, split_replicas
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject

MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One global tensor.

    Parameters
    ----------
    shape, dtype
        Of the whole tensor; the element type by its name in manifests.
    layout
        How ranks hold it; None if ``pieces`` says so.
    pieces
        Which rank stores which box, where no layout describes it.

    Raises
    ------
    IntegrityError
        If it contradicts itself, or its pieces do not tile the tensor exactly once.
    """

    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    pieces: tuple[tuple[int, Box], ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_DIMENSIONS or any(extent < 0 for extent in self.shape):
            raise IntegrityError(f"no shape of a tensor: {list(self.shape)}")
        if math.prod(self.shape) * item_bytes(self.dtype) >= 1 << 62:
            raise IntegrityError(f"a tensor of shape {list(self.shape)} is larger than any file")
        if self.layout is None:
            if not covers_once(self.shape, [box for _, box in self.pieces]):
                raise IntegrityError(
                    f"the boxes do not tile a tensor of shape {list(self.shape)} exactly once"
                )
        elif self.pieces or not self.layout.fits(self.shape):
            raise IntegrityError(f"a layout does not fit a tensor of shape {list(self.shape)}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return item_bytes(self.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * item_bytes(self.dtype)


class Structure:
    """The global tensors of a checkpoint.

    Parameters
    ----------
    tensors
        By name.
    """

    def __init__(self, tensors: Mapping[str, TensorRecord]) -> None:
        self.tensors: dict[str, TensorRecord] = dict(sorted(tensors.items()))
        self._shares: dict[tuple[int, ...], dict[str, list[tuple[int, Box]]]] = {}
        self._by_layout: dict[Layout, list[str]] | None = None
        self._digest: str | None = None

    def __eq__(self, other: object) -> bool:
        return self.tensors == other.tensors if isinstance(other, Structure) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """32 hex digits of SHA-256: equal for equal structures."""
        if self._digest is None:
            text = json.dumps(self.to_json(), separators=(",", ":"))
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._digest

    def stored_by(self, rank: int) -> Iterator[tuple[str, Box]]:
        """Give what a rank stores, by name; a tensor without elements is stored by nobody."""
        held: dict[Layout | None, tuple[int, tuple[int, ...]] | None] = {None: None}
        for name, record in self.tensors.items():
            layout = record.layout
            if layout is not None and layout not in held:
                group = layout.group_of(rank)
                held[layout] = None if group is None else (group, layout.holders(group))
            for owner, box in self._shares_of(name, record, rank, held[layout]):
                if owner == rank and box.volume:
                    for panel in _panels(record, box):
                        yield name, panel

    def _shares_of(
        self, name: str, record: TensorRecord, rank: int, held: tuple[int, tuple[int, ...]] | None
    ) -> Iterable[tuple[int, Box]]:
        """Who stores what of the box that a rank holds; ``held`` are the box's number and its holders."""
        if record.layout is None:
            return record.pieces
        if held is None:
            return ()
        group, holders = held
        if len(holders) == 1:
            return ((rank, record.layout.box(record.shape, group)),)
        return self._replicas(holders).get(name, ())

    def parts(self, name: str, want: Box) -> Iterator[tuple[int, Box]]:
        """Give the stored boxes that share elements with a box, each with the rank that stores it."""
        record = self.tensors[name]
        if record.layout is None:
            for owner, box in record.pieces:
                if box.intersect(want) is not None:
                    yield owner, box
            return
        for group, held in record.layout.overlapping(record.shape, want):
            holders = record.layout.holders(group)
            shares = self._replicas(holders)[name] if len(holders) > 1 else ((holders[0], held),)
            for owner, box in shares:
                if box.intersect(want) is not None:
                    for panel in _panels(record, box):
                        if panel.intersect(want) is not None:
                            yield owner, panel

    def _replicas(self, holders: tuple[int, ...]) -> dict[str, list[tuple[int, Box]]]:
        """Who stores what of all that these ranks hold together, by name."""
        if holders not in self._shares:
            if self._by_layout is None:
                self._by_layout = {}
                for name, record in self.tensors.items():
                    if record.layout is not None:
                        self._by_layout.setdefault(record.layout, []).append(name)
            members = []
            for layout, names in self._by_layout.items():
                group = layout.group_of(holders[0])
                if group is None or layout.holders(group) != holders:
                    continue
                for name in names:
                    record = self.tensors[name]
                    members.append((name, layout.box(record.shape, group), record.item_bytes))
            self._shares[holders] = split_replicas(sorted(members, key=lambda member: member[0]), holders)
        return self._shares[holders]

    def to_json(self) -> JsonObject:
        """JSON form: each layout once, tensors by name."""
        layouts: dict[Layout, int] = {}
        tensors: JsonObject = {}
        for name, record in self.tensors.items():
            entry: JsonObject = {"shape": list(record.shape), "dtype": record.dtype}
            if record.layout is not None:
                entry["layout"] = layouts.setdefault(record.layout, len(layouts))
            else:
                entry["pieces"] = [[owner, list(box.start), list(box.size)] for owner, box in record.pieces]
            tensors[name] = entry
        return {"layouts": [layout.to_json() for layout in layouts], "tensors": tensors}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, world_size: int) -> Structure:
        """From JSON; see :meth:`to_json`.

        Raises
        ------
        IntegrityError, ValueError, TypeError, LookupError
            If it is none.
        """
        layouts = [Layout.from_json(layout, world_size=world_size) for layout in record["layouts"]]
        tensors = {}
        for name, entry in record["tensors"].items():
            shape = integers(entry["shape"])
            dtype = entry["dtype"]
            if "layout" in entry:
                number = integer(entry["layout"])
                if not 0 <= number < len(layouts):
                    raise IntegrityError(f"{name}: layout {number} of {len(layouts)}")
                tensors[name] = TensorRecord(shape, dtype, layouts[number])
                continue
            pieces = []
            for owner, start, size in entry["pieces"]:
                if not 0 <= integer(owner) < world_size:
                    raise IntegrityError(f"{name}: a box of rank {owner} of {world_size}")
                pieces.append((owner, Box(integers(start), integers(size))))
            tensors[name] = TensorRecord(shape, dtype, None, tuple(pieces))
        return cls(tensors)


def _panels(record: TensorRecord, box: Box) -> Iterator[Box]:
    if record.layout is None or not record.layout.splits:
        return iter((box,))
    return panels(record.shape, box, record.item_bytes, [dim for _, dim in record.layout.splits])


def merge(structures: Sequence[Structure]) -> Structure:
    """Put the structures together that different ranks have (pipeline stages, say).

    Raises
    ------
    IntegrityError
        If two of them describe one tensor differently.
    """
    if len(structures) == 1:
        return structures[0]
    tensors: dict[str, TensorRecord] = {}
    for structure in structures:
        for name, record in structure.tensors.items():
            if tensors.setdefault(name, record) != record:
                raise IntegrityError(
                    f"{name} is {_describe(tensors[name])} to some ranks and {_describe(record)} to others. What has "
                    "one name is one tensor: name the parts of a pipeline differently, and put what is replicated "
                    "on one mesh, or under DDP"
                )
    return Structure(tensors)


def _describe(record: TensorRecord) -> str:
    if record.layout is None:
        return f"{record.dtype} {list(record.shape)}"
    ranks = ", ".join(map(str, sorted(record.layout.ranks)[:8])) + ", …" * (len(record.layout.ranks) > 8)
    split = f" split in dimensions {[dim for _, dim in record.layout.splits]}" * bool(record.layout.splits)
    return f"{record.dtype} {list(record.shape)} on ranks {ranks}{split}"


def integer(value: Any) -> int:
    """Return a 64-bit integer as it is; anything else from a file is a TypeError."""
    if type(value) is not int or abs(value) >= 1 << 63:
        raise TypeError(f"{value!r:.40} is no 64-bit integer")
    return value


def integers(values: Any) -> tuple[int, ...]:
    """Return a list of 64-bit integers as a tuple; see :func:`integer`."""
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.40} is no list")
    return tuple(integer(value) for value in values)


def string(value: Any) -> str:
    """Return a string as it is; anything else from a file is a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no string")
    return value
