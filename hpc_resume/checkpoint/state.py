"""The tracked state: from live PyTorch objects to pieces and typed JSON, and back.

What a rank stores follows from its own tensors alone: a ``DTensor`` says which box of the global tensor it
holds and who holds the same box; parameters under ``DistributedDataParallel`` and their optimizer state are
the same on every rank. Those replicas are split among their holders. Any other plain tensor is taken whole
from rank 0, because nothing says that the ranks agree on it (DDP itself takes buffers from rank 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.boxes import Box, Replica, split_replicas
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.shard import Piece
from hpc_resume.errors import IntegrityError, MismatchError, StateError

#: Names under this are no tensors of the model but one rank's own (generators, differing objects).
RANKS = "ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """One rank's part of a state.

    Parameters
    ----------
    pieces
        What this rank stores. Their bytes are the live tensors' own where those are contiguous on the CPU:
        write them before training goes on.
    objects
        The non-tensor state as typed JSON, by tracked key.
    """

    pieces: tuple[Piece, ...]
    objects: Any


class TrackedState:
    """The objects that a run saves and restores.

    Parameters
    ----------
    items
        By name: modules, optimizers, anything with ``state_dict`` and ``load_state_dict``, and plain dicts.
    rank, world_size
        This process's place.

    Raises
    ------
    StateError
        If an item can't be saved and restored.
    """

    def __init__(self, items: Mapping[str, Any], *, rank: int, world_size: int) -> None:
        for key, item in items.items():
            if key == RANKS:
                raise StateError(f"track({key}=…): the name is taken; choose another")
            stateful = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
            if not stateful and not isinstance(item, dict):
                raise StateError(
                    f"track({key}=…): an object of type {type(item).__qualname__} has no state_dict() and "
                    "load_state_dict(); give it those, or track a dict"
                )
        self._items = dict(items)
        self._rank = rank
        self._world_size = world_size
        self._modules = {k: v for k, v in items.items() if isinstance(v, torch.nn.Module)}
        self._owners = {
            key: self._owner(key, item)
            for key, item in items.items()
            if isinstance(item, torch.optim.Optimizer)
        }

    def _owner(self, key: str, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
        """Find the module that has all of an optimizer's parameters: its state is stored under their names."""
        wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for module in self._modules.values():
            if wanted <= {id(p) for p in module.parameters()}:
                return module
        together = torch.nn.ModuleDict(self._modules)
        if wanted <= {id(p) for p in together.parameters()}:
            return together
        raise StateError(
            f"track({key}=…): this optimizer has parameters of a module that is not tracked; track the module "
            "with it: run.track(model=model, optimizer=optimizer)"
        )

    # ---------------------------------------------------------------- capture

    def capture(self, private: Mapping[str, torch.Tensor]) -> Captured:
        """Take this rank's part of the state.

        Parameters
        ----------
        private
            This rank's own tensors (generators), by name.

        Raises
        ------
        StateError
            If something in it can't be stored; the message names its path.
        """
        tree = {}
        leaves: dict[str, torch.Tensor] = {}
        for key in self._items:
            tree[key], found = _flatten(key, self._state_of(key))
            leaves.update(found)
        replicated = self._replicated_storages()
        pieces: list[Piece] = []
        shared: list[Replica] = []
        for name, tensor in leaves.items():
            box, holders = self._place(tensor, replicated)
            if box is None:
                continue
            if len(holders) > 1:
                shared.append(
                    Replica(name=name, box=box, item_bytes=tensor.element_size(), holders=tuple(holders))
                )
            elif self._rank in holders:
                pieces.append(_piece(name, tensor, box, box))
        for replica, (name, share) in zip(
            sorted(shared, key=lambda replica: replica.name), split_replicas(shared, self._rank), strict=True
        ):
            if share is not None:
                pieces.append(_piece(name, leaves[name], replica.box, share))
        for name, tensor in {**private, "objects": _as_bytes(tree)}.items():
            whole = Box.whole(tensor.shape)
            pieces.append(_piece(f"{RANKS}/{self._rank:05d}/{name}", tensor, whole, whole))
        return Captured(pieces=tuple(sorted(pieces, key=lambda piece: piece.name)), objects=tree)

    def _state_of(self, key: str) -> Any:
        item = self._items[key]
        if key in self._modules:
            return get_model_state_dict(item)
        if key in self._owners:
            return get_optimizer_state_dict(self._owners[key], item)
        return item if isinstance(item, dict) else item.state_dict()

    def _replicated_storages(self) -> set[int]:
        """Addresses of plain tensors that DDP keeps equal on all ranks: parameters and their moments."""
        parameters = {
            id(parameter)
            for tracked in self._modules.values()
            for module in tracked.modules()
            if isinstance(module, DistributedDataParallel)
            for parameter in module.parameters()
        }
        found = set()
        for module in self._modules.values():
            found |= {p.data_ptr() for p in module.parameters() if id(p) in parameters}
        for key in self._owners:
            for parameter, state in self._items[key].state.items():
                if id(parameter) in parameters:
                    found |= {
                        value.data_ptr()
                        for value in state.values()
                        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
                    }
        return found

    def _place(self, tensor: torch.Tensor, replicated: set[int]) -> tuple[Box | None, Sequence[int]]:
        """Box of the global tensor that this rank holds, and all ranks that hold the same."""
        if isinstance(tensor, DTensor):
            return _place_dtensor(tensor)
        if tensor.numel() and tensor.data_ptr() in replicated:
            return Box.whole(tensor.shape), range(self._world_size)
        return Box.whole(tensor.shape), (0,)

    # ---------------------------------------------------------------- restore

    def restore(self, reader: CheckpointReader) -> None:
        """Load a checkpoint into the tracked objects.

        Raises
        ------
        MismatchError
            If names, shapes or types differ; lists every difference, and nothing was changed.
        IntegrityError
            If bytes are damaged; the objects are then partly overwritten, and must be restored from
            another checkpoint.
        """
        tree = self._saved_objects(reader)
        targets = self._targets(tree, reader)
        for name, tensor in targets.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            box, _ = self._place(tensor, set())
            if box is not None and local.numel():
                with torch.no_grad():
                    reader.read(name, box, local.detach())
        for key, item in self._items.items():
            state = objects.decode(tree[key], lambda tag, name: _leaf(tag, targets[name]))
            if key in self._modules:
                set_model_state_dict(item, state)
            elif key in self._owners:
                set_optimizer_state_dict(self._owners[key], item, state)
            elif isinstance(item, dict):
                item.clear()
                item.update(state)
            else:
                item.load_state_dict(state)

    def private(self, reader: CheckpointReader, rank: int) -> dict[str, torch.Tensor]:
        """Read what a rank had for itself when the checkpoint was written, by name."""
        prefix = f"{RANKS}/{rank:05d}/"
        found = {}
        for name, record in reader.manifest.tensors.items():
            if name.startswith(prefix):
                tensor = torch.empty(record.shape, dtype=dtypes.torch_dtype(record.dtype))
                reader.read(name, Box.whole(record.shape), tensor)
                found[name.removeprefix(prefix)] = tensor
        return found

    def _saved_objects(self, reader: CheckpointReader) -> Any:
        manifest = reader.manifest
        if manifest.differing_ranks and manifest.world_size != self._world_size:
            paths = ", ".join(sorted(self._items))
            raise MismatchError(
                f"{reader.folder}: the non-tensor state ({paths}) of ranks "
                f"{list(manifest.differing_ranks)[:8]} differed from rank 0's when it was saved on "
                f"{manifest.world_size} ranks, so there is no telling what {self._world_size} ranks should "
                f"get: continue on {manifest.world_size} ranks, or track only state that all ranks share"
            )
        if self._rank in manifest.differing_ranks:
            data = self.private(reader, self._rank)["objects"].numpy().tobytes()
            return objects.parse(data)
        return manifest.objects

    def _targets(self, tree: Any, reader: CheckpointReader) -> dict[str, torch.Tensor]:
        """Tensors to read into, by name in the checkpoint."""
        problems = _key_problems(set(self._items), set(tree))
        targets: dict[str, torch.Tensor] = {}
        for key in self._items.keys() & tree.keys():
            names = objects.tensor_names(tree[key])
            for name in names:
                if name not in reader.manifest.tensors:
                    raise IntegrityError(f"{reader.folder}: {name} stands in the state but has no bytes")
            if key in self._modules:
                have = _flatten(key, self._state_of(key))[1]
                problems += [
                    f"{n}: in the model, not in the checkpoint" for n in sorted(have.keys() - set(names))
                ]
                problems += [
                    f"{n}: in the checkpoint, not in the model" for n in sorted(set(names) - have.keys())
                ]
                for name in have.keys() & set(names):
                    problems += _shape_problems(name, have[name], reader)
                targets.update({name: have[name] for name in names if name in have})
            elif key in self._owners:
                targets.update(self._optimizer_targets(key, names, reader))
            else:
                templates = _flatten(key, self._state_of(key))[1]
                for name in names:
                    targets[name] = _new(name, templates.get(name), reader)
        if problems:
            raise MismatchError(
                f"{reader.folder}: does not fit the tracked state:\n  " + "\n  ".join(sorted(problems))
            )
        return targets

    def _optimizer_targets(
        self, key: str, names: Sequence[str], reader: CheckpointReader
    ) -> dict[str, torch.Tensor]:
        """Make new tensors, laid out as the parameters that they belong to."""
        by_name = {
            f"{key}/state/{_escape(fqn)}/": parameter
            for fqn, parameter in parameter_names(self._owners[key]).items()
        }
        return {name: _new(name, by_name.get(name.rsplit("/", 1)[0] + "/"), reader) for name in names}


