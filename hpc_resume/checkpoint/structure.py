"""The structure of a state: every global tensor, and by rule which rank stores which box of it.

All ranks that hold a tensor describe it alike, so planning needs no communication; and a reader redoes the same
arithmetic, so a manifest records a tensor once, however many ranks have written it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from typing import Any

from hpc_resume.checkpoint.blocks import panels
from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.checkpoint.layout import Layout, split_replicas
from hpc_resume.checkpoint.names import check_names
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.untrusted import brief, check_text

MAX_DIMENSIONS = 64
#: Bytes of a tensor, not counting dimensions that are empty: PyTorch multiplies these without looking.
_MAX_TENSOR_BYTES = 1 << 62


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
        check_shape(self.shape, item_bytes(self.dtype))
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


@dataclass(frozen=True, slots=True)
class _Held:
    """Names of tensors by layout; by rank the layouts that it is in, and the boxes that no layout describes."""

    names: dict[Layout, list[str]]
    layouts: dict[int, list[Layout]]
    pieces: dict[int, list[tuple[str, Box]]]


@dataclass(frozen=True, slots=True)
class _Shares:
    """Who stores what of that which some ranks hold alike."""

    by_name: dict[str, list[tuple[int, Box]]]
    by_owner: dict[int, list[tuple[str, Box]]]


class Structure:
    """The global tensors of a checkpoint.

    Parameters
    ----------
    tensors
        By name.
    """

    def __init__(self, tensors: Mapping[str, TensorRecord]) -> None:
        names = sorted(tensors)
        self.tensors: dict[str, TensorRecord] = (
            dict(tensors) if names == list(tensors) else {name: tensors[name] for name in names}
        )
        self._shares: dict[tuple[int, ...], _Shares] = {}
        self._digest: str | None = None
        self._text: str | None = None
        #: Each layout once. By id first: one of thousands of ranks is not hashed for each tensor.
        by_id = {id(record.layout): record.layout for record in self.tensors.values()}
        self.layouts = {layout for layout in by_id.values() if layout is not None}

    def __eq__(self, other: object) -> bool:
        return self.tensors == other.tensors if isinstance(other, Structure) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def digest(self) -> str:
        """32 hex digits of SHA-256: equal for equal structures."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.to_text().encode()).hexdigest()[:32]
            _recent[self._digest] = self
            while len(_recent) > _KEPT:
                del _recent[next(iter(_recent))]
        return self._digest

    def to_text(self) -> str:
        """Write :meth:`to_json` as the members of a JSON object, a tensor a line; kept for the next time."""
        if self._text is None:
            record = self.to_json()
            layouts, kinds = (
                ",\n".join(f"  {_compact(each)}" for each in record[key]) for key in ("layouts", "kinds")
            )
            tensors = ",\n".join(f"  {_compact(name)}: {kind}" for name, kind in record["tensors"].items())
            self._text = (
                f' "layouts": [\n{layouts}\n ],\n "kinds": [\n{kinds}\n ],\n "tensors": {{\n{tensors}\n }}'
            )
        return self._text

    @property
    def placed(self) -> int:
        """Ranks of all layouts together."""
        return sum(len(layout.ranks) for layout in self.layouts)

    @staticmethod
    def known(digest: str) -> Structure | None:
        """Find a structure that this process has had to do with lately: it need not be parsed again."""
        return _recent.get(digest)

    def stored_by(self, rank: int) -> Iterator[tuple[str, Box]]:
        """Give what a rank stores, by name; a tensor without elements is stored by nobody.

        Only what it stores is looked at, and no sooner than it is asked for: all ranks together take as long as there
        are boxes.
        """
        held = self._held
        parts: list[Iterable[tuple[str, Box]]] = [held.pieces.get(rank, [])]
        known: set[tuple[int, ...]] = set()
        for layout in held.layouts.get(rank, ()):
            group = layout.group_of(rank)
            assert group is not None
            holders = layout.holders(group)
            if len(holders) == 1:
                parts.append(self._alone(layout, group))
            elif holders not in known:
                known.add(holders)
                parts.append(self._replicas(holders).by_owner[rank])
        for name, box in heapq.merge(*parts, key=itemgetter(0)):
            if box.volume:
                for panel in _panels(self.tensors[name], box):
                    yield name, panel

    def _alone(self, layout: Layout, group: int) -> Iterator[tuple[str, Box]]:
        """Give the boxes with a number of all tensors of a layout."""
        for name in self._held.names[layout]:
            yield name, layout.box(self.tensors[name].shape, group)

    def parts(self, name: str, want: Box) -> Iterator[tuple[int, Box]]:
        """Give the stored boxes that share elements with a box, each with the rank that stores it."""
        record = self.tensors[name]
        if record.layout is not None and len(record.layout.ranks) == 1 and not record.layout.splits:
            if want.volume:  # stored whole, in one piece: nothing to search
                yield record.layout.ranks[0], Box.whole(record.shape)
            return
        for owner, box in self._shares_near(name, record, want):
            if box.intersect(want) is not None:
                for panel in _panels(record, box):
                    if panel.intersect(want) is not None:
                        yield owner, panel

    def _shares_near(self, name: str, record: TensorRecord, want: Box) -> Iterator[tuple[int, Box]]:
        """Who stores what of the boxes that share elements with ``want``."""
        if record.layout is None:
            yield from record.pieces
            return
        for group, held in record.layout.overlapping(record.shape, want):
            holders = record.layout.holders(group)
            yield from self._replicas(holders).by_name[name] if len(holders) > 1 else ((holders[0], held),)

    def _replicas(self, holders: tuple[int, ...]) -> _Shares:
        """Who stores what of all that these ranks hold together."""
        if holders not in self._shares:
            members = []
            for layout, group in self._shared.get(holders, ()):
                for name, box in self._alone(layout, group):
                    members.append((name, box, self.tensors[name].item_bytes))
            by_name = split_replicas(sorted(members, key=itemgetter(0)), holders)
            by_owner: dict[int, list[tuple[str, Box]]] = {rank: [] for rank in holders}
            for name, shares in by_name.items():
                for owner, box in shares:
                    by_owner[owner].append((name, box))
            self._shares[holders] = _Shares(by_name, by_owner)
        return self._shares[holders]

    @cached_property
    def _held(self) -> _Held:
        """What is held how; made when it is asked for first."""
        held = _Held({}, {}, {})
        for name, record in self.tensors.items():
            if record.layout is not None:
                held.names.setdefault(record.layout, []).append(name)
            for rank, box in record.pieces:
                held.pieces.setdefault(rank, []).append((name, box))
        for layout in held.names:
            for rank in layout.ranks:
                held.layouts.setdefault(rank, []).append(layout)
        return held

    @cached_property
    def _shared(self) -> dict[tuple[int, ...], list[tuple[Layout, int]]]:
        """Which boxes of which layouts the same ranks hold together; one look at each rank of each layout."""
        shared: dict[tuple[int, ...], list[tuple[Layout, int]]] = {}
        for layout in self._held.names:
            if layout.groups == len(layout.ranks):
                continue  # every rank has a box of its own
            for group in range(layout.groups):
                shared.setdefault(layout.holders(group), []).append((layout, group))
        return shared

    def to_json(self) -> JsonObject:
        """JSON form: each layout once, each kind of tensor once, and of which kind each tensor is."""
        layouts: dict[Layout, int] = {}
        places: dict[int, int] = {}  # by id: a layout of thousands of ranks is not hashed for each tensor
        kinds: dict[tuple[Any, ...], int] = {}
        tensors: dict[str, int] = {}
        for name, record in self.tensors.items():
            layout = record.layout
            place = places.get(id(layout))
            if place is None and layout is not None:
                place = places[id(layout)] = layouts.setdefault(layout, len(layouts))
            kind = record.shape, record.dtype, place, record.pieces
            tensors[name] = kinds.setdefault(kind, len(kinds))
        return {
            "layouts": [layout.to_json() for layout in layouts],
            "kinds": [_kind_to_json(*kind) for kind in kinds],
            "tensors": tensors,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, world_size: int) -> Structure:
        """From JSON; see :meth:`to_json`.

        Raises
        ------
        IntegrityError, ValueError, TypeError, LookupError
            If it is none.
        """
        layouts: list[Layout] = []
        room = most_placed(world_size)
        for layout in record["layouts"]:
            layouts.append(Layout.from_json(layout, world_size=world_size, most_ranks=room))
            room -= len(layouts[-1].ranks)
        kinds = [_kind_from_json(kind, layouts, world_size) for kind in record["kinds"]]
        check_names(record["tensors"])
        numbers = record["tensors"].values()
        if not set(map(type, numbers)) <= {int}:
            raise TypeError("the kind of a tensor is no number")
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(kinds):
            raise IntegrityError(f"a tensor is of none of its {len(kinds)} kinds")
        return cls({name: kinds[number] for name, number in record["tensors"].items()})


