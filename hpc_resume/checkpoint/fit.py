"""Whether a checkpoint fits what is tracked now; every difference is told at once."""

from __future__ import annotations

import torch

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.errors import MismatchError


def target_for(
    have: torch.Tensor | None, stored: str, reader: CheckpointReader, *, fresh: bool
) -> torch.Tensor:
    """Give the tensor to read into: the one that is there if it may be overwritten and fits, or one like it."""
    record = reader.manifest.structure.tensors[stored]
    dtype = dtypes.torch_dtype(record.dtype)
    if have is not None and tuple(have.shape) == record.shape and not fresh and have.dtype == dtype:
        return have
    reader.check_size(stored)
    try:
        if have is not None and tuple(have.shape) == record.shape:
            return torch.empty_like(have, dtype=dtype, requires_grad=False)
        return torch.empty(record.shape, dtype=dtype)
    except (RuntimeError, MemoryError) as error:  # PyTorch says either, whatever is short
        raise MismatchError(
            f"{reader.folder}: {stored}: no memory for {record.size_bytes} bytes: {str(error).splitlines()[0]:.200}"
        ) from error


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