def parameter_names(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a module's parameters by fully qualified name, without the wrappers' own components."""
    found = {}
    for raw, parameter in module.named_parameters():
        parts: list[str] = []
        owner: Any = module
        for part in raw.split("."):
            wrapper = isinstance(owner, DistributedDataParallel) and part == "module"
            if not wrapper and part not in {"_orig_mod", "_checkpoint_wrapped_module"}:
                parts.append(part)
            owner = getattr(owner, part)
        found[".".join(parts)] = parameter
    return found


def _place_dtensor(tensor: DTensor) -> tuple[Box | None, Sequence[int]]:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None, ()
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else position
        for placement, position in zip(tensor.placements, coordinate, strict=True)
    )
    holders = sorted(int(rank) for rank in mesh.mesh[index].flatten())
    return Box(tuple(chunk.offsets), tuple(chunk.sizes)), holders


def _flatten(key: str, state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Typed JSON of a state, and its tensors by name."""
    leaves: dict[str, torch.Tensor] = {}

    def name_tensor(value: Any, path: tuple[str, ...]) -> dict[str, str] | None:
        if isinstance(value, np.ndarray):
            if value.dtype.hasobject or value.dtype.kind not in "biufc":
                return None
            tag, tensor = "$ndarray", torch.from_numpy(np.ascontiguousarray(value))
        elif isinstance(value, torch.Tensor):
            tag, tensor = "$tensor", value
        else:
            return None
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise StateError(f"{'/'.join(path)}: a tensor of layout {tensor.layout} can't be stored")
        dtypes.name_of(tensor.dtype)
        name = "/".join(map(_escape, path))
        if name in leaves:
            raise StateError(f"{name}: two entries of the state have this name")
        leaves[name] = tensor
        return {tag: name}

    return objects.encode(state, (key,), name_tensor), leaves


def _escape(component: str) -> str:
    """Make one component of a name that HDF5 takes as a link's name."""
    escaped = component.replace("%", "%25").replace("/", "%2F")
    return "%2E" if escaped == "." else escaped or "%"


def _piece(name: str, tensor: torch.Tensor, held: Box, share: Box) -> Piece:
    """Bytes of a box, out of the box that this rank holds."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    part = local.detach()[share.slices_in(held)].resolve_conj().resolve_neg().contiguous().cpu()
    data = part.reshape(-1).view(torch.uint8).numpy().data
    return Piece(
        name=name, dtype=dtypes.name_of(tensor.dtype), shape=tuple(tensor.shape), box=share, data=data
    )


def _as_bytes(tree: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(objects.dump(tree)), dtype=torch.uint8)


def _leaf(tag: str, tensor: torch.Tensor) -> Any:
    return tensor.numpy() if tag == "$ndarray" else tensor


def _new(name: str, like: torch.Tensor | None, reader: CheckpointReader) -> torch.Tensor:
    record = reader.manifest.tensors[name]
    dtype = dtypes.torch_dtype(record.dtype)
    if like is not None and tuple(like.shape) == record.shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(record.shape, dtype=dtype)


def _key_problems(tracked: set[str], saved: set[str]) -> list[str]:
    return [f"{key}: tracked now, not in the checkpoint" for key in tracked - saved] + [
        f"{key}: in the checkpoint, not tracked now" for key in saved - tracked
    ]


def _shape_problems(name: str, tensor: torch.Tensor, reader: CheckpointReader) -> list[str]:
    record = reader.manifest.tensors[name]
    problems = []
    if tuple(tensor.shape) != record.shape:
        problems.append(f"{name}: shape {list(tensor.shape)}, in the checkpoint {list(record.shape)}")
    if dtypes.name_of(tensor.dtype) != record.dtype:
        problems.append(f"{name}: {dtypes.name_of(tensor.dtype)}, in the checkpoint {record.dtype}")
    return problems
