"""From a nested state to typed JSON and named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.names import below, check_names, escape
from hpc_resume.errors import IntegrityError, StateError


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
    namer = _Namer()
    return objects.encode(state, (key,), namer), namer.leaves


class _Namer:
    """Takes the tensors out of one state."""

    def __init__(self) -> None:
        self.leaves: dict[str, torch.Tensor] = {}
        self._names: set[str] = set()
        #: The first tensor at each address; and by all that tells tensors apart, where two are at one address.
        self._at: dict[int, str] = {}
        self._memory: dict[Any, str] = {}

    def one(self, value: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
        """Name a tensor; None if it is none."""
        if isinstance(value, torch.Tensor):
            (name,) = self._claim(["/".join(map(escape, path))])
            stored = self._take(name, value)
            return {"$tensor": name} if stored is name else {objects.SAME_TAG: [name, stored]}
        if type(value) in _ARRAYS and not value.dtype.hasobject and value.dtype.kind in "biufc":
            (name,) = self._claim(["/".join(map(escape, path))])
            self.leaves[name] = _as_tensor(name, value)
            _check(name, self.leaves[name])
            return {"$ndarray": name}
        return None

    def all_of(self, values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
        """Name the tensors of a dict that holds nothing else; None if it does."""
        if not all(isinstance(value, torch.Tensor) for value in values.values()):
            return None
        prefix = "/".join(map(escape, path))
        items: list[Any] = []
        names = self._claim(below(prefix, values.keys()))
        for key, name, tensor in zip(values, names, values.values(), strict=True):
            stored = self._take(name, tensor)
            items.append(key if stored is name else [key, stored])
        return {objects.TENSORS_TAG: [prefix, items]}

    def _claim(self, names: list[str]) -> list[str]:
        """Return names as they are, unless there can be no tensors of these names."""
        try:
            check_names(names)
        except ValueError as error:
            longest = max(names, key=len)
            raise StateError(f"{longest!r:.200}: can't be a tensor's name: {error}") from error
        if not self._names.isdisjoint(names):
            twice = next(name for name in names if name in self._names)
            raise StateError(f"{twice}: two entries of the state have this name")
        self._names.update(names)
        return names

    def _take(self, name: str, tensor: torch.Tensor) -> str:
        """Take a tensor; returns its name, or that of an earlier one that it is one with."""
        _check(name, tensor)
        first = self._at.setdefault(_address(tensor), name)
        if first is not name and (where := _memory_of(tensor)) is not None:
            if (earlier := _memory_of(self.leaves[first])) is not None:
                self._memory.setdefault(earlier, first)
            stored = self._memory.setdefault(where, name)
            if stored is not name:
                return stored
        self.leaves[name] = tensor
        return name


def _as_tensor(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))  # which made (1,) of ()
    except (TypeError, ValueError) as error:
        raise StateError(
            f"{name}: an array of type {array.dtype.str!r} can't be stored; convert it: array.astype(…) ({error!s:.100})"
        ) from None


def _check(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose bytes are not simply its values."""
    if type(tensor) not in _PLAIN_TYPES:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise StateError(
                f"{name}: a tensor of type {type(local).__qualname__} can't be stored: what is in it is its "
                "own affair. Plain tensors and DTensors can; with FSDP, use fully_shard"
            )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise StateError(f"{name}: a tensor of layout {tensor.layout} can't be stored")
    if tensor.is_meta:
        raise StateError(f"{name}: a tensor on the meta device has no values to store")
    try:
        dtypes.name_of(tensor.dtype)
    except StateError as error:
        raise StateError(f"{name}: {error}") from None


_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
#: Of others, such as masked arrays, the values are not all.
_ARRAYS = frozenset({np.ndarray, np.memmap})


def _address(tensor: torch.Tensor) -> int:
    """Tell where a tensor is: tensors that are one are at one place."""
    if not isinstance(tensor, DTensor):
        return tensor.data_ptr()
    local = tensor.to_local()
    return local.data_ptr() if local.numel() else local.untyped_storage()._cdata  # noqa: SLF001 - tells storages apart


def _memory_of(tensor: torch.Tensor) -> Any:
    """Tell what two tensors share that are one; None if they have no elements.

    Tied tensors must be found alike by all ranks, those that hold none of their elements too: there, what they
    share is the storage that these elements are not in.
    """
    if not tensor.numel():
        return None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    spread = tensor.placements if isinstance(tensor, DTensor) else None
    seen_through = local.is_conj(), local.is_neg()
    place = _address(tensor), local.dtype, local.shape, local.stride(), local.device
    return *place, seen_through, tensor.shape, spread


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
