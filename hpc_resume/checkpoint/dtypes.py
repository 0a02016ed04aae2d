"""Element types: their names in a manifest, their sizes, and how HDF5 spells them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hpc_resume.errors import IntegrityError, StateError

if TYPE_CHECKING:
    import torch

#: Bytes of one element, by the name that stands in manifests (PyTorch's name without ``torch.``).
ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e5m2": 1,
    "float8_e4m3fn": 1,
    "complex64": 8,
    "complex128": 16,
}

#: Element types by the names of the safetensors format.
#: Source: https://github.com/huggingface/safetensors#format.
SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def item_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises
    ------
    IntegrityError
        If the name is unknown: it comes from a manifest.
    """
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise IntegrityError(f"unknown element type {dtype!r:.40}; known: {', '.join(ITEM_BYTES)}") from None


@lru_cache(maxsize=64)
def name_of(dtype: torch.dtype) -> str:
    """Name of a PyTorch element type, as manifests spell it.

    Raises
    ------
    StateError
        If tensors of this type can't be stored.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise StateError(f"tensors of type {dtype} can't be stored; known: {', '.join(ITEM_BYTES)}")
    return name


@lru_cache(maxsize=64)
def torch_dtype(name: str) -> torch.dtype:
    """PyTorch's element type for a name."""
    import torch

    item_bytes(name)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(f"{name!r} is no element type of this PyTorch")
    return dtype


def hdf5_type(name: str) -> Any:
    """HDF5 type id of an element type, readable by any HDF5 program.

    bf16 and fp8 e5m2 are custom IEEE-like floats, which plain readers convert rightly; fp8 e4m3fn has no
    infinities, which HDF5 can't say, so its bytes are stored as uint8 with the type's name beside them.
    """
    import h5py
    import numpy as np

    if name in {"bfloat16", "float8_e5m2"}:
        size, mantissa, exponent, bias = (2, 7, 8, 127) if name == "bfloat16" else (1, 2, 5, 15)
        base = h5py.h5t.IEEE_F16LE.copy()
        # Fields first, then size and bias: HDF5 checks each step, and a smaller size must already fit.
        base.set_fields(mantissa + exponent, mantissa, exponent, 0, mantissa)
        base.set_precision(8 * size)
        base.set_size(size)
        base.set_ebias(bias)
        return base
    plain = {"float8_e4m3fn": "uint8"}.get(name, name)
    return h5py.h5t.py_create(np.dtype(plain), logical=True)
