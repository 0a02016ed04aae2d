"""Typed JSON: everything in a state that is no tensor, stored so that loading it runs no code.

JSON's own types stand for themselves. Everything else is an object with one key that begins with ``$``:
``{"$tuple": […]}``, ``{"$float": "nan"}``, ``{"$tensor": "model/weight"}``. A dict whose keys are not all
plain strings becomes ``{"$dict": [[key, value], …]}``. What is not in the table is refused by its path.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from hpc_resume.errors import IntegrityError, StateError

#: Given a leaf and its path, returns the node that stands for it (``{"$tensor": name}``), or None if it is
#: no tensor.
TensorNamer = Callable[[Any, tuple[str, ...]], "dict[str, Any] | None"]

#: Given the tag and name of such a node, returns the tensor.
TensorGetter = Callable[[str, str], Any]

#: A PyTorch tensor, a NumPy array, and what else only ``torch.save`` can write, as its bytes.
TENSOR_TAGS = ("$tensor", "$ndarray", "$saved")
#: ``[name, stored]``: a tensor that is one with another one, under whose name it is stored.
SAME_TAG = "$same"
MAX_DEPTH = 100


def encode(value: Any, path: tuple[str, ...], tensor: TensorNamer | None = None) -> Any:
    """Turn a state into JSON values.

    Parameters
    ----------
    value
        The state.
    path
        Where it stands, for names of tensors and for error messages.
    tensor
        Takes tensors out: called on each leaf.

    Raises
    ------
    StateError
        If something in it can't be stored; the message names its path and type.
    """
    if len(path) > MAX_DEPTH:
        raise StateError(f"{_where(path)}: nested more than {MAX_DEPTH} deep (a cycle?)")
    if tensor is not None and (node := tensor(value, path)) is not None:
        return node
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind in _SEQUENCES:
        items = sorted(value, key=repr) if kind in {set, frozenset} else value
        encoded = [encode(item, (*path, str(index)), tensor) for index, item in enumerate(items)]
        return encoded if kind is list else {_SEQUENCES[kind]: encoded}
    if kind in _MAPPINGS:
        return _encode_mapping(value, path, tensor)
    if kind is complex:
        return {"$complex": [encode(value.real, path), encode(value.imag, path)]}
    if kind in {bytes, bytearray}:
        return {"$bytes": base64.b64encode(value).decode()}
    special = _encode_foreign(value)
    if special is not None:
        return special
    raise StateError(
        f"{_where(path)}: an object of type {kind.__module__}.{kind.__qualname__} can't be stored. "
        "Loading must run no code, so only numbers, strings, lists, dicts and tensors go into a checkpoint: "
        "give the object a state_dict() of those, or leave it out"
    )


def decode(value: Any, tensor: TensorGetter | None = None) -> Any:
    """Turn JSON values back into the state.

    Parameters
    ----------
    value
        What :func:`encode` returned.
    tensor
        Gives the tensor for a tag and a name.

    Raises
    ------
    IntegrityError
        If it is nothing that :func:`encode` returns.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        raise IntegrityError(f"no typed JSON: {type(value).__name__}")
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag in TENSOR_TAGS and tensor is not None and isinstance(content, str):
            return tensor(tag, content)
        if tag == SAME_TAG and tensor is not None:
            return tensor(TENSOR_TAGS[0], _own_name(content))
        if tag in _DECODERS:
            try:
                return _DECODERS[tag](_Content(content, tensor))
            except (TypeError, ValueError, AttributeError) as error:
                raise IntegrityError(f"no typed JSON: {tag} holds {content!r:.80} ({error})") from error
        if tag.startswith("$"):
            raise IntegrityError(f"no typed JSON: unknown tag {tag!r}")
    return {key: decode(item, tensor) for key, item in value.items()}


def dump(value: Any) -> bytes:
    """Turn encoded state into bytes: the same state always gives the same."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def parse(data: bytes) -> Any:
    """Parse what :func:`dump` gave.

    Raises
    ------
    IntegrityError
        If it is no JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"non-tensor state is damaged ({error})") from error


