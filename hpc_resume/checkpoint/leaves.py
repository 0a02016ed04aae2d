"""From a nested state to typed JSON and named tensors."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.errors import StateError


def flatten(key: str, state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the tensors out of a state.

    A tensor that stands in it more than once (tied weights) is taken once, under the name that comes first.

    Parameters
    ----------
    key
        Under which the state is tracked: the first component of every name.
    state
        Nested dicts and lists.

    Returns
    -------
    (Any, dict)
        Typed JSON, and the tensors by name.

    Raises
    ------
    StateError
        If something in it can't be stored; the message names its path.
    """
    leaves: dict[str, torch.Tensor] = {}
    names: set[str] = set()
    memory: dict[Any, str] = {}

    def name_tensor(value: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
        if isinstance(value, torch.Tensor):
            tag, tensor = "$tensor", value
        elif isinstance(value, np.ndarray):
            if value.dtype.hasobject or value.dtype.kind not in "biufc":
                return None
            tag, tensor = "$ndarray", torch.from_numpy(np.ascontiguousarray(value))
        else:
            return None
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise StateError(f"{'/'.join(path)}: a tensor of layout {tensor.layout} can't be stored")
        if tensor.is_meta:
            raise StateError(f"{'/'.join(path)}: a tensor on the meta device has no values to store")
        dtypes.name_of(tensor.dtype)
        name = "/".join(map(escape, path))
        if name in names:
            raise StateError(f"{name}: two entries of the state have this name")
        names.add(name)
        if tag == "$tensor" and (where := _memory_of(tensor)) is not None:
            first = memory.setdefault(where, name)
            if first is not name:
                return {objects.SAME_TAG: [name, first]}
        leaves[name] = tensor
        return {tag: name}

    return objects.encode(state, (key,), name_tensor), leaves


def _memory_of(tensor: torch.Tensor) -> Any:
    """Tell what two tensors share that are one; None if it has no memory."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return None
    spread = tensor.placements if isinstance(tensor, DTensor) else None
    return local.data_ptr(), local.dtype, local.shape, local.stride(), local.device, tensor.shape, spread


def escape(component: str) -> str:
    """Make one component of a name that HDF5 takes as a link's name."""
    escaped = component.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return "%2E" if escaped == "." else escaped or "%"


def unescape(component: str) -> str:
    """Give back what :func:`escape` was given."""
    if component == "%":
        return ""
    for code, character in (("%2E", "."), ("%00", "\0"), ("%2F", "/"), ("%25", "%")):
        component = component.replace(code, character)
    return component


def leaf(tag: str, tensor: torch.Tensor) -> Any:
    """Give a tensor back as what it was."""
    if tag == "$ndarray":
        return tensor.numpy()
    return load_saved(tensor.numpy().tobytes()) if tag == "$saved" else tensor


def load_saved(data: bytes) -> Any:
    """Load what ``torch.save`` wrote; runs no code.

    Raises
    ------
    StateError
        If it holds anything that only running code could bring back.
    """
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise StateError(f"can't be loaded without running code ({why_not(error)})") from error


def why_not(error: Exception) -> str:
    """Take out of PyTorch's message what it would not load, and leave its advice to load it anyway."""
    text = str(error)
    text = text.partition("WeightsUnpickler error: ")[2] or text
    lines = text.partition(" Please use ")[0].splitlines()
    return f"{lines[0] if lines else type(error).__name__:.200}"
