"""How two checkpoints differ in numbers: each tensor's norms and largest changes, in bounded memory.

How the ranks held a tensor does not matter, nor how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.files import JsonObject

#: So many elements of a tensor are compared at a time: 32 MB in double precision, a few times over.
_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """A tensor that is not the same bit for bit.

    Parameters
    ----------
    name
        Its name.
    kinds
        Element type and shape in the one and the other: ``"float32 64 x 16"``; empty where there is none.
    norms
        Euclidean norms in the one and the other; NaN where there is none.
    largest
        Largest difference of two elements; infinite if the shapes differ, or where one is not finite.
    largest_relative
        Largest difference of two elements, each over the larger of both.
    relative
        Norm of the difference over the norm of the one.
    elements, differing
        How many elements it has, and how many of them are not the same.
    """

    name: str
    kinds: tuple[str, str]
    norms: tuple[float, float]
    largest: float = math.inf
    largest_relative: float = math.inf
    relative: float = math.inf
    elements: int = 0
    differing: int = 0

    def to_json(self) -> JsonObject:
        """JSON form; ``null`` for what is no finite number."""
        return {
            "name": self.name,
            "kinds": list(self.kinds),
            "norms": [_finite(norm) for norm in self.norms],
            "largest": _finite(self.largest),
            "largest_relative": _finite(self.largest_relative),
            "relative": _finite(self.relative),
            "elements": self.elements,
            "differing": self.differing,
        }


def tensor_changes(
    one: Checkpoint, two: Checkpoint, *, progress: Callable[[int, int], None] | None = None
) -> list[TensorChange]:
    """Compare all tensors of two checkpoints.

    Parameters
    ----------
    one, two
        Open checkpoints.
    progress
        Told how many bytes of the first are done, of how many.

    Returns
    -------
    list of TensorChange
        Those that differ: what only one has first, then by the relative change of norm, the largest first.

    Raises
    ------
    IntegrityError
        If bytes are damaged.
    """
    names = sorted({*one.names(), *two.names()})
    total = sum(one.record(name).size_bytes for name in names if name in one)
    done = 0
    found = []
    for name in names:
        change = _compare(name, one, two)
        if change is not None:
            found.append(change)
        if name in one:
            done += one.record(name).size_bytes
            if progress is not None:
                progress(done, total)
    return sorted(found, key=lambda each: (-each.relative, each.name))


def _compare(name: str, one: Checkpoint, two: Checkpoint) -> TensorChange | None:
    kinds = _kind(name, one), _kind(name, two)
    if name not in one or name not in two or one.record(name).shape != two.record(name).shape:
        return TensorChange(name=name, kinds=kinds, norms=(_norm(name, one), _norm(name, two)))
    sums, largest, largest_relative, elements, differing = [0.0, 0.0, 0.0], 0.0, 0.0, 0, 0
    same = kinds[0] == kinds[1]
    for box in _boxes(one.record(name).shape):
        left, right = one.read(name, box), two.read(name, box)
        elements += left.numel()
        same = same and torch.equal(_bytes(left), _bytes(right))
        mine, other = _wide(left), _wide(right)
        apart = torch.nan_to_num((mine - other).abs(), nan=math.inf)
        unlike = _unlike(left, right, mine, other)
        apart = torch.where(unlike, apart, 0.0)
        differing += int(unlike.sum())
        for place, values in enumerate((mine.abs(), other.abs(), apart)):
            sums[place] += float(values.square().sum())
        if apart.numel():
            largest = max(largest, float(apart.max()))
            scale = torch.maximum(mine.abs(), other.abs())
            quotient = torch.where(apart > 0, apart / scale, 0.0)
            largest_relative = max(largest_relative, float(torch.nan_to_num(quotient, nan=math.inf).max()))
    if same:
        return None
    norms = [math.sqrt(each) if each >= 0 else math.nan for each in sums]
    return TensorChange(
        name=name,
        kinds=kinds,
        norms=(norms[0], norms[1]),
        largest=largest,
        largest_relative=largest_relative,
        relative=_quotient(norms[2], norms[0]),
        elements=elements,
        differing=differing,
    )


def _unlike(left: torch.Tensor, right: torch.Tensor, mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Say of each element whether it differs; integers as they are, because not each fits into a double."""
    if left.dtype == right.dtype and not (left.is_floating_point() or left.is_complex()):
        return left != right
    return (mine != other) & ~(mine.isnan() & other.isnan())


def _boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """Cut a tensor into boxes of a bounded number of elements, along as many dimensions as that takes."""
    pieces = [Box.whole(shape)]
    while pieces:
        box = pieces.pop()
        if math.prod(box.size) <= _ELEMENTS:
            yield box
            continue
        dim = next(place for place, extent in enumerate(box.size) if extent > 1)
        rest = math.prod(box.size[dim + 1 :])
        step = max(1, _ELEMENTS // max(rest, 1))
        for start in reversed(range(0, box.size[dim], step)):
            offsets, size = list(box.start), list(box.size)
            offsets[dim] += start
            size[dim] = min(step, box.size[dim] - start)
            pieces.append(Box(tuple(offsets), tuple(size)))


def _norm(name: str, checkpoint: Checkpoint) -> float:
    if name not in checkpoint:
        return math.nan
    boxes = _boxes(checkpoint.record(name).shape)
    total = sum(float(_wide(checkpoint.read(name, box)).abs().square().sum()) for box in boxes)
    return math.sqrt(total) if total >= 0 else math.nan


def _kind(name: str, checkpoint: Checkpoint) -> str:
    if name not in checkpoint:
        return ""
    record = checkpoint.record(name)
    return f"{record.dtype} {' x '.join(map(str, record.shape)) or 'scalar'}"


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _quotient(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole and math.isfinite(part) and math.isfinite(whole) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
