"""Objects inside what ``torch.save`` wrote, as torch.distributed.checkpoint stores those that are no tensors."""

from __future__ import annotations

import io
from typing import Any

import torch

from hpc_resume.checkpoint.leaves import leaf
from hpc_resume.checkpoint.objects import SAVED_TAG
from hpc_resume.errors import IntegrityError, StateError


def any_leaf(tag: str, tensor: torch.Tensor) -> Any:
    """Give a leaf back as what it was, one that ``torch.save`` wrote included; see :func:`leaves.leaf`."""
    if tag != SAVED_TAG:
        return leaf(tag, tensor)
    if tensor.dtype != torch.uint8:
        raise IntegrityError(f"an object that torch.save wrote, as a tensor of {tensor.dtype}")
    return load_saved(tensor.numpy().tobytes())


def load_saved(data: bytes) -> Any:
    """Load what ``torch.save`` wrote; runs no code.

    Raises
    ------
    StateError
        If it holds anything that only running code could bring back.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch's reader stumbles over: it was not made to say
        raise StateError(f"can't be loaded without running code ({why_not(error)})") from error


def why_not(error: Exception) -> str:
    """Take out of PyTorch's message what it would not load, and leave its advice to load it anyway."""
    text = str(error)
    text = text.partition("WeightsUnpickler error: ")[2] or text
    lines = text.partition(" Please use ")[0].splitlines()
    return f"{lines[0] if lines else type(error).__name__:.200}"
