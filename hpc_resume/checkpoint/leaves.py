"""From a nested state to typed JSON and named tensors."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.structure import check_name
from hpc_resume.errors import IntegrityError, StateError

_SPECIAL = re.compile(r"[%/\0]|^\.$")


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
        _check(path, tensor)
        name = _name(path)
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


def _check(path: tuple[str, ...], tensor: torch.Tensor) -> None:
    """Refuse a tensor whose bytes are not simply its values."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise StateError(
            f"{'/'.join(path)}: a tensor of type {type(local).__qualname__} can't be stored: what is in it is its "
            "own affair. Plain tensors and DTensors can; with FSDP, use fully_shard"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise StateError(f"{'/'.join(path)}: a tensor of layout {tensor.layout} can't be stored")
    if tensor.is_meta:
        raise StateError(f"{'/'.join(path)}: a tensor on the meta device has no values to store")
    dtypes.name_of(tensor.dtype)


def _name(path: tuple[str, ...]) -> str:
    """Join a path to a tensor's name."""
    name = "/".join(map(escape, path))
    try:
        return check_name(name)
    except ValueError as error:
        raise StateError(f"{name!r:.200}: can't be a tensor's name: {error}") from error


def _memory_of(tensor: torch.Tensor) -> Any:
    """Tell what two tensors share that are one; None if they have no elements.

    Tied tensors must be found alike by all ranks, those that hold none of their elements too: there, what they
    share is the storage that these elements are not in.
    """
    if not tensor.numel():
        return None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    address = local.data_ptr() if local.numel() else local.untyped_storage()._cdata  # noqa: SLF001 - tells storages apart
    spread = tensor.placements if isinstance(tensor, DTensor) else None
    return address, local.dtype, local.shape, local.stride(), local.device, tensor.shape, spread


def escape(component: str) -> str:
    """Make one component of a name that HDF5 takes as a link's name."""
    if not _SPECIAL.search(component):
        return component or "%"
    escaped = component.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return "%2E" if escaped == "." else escaped


def unescape(component: str) -> str:
    """Give back what :func:`escape` was given."""
    if component == "%":
        return ""
    for code, character in (("%2E", "."), ("%00", "\0"), ("%2F", "/"), ("%25", "%")):
        component = component.replace(code, character)
    return component


def leaf(tag: str, tensor: torch.Tensor) -> Any:
    """Give a tensor back as what it was.

    Raises
    ------
    IntegrityError
        If there is no array of its type: then it never was one.
    """
    if tag == objects.SAVED_TAG:
        raise StateError(
            "it holds an object that only torch.save can write, from torch.distributed.checkpoint; a run does not "
            "unpickle: take the tensors with hr.Checkpoint(…).load_into(…), or load it with hr.DcpReader"
        )
    try:
        return tensor.numpy() if tag == "$ndarray" else tensor
    except (TypeError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"an array of type {tensor.dtype} ({error!s:.100})") from error
