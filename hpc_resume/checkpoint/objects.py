"""Typed JSON: everything in a state that is no tensor, stored so that loading it runs no code.

JSON's own types stand for themselves. Everything else is an object with one key that begins with ``$``:
``{"$tuple": […]}``, ``{"$float": "nan"}``, ``{"$tensor": "model/weight"}``. A dict whose keys are not all
plain strings becomes ``{"$dict": [[key, value], …]}``, a dict of tensors alone ``{"$tensors": ["model", ["weight", …]]}``.
What is not in the table is refused by its path.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from hpc_resume.checkpoint.names import below
from hpc_resume.errors import IntegrityError, StateError
from hpc_resume.untrusted import brief, parse_json

#: Given the tag and name of such a node, returns the tensor.
TensorGetter = Callable[[str, str], Any]

#: What only ``torch.save`` can write, as its bytes; comes from torch.distributed.checkpoint alone.
SAVED_TAG = "$saved"
#: A PyTorch tensor, a NumPy array, and that.
TENSOR_TAGS = ("$tensor", "$ndarray", SAVED_TAG)
#: ``[name, stored]``: a tensor that is one with another one, under whose name it is stored.
SAME_TAG = "$same"
#: ``[prefix, [key, [key, stored], …]]``: a dict of tensors, each named by its key below the prefix; ``stored`` is the
#: name of another one that it is one with.
TENSORS_TAG = "$tensors"
MAX_DEPTH = 100
#: Longer integers can't be written in decimal by every Python.
_LONGEST_INT_BITS = 14000
#: Keys of one mapping or set that may have the same hash. Integers can be chosen so that all have, and then each
#: one is compared with all others.
_MOST_ALIKE = 100
_NUMPY_TYPE = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")
_TORCH_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,2})?")


class TensorNamer(Protocol):
    """Takes the tensors out of a state and gives the nodes that stand for them."""

    def one(self, value: Any, path: tuple[str, ...]) -> dict[str, Any] | None:
        """Give the node for a value (``{"$tensor": name}``), or None if it is no tensor."""

    def all_of(self, values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
        """Give the node for a dict (``{"$tensors": …}``), or None if something else than tensors is in it."""


def encode(value: Any, path: tuple[str, ...], tensor: TensorNamer | None = None) -> Any:
    """Turn a state into JSON values.

    Parameters
    ----------
    value
        The state.
    path
        Where it stands, for names of tensors and for error messages.
    tensor
        Takes tensors out.

    Raises
    ------
    StateError
        If something in it can't be stored; the message names its path and type.
    """
    if len(path) > MAX_DEPTH:
        raise StateError(f"{_where(path)}: nested more than {MAX_DEPTH} deep (a cycle?)")
    if tensor is not None and (node := tensor.one(value, path)) is not None:
        return node
    kind = type(value)
    if value is None or kind in _PLAIN:
        return _encode_plain(value, path)
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


def _encode_plain(value: Any, path: tuple[str, ...]) -> Any:
    """Turn what JSON knows into JSON, as far as it does."""
    if type(value) is int and value.bit_length() > _LONGEST_INT_BITS:
        raise StateError(f"{_where(path)}: an integer of {value.bit_length()} bits can't be stored")
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    return value


def decode(value: Any, tensor: TensorGetter | None = None, *, depth: int = 0) -> Any:
    """Turn JSON values back into the state.

    Parameters
    ----------
    value
        What :func:`encode` returned.
    tensor
        Gives the tensor for a tag and a name.
    depth
        How deep it is nested already.

    Raises
    ------
    IntegrityError
        If it is nothing that :func:`encode` returns.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > MAX_DEPTH:
        raise IntegrityError(f"no typed JSON: nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [decode(item, tensor, depth=depth + 1) for item in value]
    if not isinstance(value, dict):
        raise IntegrityError(f"no typed JSON: {type(value).__name__}")
    if len(value) == 1 and next(iter(value)).startswith("$"):
        (pair,) = value.items()
        return _decode_tagged(*pair, tensor, depth)
    return {key: decode(item, tensor, depth=depth + 1) for key, item in value.items()}


def _decode_tagged(tag: str, content: Any, tensor: TensorGetter | None, depth: int) -> Any:
    if tag in TENSOR_TAGS and tensor is not None and isinstance(content, str):
        return tensor(tag, content)
    if tag == SAME_TAG and tensor is not None:
        return tensor(TENSOR_TAGS[0], _own_name(content))
    if tag == TENSORS_TAG and tensor is not None:
        return {key: tensor(TENSOR_TAGS[0], name) for key, name, _ in _named(content)}
    if tag in _DECODERS:
        try:
            return _DECODERS[tag](_Content(content, tensor, depth + 1))
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IntegrityError(f"no typed JSON: {tag} holds {brief(content)} ({error!s:.200})") from error
    raise IntegrityError(f"no typed JSON: unknown tag {brief(tag)}")


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
        return parse_json(data)
    except (ValueError, MemoryError) as error:
        raise IntegrityError(f"non-tensor state is damaged ({error!s:.200})") from error


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
                    own = _own_name(content)
                    found[own] = content[1]
                    continue
                if tag == TENSORS_TAG:
                    found.update((name, stored) for _, name, stored in _named(content))
                    continue
            stack += reversed(node.values())
    return found


def unfolded(content: Any) -> dict[str, Any]:
    """Give what stands under :data:`TENSORS_TAG` as a dict of nodes."""
    return {
        key: {TENSOR_TAGS[0]: name} if name == stored else {SAME_TAG: [name, stored]}
        for key, name, stored in _named(content)
    }


def _named(content: Any) -> Iterable[tuple[str, str, str]]:
    """Key of each tensor under :data:`TENSORS_TAG`, its name, and the name under which it is stored."""
    if type(content) is not list or list(map(type, content)) != [str, list]:
        raise IntegrityError(f"no typed JSON: {TENSORS_TAG} holds {brief(content)}")
    prefix, items = content
    keys: list[str] = []
    tied: dict[str, str] = {}
    for item in items:
        if type(item) is str:
            keys.append(item)
        elif type(item) is list and list(map(type, item)) == [str, str]:
            keys.append(item[0])
            tied[item[0]] = item[1]
        else:
            raise IntegrityError(f"no typed JSON: {TENSORS_TAG} holds {brief(item)}")
    if len(set(keys)) != len(keys) or any(key.startswith("$") for key in keys):
        raise IntegrityError(f"no typed JSON: {TENSORS_TAG} holds a key twice, or one that begins with $")
    names = below(prefix, keys)
    return zip(keys, names, map(tied.get, keys, names), strict=True)


def _own_name(content: Any) -> str:
    if (
        not isinstance(content, list)
        or len(content) != 2
        or not all(isinstance(part, str) for part in content)
    ):
        raise IntegrityError(f"no typed JSON: {SAME_TAG} holds {brief(content)}")
    name: str = content[0]
    return name


def _where(path: tuple[str, ...]) -> str:
    return "".join((path[0], *(f"[{part!r}]" for part in path[1:]))) if path else "state"


_PLAIN = frozenset({bool, int, str, float})
_SEQUENCES: dict[type, str] = {list: "", tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_MAPPINGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordereddict", Counter: "$counter"}


def _encode_mapping(value: Mapping[Any, Any], path: tuple[str, ...], tensor: TensorNamer | None) -> Any:
    tag = _MAPPINGS[type(value)]
    if tag == "$dict" and all(type(key) is str and not key.startswith("$") for key in value):
        if tensor is not None and value and (node := tensor.all_of(value, path)) is not None:
            return node
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
        if value.dtype.kind not in "biufc":
            return None
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

    def __init__(self, raw: Any, tensor: TensorGetter | None, depth: int) -> None:
        self.raw = raw
        self._tensor = tensor
        self._depth = depth

    def text(self) -> str:
        if not isinstance(self.raw, str):
            raise TypeError("no string")
        return self.raw

    def items(self) -> list[Any]:
        if not isinstance(self.raw, list):
            raise TypeError("no list")
        return [decode(item, self._tensor, depth=self._depth) for item in self.raw]

    def keys(self) -> list[Any]:
        """Items that are going to be looked up by their hash."""
        return _spread(self.items())

    def pairs(self) -> list[tuple[Any, Any]]:
        if not isinstance(self.raw, list):
            raise TypeError("no list")
        pairs = [
            (decode(key, depth=self._depth), decode(item, self._tensor, depth=self._depth))
            for key, item in self.raw
        ]
        _spread([key for key, _ in pairs])
        return pairs

    def bytes(self) -> bytes:
        return base64.b64decode(self.text(), validate=True)


def _spread(keys: list[Any]) -> list[Any]:
    """Return keys as they are, unless too many have the same hash."""
    if len(keys) > _MOST_ALIKE:
        alike = Counter(map(hash, keys)).most_common(1)[0][1]
        if alike > _MOST_ALIKE:
            raise ValueError(f"{alike} keys of the same hash")
    return keys


def _float(content: _Content) -> float:
    return float(content.text())


def _complex(content: _Content) -> complex:
    real, imag = content.items()
    if type(real) is not float or type(imag) is not float:
        raise TypeError("not two numbers")
    return complex(real, imag)


def _numpy_scalar(content: _Content) -> Any:
    import numpy as np

    spelled, encoded = _strings(content.raw)
    if not _NUMPY_TYPE.fullmatch(spelled):
        raise ValueError("no number type")
    dtype = np.dtype(spelled)
    data = base64.b64decode(encoded, validate=True)
    if len(data) != dtype.itemsize:
        raise ValueError("wrong size")
    return np.frombuffer(data, dtype)[0]


def _strings(values: Any) -> Iterable[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("no list of strings")
    return values


def _torch_dtype(content: _Content) -> Any:
    import torch

    # Not by getattr(): that would import what PyTorch loads when it is asked for.
    dtype = vars(torch).get(content.text()) if _TORCH_NAME.fullmatch(content.text()) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError("no PyTorch element type")
    return dtype


def _torch_device(content: _Content) -> Any:
    import torch

    if not _DEVICE.fullmatch(content.text()):
        raise ValueError("no device")
    try:
        return torch.device(content.text())
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _torch_size(content: _Content) -> Any:
    import torch

    extents = content.items()
    if not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in extents):
        raise ValueError("no shape")
    return torch.Size(extents)


_DECODERS: dict[str, Callable[[_Content], Any]] = {
    "$float": _float,
    "$tuple": lambda content: tuple(content.items()),
    "$set": lambda content: set(content.keys()),
    "$frozenset": lambda content: frozenset(content.keys()),
    "$dict": lambda content: dict(content.pairs()),
    "$ordereddict": lambda content: OrderedDict(content.pairs()),
    "$counter": lambda content: Counter(dict(content.pairs())),
    "$complex": _complex,
    "$bytes": _Content.bytes,
    "$numpy": _numpy_scalar,
    "$size": _torch_size,
    "$dtype": _torch_dtype,
    "$device": _torch_device,
}
