"""Loading a checkpoint into a module or a state dict that is there: what fits, what does not, and the reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.leaves import flatten
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.placement import fill, is_seen_through, layout_of, local_of
from hpc_resume.checkpoint.reader import Wanted
from hpc_resume.errors import MismatchError

if TYPE_CHECKING:
    from hpc_resume.checkpoint.opened import Checkpoint

#: Stands for a tensor that needs not be read.
_TENSOR = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What :meth:`Checkpoint.load_into` did, by the names that the tensors have in the checkpoint.

    Parameters
    ----------
    loaded
        Was read.
    missing
        Stands in the target, not in the checkpoint: left as it was.
    unexpected
        Stands in the checkpoint, not in the target: not read.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_into(
    ckpt: Checkpoint,
    target: torch.nn.Module | Mapping[str, Any],
    *,
    key: str,
    pattern: str,
    strict: bool,
) -> Loaded:
    """Load into the tensors of a target, in place; see :meth:`Checkpoint.load_into`."""
    prefix = f"{escape(key)}/"

    def chosen(names: Mapping[str, str]) -> dict[str, str]:
        return {n: s for n, s in names.items() if fnmatchcase(n.removeprefix(prefix), pattern)}

    node = ckpt.node(key)
    there = chosen(objects.tensor_names(node))
    module = target if isinstance(target, torch.nn.Module) else None
    current = get_model_state_dict(module) if module is not None else target
    tree, leaves = flatten(key, current)
    here = {name: leaves[stored] for name, stored in chosen(objects.tensor_names(tree)).items()}
    common = sorted(here.keys() & there.keys())
    filled = {id(here[name]) for name in common}  # a tied tensor is there under any of its names
    missing = sorted(name for name in here.keys() - there.keys() if id(here[name]) not in filled)
    unexpected = sorted(there.keys() - here.keys())
    problems = [problem for name in common if (problem := _misfit(ckpt, name, here[name]))]
    problems += _torn_ties(ckpt, here, there, common)
    if strict:
        problems += [f"{name}: in the target, not in the checkpoint" for name in missing]
        problems += [f"{name}: in the checkpoint, not in the target" for name in unexpected]
    if problems:
        hint = "" if not strict else "\nstrict=False passes over names that are only on one side"
        raise MismatchError(f"{ckpt.path}: does not fit:\n  " + "\n  ".join(sorted(problems)) + hint)
    _fill(ckpt, {name: here[name] for name in common}, there)
    if module is not None:
        assert isinstance(current, Mapping)
        _hand_over(module, key, node, current, pattern)
    return Loaded(loaded=tuple(common), missing=tuple(missing), unexpected=tuple(unexpected))


def _misfit(ckpt: Checkpoint, name: str, tensor: torch.Tensor) -> str | None:
    record = ckpt.record(name)
    if tuple(tensor.shape) != record.shape:
        return f"{name}: shape {list(tensor.shape)}, in the checkpoint {list(record.shape)}"
    dtype = dtypes.torch_dtype(record.dtype)
    if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.dtype.is_floating_point):
        return f"{name}: {dtypes.name_of(tensor.dtype)}, in the checkpoint {record.dtype}"
    return None


def _torn_ties(
    ckpt: Checkpoint, here: Mapping[str, torch.Tensor], there: Mapping[str, str], common: Iterable[str]
) -> Iterator[str]:
    """Find tensors that are one in the target and two different ones in the checkpoint.

    Two equal ones are what DCP makes of tied weights.
    """
    first: dict[int, str] = {}
    for name in common:
        other = first.setdefault(id(here[name]), name)
        if there[other] != there[name] and ckpt.record(other).shape == ckpt.record(name).shape:
            pair = ckpt.load_names([other, name])
            if not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in pair.values())):
                yield f"{other} and {name}: one tensor in the target, two in the checkpoint"


def _fill(ckpt: Checkpoint, targets: Mapping[str, torch.Tensor], stored: Mapping[str, str]) -> None:
    """Read into tensors, each of them once."""
    wanted: dict[Any, Wanted] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, tensor in targets.items():
        local = local_of(tensor)
        if not local.numel():
            continue
        box = Box.whole(tensor.shape)
        if isinstance(tensor, DTensor):
            rank = dist.get_rank()
            layout = layout_of(name, tensor, rank)
            group = layout.group_of(rank)
            assert group is not None
            box = layout.box(tensor.shape, group)
        wanted[stored[name], local.data_ptr()] = Wanted(stored[name], box, local)
        if is_seen_through(tensor):
            copies.append((tensor, local))
    with torch.no_grad():
        ckpt.reader.read_all(wanted.values())
        for tensor, local in copies:
            fill(tensor, local)


def _hand_over(
    module: torch.nn.Module, key: str, node: Any, current: Mapping[str, Any], pattern: str
) -> None:
    """Give a module what it takes through ``load_state_dict`` alone: extra state, and tensors with hooks."""
    names = objects.tensor_names(node)
    prefix = f"{escape(key)}/"
    rest = objects.decode(node, lambda _tag, _name: _TENSOR)
    state = {
        name: value if isinstance(value, torch.Tensor) else rest[name]
        for name, value in current.items()
        if fnmatchcase(name, pattern)
        and name in rest
        and isinstance(value, torch.Tensor) == (prefix + escape(name) in names)
    }
    set_model_state_dict(module, state, options=StateDictOptions(strict=False))