def _kind_to_json(
    shape: tuple[int, ...], dtype: str, layout: int | None, pieces: Sequence[tuple[int, Box]]
) -> JsonObject:
    kind: JsonObject = {"shape": list(shape), "dtype": dtype}
    if layout is not None:
        return {**kind, "layout": layout}
    return {**kind, "pieces": [[owner, list(box.start), list(box.size)] for owner, box in pieces]}


def _kind_from_json(kind: Mapping[str, Any], layouts: Sequence[Layout], world_size: int) -> TensorRecord:
    shape, dtype = integers(kind["shape"]), string(kind["dtype"])
    if "layout" in kind:
        number = integer(kind["layout"])
        if not 0 <= number < len(layouts):
            raise IntegrityError(f"layout {brief(number)} of {len(layouts)}")
        return TensorRecord(shape, dtype, layouts[number])
    pieces = []
    for owner, start, size in kind["pieces"]:
        if not 0 <= integer(owner) < world_size:
            raise IntegrityError(f"a box of rank {owner} of {world_size}")
        pieces.append((owner, Box(integers(start), integers(size))))
    return TensorRecord(shape, dtype, None, tuple(pieces))


_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
#: Structures by digest: while a run goes on, each of its checkpoints has the same.
_recent: dict[str, Structure] = {}
_KEPT = 4


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
        raise TypeError(f"{brief(value)} is no 64-bit integer")
    return value


