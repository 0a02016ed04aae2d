"""safetensors files: a JSON header, then the tensors end to end.

Reading is the package's; writing is ours, because the package wants all tensors in memory at once. Source: the
format's specification, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_resume.checkpoint.dtypes import SAFETENSORS as DTYPES
from hpc_resume.checkpoint.dtypes import item_bytes, torch_dtype
from hpc_resume.errors import IntegrityError, StateError, UsageError
from hpc_resume.exchange.incoming import MODEL, Incoming, Item
from hpc_resume.files import DISK, Filesystem

if TYPE_CHECKING:
    import torch

    from hpc_resume.checkpoint.structure import TensorRecord

_SPELLED = {name: spelled for spelled, name in DTYPES.items()}
#: The non-tensor state of our own exports, as typed JSON, in the header's metadata.
STATE = "hpc_resume"
#: Longest header that readers take. Source: the specification.
_LONGEST_HEADER_BYTES = 100_000_000


def check(records: Mapping[str, TensorRecord]) -> None:
    """Check that tensors of these types can be written.

    Raises
    ------
    StateError
        If not; names all that can't.
    """
    lacking = [f"{name} ({record.dtype})" for name, record in records.items() if record.dtype not in _SPELLED]
    if lacking:
        raise StateError(
            f"safetensors has no element type for {', '.join(lacking[:8])}; leave them out with --names, or "
            "export to a .pt file"
        )


def write(
    path: Path,
    records: Mapping[str, TensorRecord],
    load: Callable[[str], torch.Tensor],
    *,
    state: Any = None,
    fs: Filesystem = DISK,
) -> None:
    """Write a file, durable on return, tensor by tensor.

    Parameters
    ----------
    path
        It must not exist.
    records
        Shape and element type of each tensor by name.
    load
        Gives a tensor by its name.
    state
        Typed JSON for the metadata.
    fs
        The filesystem.

    Raises
    ------
    StateError
        If the header would be too long.
    """
    metadata = {"format": "pt"}
    if state is not None:
        metadata[STATE] = json.dumps(state, separators=(",", ":"), allow_nan=False)
    header: dict[str, Any] = {"__metadata__": metadata}
    # Wide elements first, so that each tensor lies at a multiple of its element.
    order = sorted(records, key=lambda name: (-item_bytes(records[name].dtype), name))
    offset = 0
    for name in order:
        record = records[name]
        header[name] = {
            "dtype": _SPELLED[record.dtype],
            "shape": list(record.shape),
            "data_offsets": [offset, offset + record.size_bytes],
        }
        offset += record.size_bytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data = data.ljust(-(-len(data) // 8) * 8)
    if len(data) > _LONGEST_HEADER_BYTES:
        raise StateError(
            f"its header would take {len(data)} bytes, and safetensors readers take {_LONGEST_HEADER_BYTES}: "
            "export less of it with --names or --key"
        )
    fd = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        position = 8 + len(data)
        fs.write_all(fd, len(data).to_bytes(8, "little") + data, 0)
        for name in order:
            position += _write_tensor(fd, load(name), position, fs)
        fs.fsync(fd)
    finally:
        fs.close(fd)


def _write_tensor(fd: int, tensor: torch.Tensor, position: int, fs: Filesystem) -> int:
    from hpc_resume.checkpoint.snapshot import bytes_of

    data = bytes_of(tensor)
    fs.write_all(fd, data.data, position)
    return len(data)


def read(paths: Sequence[Path], key: str | None = None) -> Incoming:
    """Open files; the tensors are read when they are asked for.

    Parameters
    ----------
    paths
        Together one state dict.
    key
        The tracked key to put it under; without it ``model``, or as it was exported.

    Raises
    ------
    UsageError
        If the package is not installed, or two files have a tensor of one name.
    IntegrityError
        If a file is damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UsageError(
            f"{paths[0]}: reading safetensors files needs the package of that name: "
            "pip install 'hpc_resume[exchange]'"
        ) from error
    items: dict[str, Item] = {}
    state = None
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in items:
                    raise UsageError(f"{path}: {name} stands in another one of the files, too")
                part = file.get_slice(name)
                items[name] = Item(
                    tuple(part.get_shape()), _dtype(path, name, part.get_dtype()), _loader(file, name)
                )
            metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{path}: no sound safetensors file ({error})") from error
        if STATE in metadata and len(paths) == 1:
            try:
                state = json.loads(metadata[STATE])
            except (ValueError, RecursionError) as error:
                raise IntegrityError(f"{path}: its state is damaged ({error})") from error
    if state is None or key is not None:
        return Incoming.of_names(items, key or MODEL)
    return Incoming.of_tree(paths[0], items, state)


def _dtype(path: Path, name: str, spelled: str) -> str:
    if spelled not in DTYPES:
        raise StateError(
            f"{path}: {name}: tensors of type {spelled} can't be stored; known: {', '.join(DTYPES)}"
        )
    torch_dtype(DTYPES[spelled])
    return DTYPES[spelled]


def _loader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return load
