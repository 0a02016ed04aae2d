"""What an import has found in a foreign file: non-tensor state, and tensors that are loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_resume.checkpoint import objects
from hpc_resume.errors import IntegrityError

if TYPE_CHECKING:
    import torch

#: The tracked key of a plain state dict.
MODEL = "model"


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor that was found.

    Parameters
    ----------
    shape, dtype
        Of the whole tensor.
    load
        Gives its values.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A state that was found.

    Parameters
    ----------
    objects
        Typed JSON by tracked key, which names the tensors.
    tensors
        By name.
    """

    objects: dict[str, Any]
    tensors: Mapping[str, Item]

    @classmethod
    def of_names(cls, items: Mapping[str, Item], key: str = MODEL) -> Incoming:
        """Take tensors by name for the state dict of one tracked item."""
        from hpc_resume.checkpoint.names import escape

        names = {name: f"{escape(key)}/{escape(name)}" for name in items}
        pairs = [[name, {"$tensor": stored}] for name, stored in names.items()]
        plain = not any(name.startswith("$") for name in names)
        node = {name: leaf for name, leaf in pairs} if plain else {"$dict": pairs}  # noqa: C416 - mypy
        return cls({key: node}, {names[name]: item for name, item in items.items()})

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Incoming:
        """Take a state with its tensors in it.

        Raises
        ------
        StateError
            If something in it can't be stored; the message names its path.
        """
        from hpc_resume.checkpoint import dtypes
        from hpc_resume.checkpoint.leaves import flatten

        tree: dict[str, Any] = {}
        items: dict[str, Item] = {}
        for key, value in state.items():
            tree[key], leaves = flatten(key, value)
            for name, tensor in leaves.items():
                items[name] = Item(tuple(tensor.shape), dtypes.name_of(tensor.dtype), lambda t=tensor: t)  # type: ignore[misc]
        return cls(tree, items)

    @classmethod
    def of_tree(cls, path: Path, items: Mapping[str, Item], tree: Any) -> Incoming:
        """Take tensors with the typed JSON that names them.

        Raises
        ------
        IntegrityError
            If it is none, or the two do not fit.
        """
        if not isinstance(tree, dict):
            raise IntegrityError(f"{path}: its state is no mapping")
        if set(objects.tensor_names(tree).values()) != items.keys():
            raise IntegrityError(f"{path}: its state names other tensors than there are")
        objects.decode(tree, lambda _tag, _name: None)
        return cls(tree, items)
