"""Whether a checkpoint fits what is tracked now; every difference is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hpc_resume.checkpoint import dtypes, objects, optimizers
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.leaves import flatten
from hpc_resume.checkpoint.placement import box_of
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.errors import Declined, IntegrityError, MismatchError

#: Under which name a tensor is stored, and the tensor to read it into.
Target = tuple[str, torch.Tensor]


def target_for(have: torch.Tensor | None, stored: str, reader: CheckpointReader) -> torch.Tensor:
    """Make the tensor to read into: one like the one that is there, if that fits."""
    record = reader.manifest.structure.tensors[stored]
    dtype = dtypes.torch_dtype(record.dtype)
    reader.check_size(stored)
    try:
        if have is not None and tuple(have.shape) == record.shape:
            return torch.empty_like(have, dtype=dtype, requires_grad=False)
        return torch.empty(record.shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:  # PyTorch says either, whatever is short
        raise MismatchError(
            f"{reader.folder}: {stored}: no memory for {record.size_bytes} bytes: {str(error).splitlines()[0]:.200}"
        ) from error


def tied(stored: Mapping[str, str], have: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """List the pairs of names that are one tensor in the model and two in the checkpoint.

    Parameters
    ----------
    stored
        Under which name each one is stored.
    have
        The model's tensors by the same names.
    """
    first: dict[int, str] = {}
    pairs = []
    for name, where in stored.items():
        other = first.setdefault(id(have[name]), name)
        if stored[other] != where:
            pairs.append((other, name))
    return pairs


def alike(one: str, other: str, box: Box, reader: CheckpointReader) -> bool:
    """Whether two stored tensors of one shape and type hold the same bits in a box."""
    dtype = dtypes.torch_dtype(reader.manifest.structure.tensors[one].dtype)
    parts = [torch.empty(box.size, dtype=dtype) for _ in range(2)]
    reader.read_all(map(Wanted, (one, other), (box, box), parts))
    return torch.equal(*(part.reshape(-1).view(torch.uint8) for part in parts))


def ask(items: Mapping[str, Any], tree: Any, reader: CheckpointReader) -> None:
    """Let objects that have a method ``check_state`` refuse what was saved of them, before anything is loaded.

    Parameters
    ----------
    items
        What is tracked, by name, but for modules.
    tree
        The saved non-tensor state; ``check_state`` sees None in place of tensors.

    Raises
    ------
    Declined, IntegrityError
        If one of them says so.
    MismatchError
        If one of them raises anything else.
    """
    for key, item in items.items():
        check = getattr(item, "check_state", None)
        if not (callable(check) and isinstance(tree, dict) and key in tree):
            continue
        state = objects.decode(tree[key], lambda _tag, _name: None)
        try:
            check(state)
        except Exception as error:
            kind = type(error) if isinstance(error, Declined | IntegrityError) else MismatchError
            raise kind(f"{reader.folder}: {key}: {error!s:.1000}") from error


def key_problems(tracked: set[str], saved: set[str]) -> list[str]:
    """List the keys that are only tracked, or only saved."""
    return [f"{key}: tracked now, not in the checkpoint" for key in tracked - saved] + [
        f"{key}: in the checkpoint, not tracked now" for key in saved - tracked
    ]


def shape_problems(name: str, tensor: torch.Tensor, stored: str, reader: CheckpointReader) -> list[str]:
    """List in what a tensor differs from what is stored of it."""
    record = reader.manifest.structure.tensors[stored]
    problems = []
    if tuple(tensor.shape) != record.shape:
        problems.append(f"{name}: shape {list(tensor.shape)}, in the checkpoint {list(record.shape)}")
    if dtypes.name_of(tensor.dtype) != record.dtype:
        problems.append(f"{name}: {dtypes.name_of(tensor.dtype)}, in the checkpoint {record.dtype}")
    return problems


def present(key: str, state: Any) -> dict[str, torch.Tensor]:
    """Give the tensors of an item as it is now, by each of their names."""
    tree, leaves = flatten(key, state)
    return {name: leaves[stored] for name, stored in objects.tensor_names(tree).items()}


def check_names(names: Mapping[str, str], earlier: Mapping[str, Any], reader: CheckpointReader) -> None:
    """Check that each tensor of a state is stored, and is not another tracked object's too.

    Raises
    ------
    IntegrityError
        If not.
    """
    for name, stored in names.items():
        if stored not in reader.manifest.structure.tensors:
            raise IntegrityError(f"{reader.folder}: {stored} stands in the state but has no bytes")
        if name in earlier:
            raise IntegrityError(f"{reader.folder}: {name} stands in the state twice")


def module_targets(
    have: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    rank: int,
    reader: CheckpointReader,
    targets: dict[str, Target],
) -> list[str]:
    """Add the tensors of a module to read into: its own; returns in what it differs."""
    problems = [f"{n}: in the model, not in the checkpoint" for n in sorted(have.keys() - names.keys())]
    problems += [f"{n}: in the checkpoint, not in the model" for n in sorted(names.keys() - have.keys())]
    both = {name: stored for name, stored in names.items() if name in have}
    misfits = [p for name, stored in both.items() for p in shape_problems(name, have[name], stored, reader)]
    for first, other in () if misfits else tied(both, have):
        if not alike(both[first], both[other], box_of(first, have[first], rank), reader):
            misfits.append(f"{first}, {other}: one tensor in the model, two that differ in the checkpoint")
        both[other] = both[first]
    targets.update({name: (stored, have[name]) for name, stored in both.items()})
    return problems + misfits


def optimizer_targets(
    key: str,
    owner: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Any,
    reader: CheckpointReader,
    targets: dict[str, Target],
) -> list[str]:
    """Add the tensors of an optimizer to read into: its own; returns in what it differs."""
    now = optimizers.state_to_fill(owner, optimizer)
    problems = optimizers.group_problems(key, saved, now)
    parameters = optimizers.parameters_of(optimizer, now)
    have = present(key, now)
    for name, stored in objects.tensor_names(saved).items():
        record = reader.manifest.structure.tensors[stored]
        mine = have.get(name)
        if mine is None:
            reader.check_size(stored)
            mine = optimizers.made_for(name, record, key, parameters)
        elif tuple(mine.shape) != record.shape:
            problems += shape_problems(name, mine, stored, reader)
        elif dtypes.name_of(mine.dtype) != record.dtype:
            mine = target_for(mine, stored, reader)
        targets[name] = stored, mine
    return problems


def made_targets(
    have: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    reader: CheckpointReader,
    targets: dict[str, Target],
) -> None:
    """Add the tensors of anything else to read into: new ones, for it is handed a new state."""
    made: dict[str, torch.Tensor] = {}
    for name, stored in names.items():
        if stored not in made:
            made[stored] = target_for(have.get(name), stored, reader)
        targets[name] = stored, made[stored]
