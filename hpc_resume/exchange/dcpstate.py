"""What ranks tell the coordinator of a save, put together: the tensors, and typed JSON that names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.errors import StateError
from hpc_resume.exchange.tree import nested


@dataclass(frozen=True, slots=True)
class Stored:
    """What a rank tells the coordinator of one item: a box, or a value in the manifest."""

    dtype: str
    shape: tuple[int, ...]
    box: Box | None
    node: Any = None


def gathered(metadata: Metadata, results: list[list[WriteResult]]) -> tuple[Structure, Any]:
    """Put together what all ranks have stored: the tensors, and typed JSON that names them."""
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    boxes: dict[str, list[tuple[int, Box]]] = {}
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    nodes: dict[str, Any] = {}
    for rank, written in enumerate(results):
        for each in written:
            fqn, stored = each.index.fqn, each.storage_data
            if not isinstance(stored, Stored):
                continue
            if stored.box is None:
                nodes[fqn] = stored.node
                continue
            name = name_of(paths.get(fqn, (fqn,)))
            if described.setdefault(name, (stored.shape, stored.dtype)) != (stored.shape, stored.dtype):
                raise StateError(f"{fqn}: {stored.dtype} {list(stored.shape)} on rank {rank} only")
            saved = isinstance(metadata.state_dict_metadata[fqn], BytesStorageMetadata)
            nodes[fqn] = {"$saved" if saved else "$tensor": name}
            boxes.setdefault(name, [])
            if stored.box.volume:
                boxes[name].append((rank, stored.box))
    records = {
        name: TensorRecord(shape, dtype, None, tuple(boxes[name]))
        for name, (shape, dtype) in described.items()
    }
    tree = nested((tuple(paths.get(fqn, (fqn,))), _Node(node)) for fqn, node in nodes.items())
    return Structure(records), {key: _unwrapped(value) for key, value in tree.items()}


@dataclass(frozen=True, slots=True)
class _Node:
    """Typed JSON that is not to be taken for a container of the state."""

    json: Any


def _unwrapped(value: Any) -> Any:
    """Turn nested containers of typed JSON into typed JSON."""
    if isinstance(value, _Node):
        return value.json
    if isinstance(value, list):
        return [_unwrapped(item) for item in value]
    if isinstance(value, dict):
        if any(key.startswith("$") for key in value):
            return {"$dict": [[key, _unwrapped(item)] for key, item in value.items()]}
        return {key: _unwrapped(item) for key, item in value.items()}
    return value


def name_of(path: tuple[str | int, ...]) -> str:
    """Name of the tensor at a path."""
    return "/".join(escape(str(part)) for part in path)
