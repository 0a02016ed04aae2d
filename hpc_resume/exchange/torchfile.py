"""Files of ``torch.save``: a zip of one pickle and the tensors' bytes.

They are written tensor by tensor, which ``torch.save`` can't do, in its own format: what ``torch.load`` of any
version since 1.6 reads, with ``weights_only=True`` and ``mmap=True``, too.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.dtypes import name_of
from hpc_resume.checkpoint.saved import why_not
from hpc_resume.checkpoint.snapshot import bytes_of
from hpc_resume.checkpoint.structure import TensorRecord
from hpc_resume.errors import IntegrityError, StateError, UsageError
from hpc_resume.exchange.incoming import MODEL, Incoming

#: Storages by element type; tensors of other types lie in an untyped one.
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
#: The box of a 0-d tensor.
POINT = Box((), ())
_ALIGN_BYTES = 64
#: An extra field of a zip entry that fills up; PyTorch's own.
_PADDING_FIELD = b"FB"


@dataclass(frozen=True, slots=True, eq=False)
class Later:
    """Stands in a state for a tensor that is loaded when its bytes are written; one object, one tensor."""

    record: TensorRecord
    load: Callable[[], torch.Tensor]


def write(path: Path, state: Any) -> None:
    """Write a state with :class:`Later` tensors in it.

    Parameters
    ----------
    path
        It must not exist.
    state
        Nested containers, as ``torch.load(weights_only=True)`` takes them.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(state)
    with path.open("xb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as file:
        _add(file, raw, "data.pkl", pickled.getbuffer())
        _add(file, raw, "byteorder", b"little")
        for key, later in enumerate(pickler.found):
            _add(file, raw, f"data/{key}", bytes_of(later.load()).data)
        _add(file, raw, "version", b"3\n")


def _add(file: zipfile.ZipFile, raw: Any, name: str, data: memoryview | bytes) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(data)
    zip64 = len(data) > (1 << 31) - 1
    # What zipfile is going to write before the bytes: the header, the name, sizes of large files, our field.
    begin = raw.tell() + 30 + len(info.filename) + (20 if zip64 else 0) + 4
    room = -begin % _ALIGN_BYTES
    info.extra = _PADDING_FIELD + room.to_bytes(2, "little") + bytes(room)
    with file.open(info, "w", force_zip64=zip64) as entry:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), 1 << 24):
            entry.write(view[at : at + (1 << 24)])


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    key: int
    record: TensorRecord


class _Pickler(pickle.Pickler):
    """Writes tensors as ``torch.save`` does: a call that rebuilds one from a storage with a number."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.found: list[Later] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        typed = _STORAGES.get(obj.record.dtype)
        kind = torch.storage.UntypedStorage if typed is None else getattr(torch, typed)
        count = obj.record.size_bytes // (1 if typed is None else obj.record.item_bytes)
        return "storage", kind, str(obj.key), "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = _present(obj)
        elif not isinstance(obj, Later):
            return NotImplemented
        record = obj.record
        self.found.append(obj)
        stride, step = [], 1
        for extent in reversed(record.shape):
            stride.append(step)
            step *= max(extent, 1)
        shaped = (_Storage(len(self.found) - 1, record), 0, record.shape, tuple(reversed(stride)), False)
        hooks: OrderedDict[str, Any] = OrderedDict()
        if record.dtype in _STORAGES:
            return _rebuild_tensor_v2, (*shaped, hooks)
        return _rebuild_tensor_v3, (*shaped, hooks, getattr(torch, record.dtype))


def _present(tensor: torch.Tensor) -> Later:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise StateError(f"a tensor of layout {tensor.layout} can't be exported")
    shape = tuple(tensor.shape)
    return Later(TensorRecord(shape, name_of(tensor.dtype), None, ((0, Box.whole(shape)),)), lambda: tensor)


def read(path: Path, key: str | None) -> Incoming:
    """Open a file; runs no code of it. Tensors are read from it when they are asked for.

    Parameters
    ----------
    path
        The file.
    key
        The tracked key to put everything under. Without it a dict that holds tensors is taken for a model's
        state dict, and any other one for states by tracked key.

    Raises
    ------
    IntegrityError
        If it is no such file.
    StateError
        If it holds what can't be loaded without running code, or can't be stored.
    """
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # files of PyTorch before 1.6 are no zip, and are read whole
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{path}: can't be loaded without running code ({why_not(error)}): save state dicts, not objects: "
            "torch.save(model.state_dict(), …)"
        ) from error
    except Exception as error:  # whatever PyTorch's reader stumbles over: it was not made to say
        raise IntegrityError(f"{path}: no sound file of torch.save ({why_not(error)})") from error
    return Incoming.of_state(by_key(path, state, key))


def by_key(path: Path, state: Any, key: str | None) -> dict[str, Any]:
    """Put a state under tracked keys; see :func:`read`."""
    if key is not None:
        return {key: state}
    if not isinstance(state, Mapping):
        raise UsageError(f"{path}: holds a {type(state).__name__}, no dict; say what it is with --key")
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        return {MODEL: state}
    odd = [name for name in state if not isinstance(name, str)]
    if odd:
        raise UsageError(
            f"{path}: has an entry {odd[0]!r}, and tracked keys are strings; put all of it under one: --key"
        )
    return dict(state)