def integers(values: Any) -> tuple[int, ...]:
    """Return a list of 64-bit integers as a tuple; see :func:`integer`."""
    if type(values) is not list:
        raise TypeError(f"{brief(values)} is no list")
    if values and (set(map(type, values)) != {int} or max(values) >= 1 << 63 or min(values) <= -1 << 63):
        raise TypeError(f"{brief(values)} are no 64-bit integers")
    return tuple(values)


def string(value: Any) -> str:
    """Return a string that can be written as UTF-8; anything else from a file is a TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no string")
    return check_text(value)


@lru_cache(maxsize=1 << 14)
def check_shape(shape: tuple[int, ...], item_bytes: int) -> None:
    """Check that there can be a tensor of a shape.

    Raises
    ------
    IntegrityError
        If not.
    """
    if len(shape) > MAX_DIMENSIONS or any(extent < 0 for extent in shape):
        raise IntegrityError(f"no shape of a tensor: {brief(list(shape))}")
    if math.prod(extent or 1 for extent in shape) * item_bytes >= _MAX_TENSOR_BYTES:
        raise IntegrityError(f"a tensor of shape {brief(list(shape))} is larger than any file")


def most_placed(world_size: int) -> int:
    """How many ranks all layouts of a manifest may have together.

    A layout takes a line however many ranks it has, so a short file could ask for any amount of memory. No
    more than some dozen layouts of all ranks are known to occur.
    """
    return max(64 * world_size, 1 << 18)