def tensor_names(value: Any) -> dict[str, str]:
    """Give the names of the tensors in encoded JSON, each with the name under which it is stored."""
    found: dict[str, str] = {}
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += reversed(node)
        elif isinstance(node, dict):
            if len(node) == 1:
                (tag, content), *_ = node.items()
                if tag in TENSOR_TAGS and isinstance(content, str):
                    found[content] = content
                    continue
                if tag == SAME_TAG:
                    found[_own_name(content)] = content[1]
                    continue
            stack += reversed(node.values())
    return found


def _own_name(content: Any) -> str:
    if (
        not isinstance(content, list)
        or len(content) != 2
        or not all(isinstance(part, str) for part in content)
    ):
        raise IntegrityError(f"no typed JSON: {SAME_TAG} holds {content!r:.80}")
    name: str = content[0]
    return name


def _where(path: tuple[str, ...]) -> str:
    return "".join((path[0], *(f"[{part!r}]" for part in path[1:]))) if path else "state"


_SEQUENCES: dict[type, str] = {list: "", tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordereddict", Counter: "$counter"}


def _encode_mapping(value: Mapping[Any, Any], path: tuple[str, ...], tensor: TensorNamer | None) -> Any:
    tag = _MAPPINGS[type(value)]
    if tag == "$dict" and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, (*path, key), tensor) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        if not isinstance(key, str | int | float | bool | bytes | tuple | None):
            raise StateError(f"{_where(path)}: a key of type {type(key).__name__} can't be stored")
        pairs.append([encode(key, path), encode(item, (*path, str(key)), tensor)])
    return {tag: pairs}


def _encode_foreign(value: Any) -> Any:
    """NumPy scalars and PyTorch's small types, without importing either."""
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
        return {"$numpy": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    return None


class _Content:
    """What a tag holds, and how to read it."""

    def __init__(self, raw: Any, tensor: TensorGetter | None) -> None:
        self.raw = raw
        self._tensor = tensor

    def items(self) -> list[Any]:
        if not isinstance(self.raw, list):
            raise TypeError("not a list")
        return [decode(item, self._tensor) for item in self.raw]

    def pairs(self) -> list[tuple[Any, Any]]:
        return [(decode(key), decode(item, self._tensor)) for key, item in self.raw]

    def bytes(self) -> bytes:
        return base64.b64decode(self.raw, validate=True)


def _numpy_scalar(content: _Content) -> Any:
    import numpy as np

    spelled, encoded = content.raw
    dtype = np.dtype(str(spelled))
    if dtype.kind not in "biufc":
        raise ValueError("no number type")
    data = base64.b64decode(encoded, validate=True)
    if len(data) != dtype.itemsize:
        raise ValueError("wrong size")
    return np.frombuffer(data, dtype)[0]


def _torch_dtype(content: _Content) -> Any:
    import torch

    dtype = getattr(torch, str(content.raw), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no PyTorch element type")
    return dtype


def _torch_device(content: _Content) -> Any:
    import torch

    try:
        return torch.device(str(content.raw))
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _torch_size(content: _Content) -> Any:
    import torch

    return torch.Size(content.items())


_DECODERS: dict[str, Callable[[_Content], Any]] = {
    "$float": lambda content: float(content.raw),
    "$tuple": lambda content: tuple(content.items()),
    "$set": lambda content: set(content.items()),
    "$frozenset": lambda content: frozenset(content.items()),
    "$dict": lambda content: dict(content.pairs()),
    "$ordereddict": lambda content: OrderedDict(content.pairs()),
    "$counter": lambda content: Counter(dict(content.pairs())),
    "$complex": lambda content: complex(*content.items()),
    "$bytes": _Content.bytes,
    "$numpy": _numpy_scalar,
    "$size": _torch_size,
    "$dtype": _torch_dtype,
    "$device": _torch_device,
}
