"""Stand-ins for tensors that are not loaded yet, in a state that others take apart."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from hpc_resume.checkpoint.dtypes import torch_dtype
from hpc_resume.checkpoint.saved import any_leaf
from hpc_resume.checkpoint.structure import TensorRecord


class _Other:
    """Stands for what is stored as a tensor and is none."""


class StandIns:
    """Makes stand-ins for tensors, and knows which one stands for what.

    Parameters
    ----------
    record
        Gives shape and element type of a tensor by its name.
    """

    def __init__(self, record: Callable[[str], TensorRecord]) -> None:
        self._record = record
        self._made: dict[int, tuple[Any, str, str]] = {}  # holds them, so that their ids stay theirs

    def get(self, tag: str, name: str) -> Any:
        """Make one: a tensor without memory, or something that is no tensor; for :func:`objects.decode`."""
        made: Any = _Other()
        if tag == "$tensor":
            record = self._record(name)
            made = torch.empty(record.shape, dtype=torch_dtype(record.dtype), device="meta")
        self._made[id(made)] = made, tag, name
        return made

    def name_of(self, value: Any) -> str | None:
        """Name of the tensor that something stands for; None if it stands for none."""
        _, tag, name = self._made.get(id(value), (None, "", ""))
        return name if tag == "$tensor" else None

    def resolve(self, value: Any, load: Callable[[str], torch.Tensor]) -> Any:
        """Put in place what stand-ins stand for, in nested containers too."""
        if id(value) in self._made:
            _, tag, name = self._made[id(value)]
            return any_leaf(tag, load(name))
        if type(value) in {list, tuple}:
            return type(value)(self.resolve(item, load) for item in value)
        if type(value) in {dict, OrderedDict}:
            return type(value)((key, self.resolve(item, load)) for key, item in value.items())
        return value
