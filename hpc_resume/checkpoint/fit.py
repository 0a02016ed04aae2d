"""Whether a checkpoint fits what is tracked now; every difference is told at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.errors import MismatchError


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
