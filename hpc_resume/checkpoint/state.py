"""The tracked state: from live PyTorch objects to pieces and typed JSON, and back.

What a rank stores follows from its own tensors alone: a ``DTensor`` says how its mesh splits it; parameters
under ``DistributedDataParallel`` and their optimizer state are the same on every rank. Those replicas are split
among their holders. Any other plain tensor is taken whole from rank 0, because nothing says that the ranks agree
on it (DDP itself takes buffers from rank 0); where they plainly do not, the checkpoint is refused (``witnesses``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint import dtypes, objects, optimizers, witnesses
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.fit import (
    Target,
    check_names,
    key_problems,
    made_targets,
    module_targets,
    optimizer_targets,
    present,
)
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.layout import Layout, spread
from hpc_resume.checkpoint.leaves import flatten, leaf
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.placement import kept_equal_by_ddp, layout_of, local_of
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.checkpoint.snapshot import Captured, pieces_of
from hpc_resume.checkpoint.standin import held_box
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.errors import IntegrityError, MismatchError, StateError

#: Names under this are no tensors of the model but one rank's own (generators, differing objects).
RANKS = "ranks"
#: A rank's own non-tensor state takes a whole number of these, so that the file's layout stays the same while
#: its numbers get longer and shorter.
_OBJECTS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is stored of a state, while its structure stays the same.

    Parameters
    ----------
    signature
        What the plan was made from.
    structure, pieces
        What all store, and what this rank stores.
    cuts
        For each piece of a tracked tensor, its name and the slices of what this rank holds; None for all of it.
    witnesses
        Names of tensors of which rank 0's are stored, to compare the other ranks' with.
    """

    signature: list[Any]
    structure: Structure
    pieces: tuple[Piece, ...]
    cuts: tuple[tuple[str, tuple[slice, ...] | None], ...]
    witnesses: tuple[str, ...]


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
        self._replicas = world_size > 1 and any(
            isinstance(module, DistributedDataParallel)
            for tracked in self._modules.values()
            for module in tracked.modules()
        )
        self._plans: dict[int, _Plan] = {}
        self._objects_bytes = 0
        self._owners = {
            key: self._owner(key, item)
            for key, item in items.items()
            if isinstance(item, torch.optim.Optimizer)
        }

    @property
    def items(self) -> Mapping[str, Any]:
        """What is tracked, by name."""
        return self._items

    @property
    def modules(self) -> tuple[str, ...]:
        """Keys of the tracked modules."""
        return tuple(self._modules)

    def held_bytes(self) -> int:
        """Bytes of the tracked modules that this rank holds itself."""
        tensors = {
            id(tensor): local_of(tensor)
            for module in self._modules.values()
            for tensor in (*module.parameters(), *module.buffers())
        }
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _owner(self, key: str, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
        """Find the module that has all of an optimizer's parameters: its state is stored under their names."""
        zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
        if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
            raise StateError(
                f"track({key}=…): ZeroRedundancyOptimizer has a part of its state on each rank and does not say which; "
                "use FSDP2 (torch.distributed.fsdp.fully_shard) with a plain optimizer, which shards it, too"
            )
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

    @paused_collector()
    def capture(self, private: Mapping[str, torch.Tensor], keys: Iterable[str] | None = None) -> Captured:
        """Take this rank's part of the state.

        Parameters
        ----------
        private
            This rank's own tensors (generators), by name.
        keys
            What of the tracked items; all by default.

        Raises
        ------
        StateError
            If something in it can't be stored; the message names its path.
        """
        tree = {}
        leaves: dict[str, torch.Tensor] = {}
        for key in self._items if keys is None else keys:
            tree[key], found = flatten(key, self._state_of(key))
            leaves.update(found)
        own = dict(private)
        if self._rank != 0:  # rank 0's stands in the manifest
            own["objects"] = self._own_objects(tree)
        plan = self._plan(leaves, own)
        sources = [
            local_of(leaves[name]) if cut is None else local_of(leaves[name])[cut] for name, cut in plan.cuts
        ]
        return Captured(
            structure=plan.structure,
            pieces=plan.pieces,
            sources=(*sources, *own.values()),
            objects=tree,
            leaves=leaves,
            witnesses=witnesses.take({name: leaves[name] for name in plan.witnesses}),
        )

    def _own_objects(self, tree: Any) -> torch.Tensor:
        """Write the non-tensor state of this rank as bytes, filled up with spaces."""
        data = objects.dump(tree)
        if len(data) > self._objects_bytes:
            self._objects_bytes = -(-(len(data) + len(data) // 8) // _OBJECTS_BYTES) * _OBJECTS_BYTES
        return torch.frombuffer(bytearray(data.ljust(self._objects_bytes)), dtype=torch.uint8)

    def _plan(self, leaves: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> _Plan:
        """Decide who stores what; the same plan as before while nothing but values has changed."""
        replicated: dict[int, Layout] = {}
        if self._replicas:
            tracked = (self._items[key] for key in self._owners)
            replicated = kept_equal_by_ddp(self._modules.values(), tracked)
        signature: list[Any] = [
            (
                name,
                tensor.shape,
                tensor.dtype,
                (tensor.device_mesh, tensor.placements, tensor.to_local().shape)
                if isinstance(tensor, DTensor)
                else replicated.get(tensor.data_ptr()),
            )
            for name, tensor in leaves.items()
        ]
        signature += [(name, tensor.shape) for name, tensor in own.items()]
        plan = self._plans.get(len(signature))
        if plan is None or plan.signature != signature:
            plan = self._plans[len(signature)] = self._make_plan(signature, leaves, own, replicated)
        return plan

    def _make_plan(
        self,
        signature: list[Any],
        leaves: Mapping[str, torch.Tensor],
        own: Mapping[str, torch.Tensor],
        replicated: Mapping[int, Layout],
    ) -> _Plan:
        leader = Layout.replicated((0,))
        sharded = {n: layout_of(n, t, self._rank) for n, t in leaves.items() if isinstance(t, DTensor)}
        whole = spread(sharded.values())
        records = {}
        for name, tensor in leaves.items():
            if name in sharded:
                layout = whole[sharded[name]]
            else:
                layout = replicated.get(tensor.data_ptr(), leader) if tensor.numel() else leader
            records[name] = TensorRecord(tuple(tensor.shape), dtypes.name_of(tensor.dtype), layout)
        structure = Structure(records)
        pieces = pieces_of(structure, self._rank)
        cuts = []
        for piece in pieces:
            held = held_box(records[piece.name], self._rank)
            assert held is not None
            cuts.append((piece.name, None if held == piece.box else piece.box.slices_in(held)))
        private = [
            Piece(
                f"{RANKS}/{self._rank:05d}/{name}",
                dtypes.name_of(tensor.dtype),
                tuple(tensor.shape),
                Box.whole(tensor.shape),
            )
            for name, tensor in own.items()
        ]
        return _Plan(signature, structure, (*pieces, *private), tuple(cuts), self._witnesses(leaves, records))

    def _witnesses(
        self, leaves: Mapping[str, torch.Tensor], records: Mapping[str, TensorRecord]
    ) -> tuple[str, ...]:
        if self._world_size == 1:
            return ()
        parameters = {p.data_ptr() for module in self._modules.values() for p in module.parameters()}
        modules, owners = set(map(escape, self._modules)), set(map(escape, self._owners))
        named = {n: t for n, t in leaves.items() if n.split("/", 1)[0] not in owners}
        states = {n: t for n, t in leaves.items() if n.split("/", 1)[0] in owners}
        return (
            *witnesses.pick(named, records, modules=modules, parameters=parameters),
            *witnesses.pick_replicas(states, records),
        )

    def _state_of(self, key: str) -> Any:
        item = self._items[key]
        if key in self._modules:
            return get_model_state_dict(item)
        if key in self._owners:
            return optimizers.state_of(self._owners[key], item)
        return item if isinstance(item, dict) else item.state_dict()

    # ---------------------------------------------------------------- restore

    @paused_collector()
    def restore(self, reader: CheckpointReader) -> None:
        """Load a checkpoint into the tracked objects.

        Raises
        ------
        MismatchError
            If names, shapes or types differ; lists every difference, and nothing was changed. Or if an object
            refuses what was saved of it; others are then overwritten already.
        IntegrityError
            If bytes are damaged; the objects are then partly overwritten, and must be restored from
            another checkpoint.
        """
        tree = self._saved_objects(reader)
        targets = self._targets(tree, reader)
        wanted: dict[Any, Wanted] = {}
        for name, tensor in targets.values():
            local = local_of(tensor)
            if local.numel():
                wanted[name, local.data_ptr()] = Wanted(name, self._box_of(name, tensor), local)
        with torch.no_grad():
            reader.read_all(wanted.values())
        states = {
            key: objects.decode(tree[key], lambda tag, name: leaf(tag, targets[name][1]))
            for key in self._items
        }
        for key, state in states.items():
            try:
                self._set(key, state)
            except Exception as error:
                raise MismatchError(
                    f"{reader.folder}: {key} can't be restored from what was saved of it: "
                    f"{type(error).__name__}: {error!s:.300}"
                ) from error

    def _set(self, key: str, state: Any) -> None:
        item = self._items[key]
        if key in self._modules:
            set_model_state_dict(item, state)
        elif key in self._owners:
            optimizers.load_state(self._owners[key], item, state)
        elif isinstance(item, dict):
            fresh = dict(state)
            item.clear()
            item.update(fresh)
        else:
            item.load_state_dict(state)

    def _box_of(self, name: str, tensor: torch.Tensor) -> Box:
        if not isinstance(tensor, DTensor):
            return Box.whole(tensor.shape)
        layout = layout_of(name, tensor, self._rank)
        group = layout.group_of(self._rank)
        assert group is not None
        return layout.box(tensor.shape, group)

    def private(self, reader: CheckpointReader, rank: int) -> dict[str, torch.Tensor]:
        """Read what a rank had for itself when the checkpoint was written, by name."""
        return reader.private(rank, f"{RANKS}/{rank:05d}/")

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
            own = self.private(reader, self._rank).get("objects")
            if own is None or own.dtype != torch.uint8:
                raise IntegrityError(f"{reader.folder}: rank {self._rank}'s non-tensor state is not there")
            return objects.parse(own.numpy().tobytes())
        return manifest.objects

    def _targets(self, tree: Any, reader: CheckpointReader) -> dict[str, Target]:
        """Tensors to read into, by name: each with the name under which it is stored."""
        if not isinstance(tree, dict):
            raise IntegrityError(f"{reader.folder}: its non-tensor state is no mapping")
        problems = key_problems(set(self._items), set(tree))
        targets: dict[str, Target] = {}
        for key in self._items.keys() & tree.keys():
            names = objects.tensor_names(tree[key])
            check_names(names, targets, reader)
            if key in self._owners:
                owner, item = self._owners[key], self._items[key]
                problems += optimizer_targets(key, owner, item, tree[key], reader, targets)
                continue
            have = present(key, self._state_of(key))
            if key in self._modules:
                problems += module_targets(have, names, self._box_of, reader, targets)
            else:
                made_targets(have, names, reader, targets)
        if problems:
            raise MismatchError(
                f"{reader.folder}: does not fit the tracked state:\n  "
                + "\n  ".join(sorted(problems))
                + "\nTrack what the checkpoint was taken of, or begin a new run in another run_dir; to take over "
                "what fits: hr.Checkpoint(old_run_dir).load_into(model, strict=False)"
            )
        return targets
