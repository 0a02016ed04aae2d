"""How two checkpoints of the same training differ: tensor by tensor, value by value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hpc_resume.checkpoint import objects
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.plan import RANKS


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor that is not the same bit for bit.

    Parameters
    ----------
    name
        Its name; of one that only one checkpoint has, with that.
    largest
        Largest difference of two elements; infinite if shapes or types differ.
    relative
        Norm of the difference over the norm of the first.
    """

    name: str
    largest: float
    relative: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDifference:
    """A value of the non-tensor state that is not the same; ``"-"`` where there is none."""

    name: str
    one: str
    two: str
    relative: float


def tensor_differences(
    one: Checkpoint, two: Checkpoint, *, generators: bool = False
) -> list[TensorDifference]:
    """Compare all tensors.

    Parameters
    ----------
    one, two
        Open checkpoints.
    generators
        Compare the ranks' random generators, too: there are as many ranks in both.

    Returns
    -------
    list of TensorDifference
        Those that differ, the largest relative difference first.
    """
    names = sorted(set(one.names()) | set(two.names()))
    found = []
    for name in names:
        if name in one and name in two:
            found.append(_compare(name, one[name], two[name]))
        else:
            found.append(_incomparable(name))
    if generators:
        for rank in range(one.manifest.world_size):
            mine, other = _generators(one, rank), _generators(two, rank)
            for name in sorted(mine.keys() | other.keys()):
                shown = f"{RANKS}/{rank}/{name}"
                pair = name in mine and name in other
                found.append(_compare(shown, mine[name], other[name]) if pair else _incomparable(shown))
    return sorted((each for each in found if each is not None), key=lambda each: -each.relative)


def _generators(checkpoint: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    own = checkpoint.reader.private(rank, f"{RANKS}/{rank:05d}/")
    return {name: tensor for name, tensor in own.items() if name.startswith(("rng/", "streams/"))}


def _compare(name: str, one: torch.Tensor, two: torch.Tensor) -> TensorDifference | None:
    if one.shape != two.shape or one.dtype != two.dtype:
        return _incomparable(name)
    if torch.equal(_bytes(one), _bytes(two)):
        return None
    if not (one.is_floating_point() or one.is_complex()):
        return TensorDifference(
            name=name, largest=float((one.double() - two.double()).abs().max()), relative=math.inf
        )
    wide = torch.complex128 if one.is_complex() else torch.float64
    apart = (one.to(wide) - two.to(wide)).abs()
    norm = float(one.to(wide).abs().norm())
    relative = float(apart.norm()) / norm if norm else math.inf
    return TensorDifference(
        name=name, largest=_or_infinite(float(apart.max())), relative=_or_infinite(relative)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _incomparable(name: str) -> TensorDifference:
    return TensorDifference(name=name, largest=math.inf, relative=math.inf)


def value_differences(one: Checkpoint, two: Checkpoint) -> list[ValueDifference]:
    """Compare all that is no tensor: numbers, strings, what there is."""
    mine = {name: value for key in one.keys for name, value in _values(key, one.node(key))}
    other = {name: value for key in two.keys for name, value in _values(key, two.node(key))}
    found = []
    for name in sorted(mine.keys() | other.keys()):
        left, right = mine.get(name, "-"), other.get(name, "-")
        if type(left) is type(right) and repr(left) == repr(right):
            continue
        relative = math.inf
        if (
            isinstance(left, float)
            and isinstance(right, float)
            and math.isfinite(left)
            and math.isfinite(right)
        ):
            relative = abs(left - right) / max(abs(left), abs(right))
        found.append(ValueDifference(name=name, one=f"{left!s:.60}", two=f"{right!s:.60}", relative=relative))
    return found


def _values(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    yield from _leaves(name, objects.decode(node, lambda tag, stored: f"{tag} {stored}"))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(f"{name}/{key}", each)
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _leaves(f"{name}/{place}", each)
    else:
        yield name, value
