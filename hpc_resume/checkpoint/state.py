"""The tracked state: from live PyTorch objects to pieces and typed JSON, and back.

What a rank stores follows from its own tensors alone: a ``DTensor`` says how its mesh splits it; parameters
under ``DistributedDataParallel`` and their optimizer state are the same on every rank. Those replicas are split
among their holders. Any other plain tensor is taken whole from rank 0, because nothing says that the ranks agree
on it (DDP itself takes buffers from rank 0); where they do not, the checkpoint is refused (``witnesses``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hpc_resume.checkpoint import objects, optimizers, streams, witnesses
from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.fit import (
    Target,
    ask,
    check_names,
    key_problems,
    made_targets,
    module_targets,
    optimizer_targets,
    present,
)
from hpc_resume.checkpoint.gradients import GRADIENTS
from hpc_resume.checkpoint.leaves import flatten, leaf
from hpc_resume.checkpoint.own import Own, private
from hpc_resume.checkpoint.placement import box_of, fill, is_seen_through, local_of
from hpc_resume.checkpoint.plan import RANKS, Planner
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.checkpoint.snapshot import Captured
from hpc_resume.errors import IntegrityError, MismatchError, StateError

#: A rank's own non-tensor state takes a whole number of these, so that the file's layout stays the same while
#: its numbers get longer and shorter.
_OBJECTS_BYTES = 4096
#: What a node lacks, or a device that fails, says nothing of what was saved. PyTorch 2.6 has no AcceleratorError.
_NOT_ITS_FAULT: tuple[type[Exception], ...] = (
    MemoryError,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", MemoryError),
)


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
            if key in {RANKS, GRADIENTS}:
                raise StateError(f"track({key}=…): the name is taken; choose another")
            if streams.is_stream(item):
                streams.check(key, item)
                continue
            stateful = hasattr(item, "state_dict") and hasattr(item, "load_state_dict")
            if not stateful and not isinstance(item, dict):
                raise StateError(
                    f"track({key}=…): an object of type {type(item).__qualname__} has no state_dict() and "
                    f"load_state_dict(); {_instead_of(key, item)}"
                )
            if isinstance(item, torch.nn.Module):
                _check_memory(key, item)
            if isinstance(item, dict | LRScheduler):
                flatten(key, item if isinstance(item, dict) else item.state_dict())  # refused before training
        #: The random generators among them: each rank has its own.
        self.streams = {key: item for key, item in items.items() if streams.is_stream(item)}
        self._items = {key: item for key, item in items.items() if key not in self.streams}
        self._rank = rank
        self._world_size = world_size
        self._modules = {k: v for k, v in items.items() if isinstance(v, torch.nn.Module)}
        self._objects_bytes = 0
        self._owners = {
            key: self._owner(key, item)
            for key, item in items.items()
            if isinstance(item, torch.optim.Optimizer)
        }
        place = {"rank": rank, "world_size": world_size}
        steppers = {key: items[key] for key in self._owners}
        self._planner = Planner(self._modules, steppers, **place)
        self._own = Own(self._modules, steppers.values(), self.streams, **place)
        #: What restoring has changed besides, for people.
        self.notes: list[str] = []

    @property
    def items(self) -> Mapping[str, Any]:
        """What is tracked, by name."""
        return {**self._items, **self.streams}

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
        optimizers.check(key, optimizer)
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
        if keys is None:
            mine, shared = self._own.take()
            own.update(mine)
            leaves.update(shared)
        if self._rank != 0:  # rank 0's stands in the manifest
            own["objects"] = self._own_objects(tree)
        plan = self._planner.plan(leaves, own)
        sources = [
            local_of(leaves[name]) if cut is None else local_of(leaves[name])[cut] for name, cut in plan.cuts
        ]
        return Captured(
            structure=plan.structure,
            pieces=plan.pieces,
            sources=(*sources, *own.values()),
            objects=tree,
            leaves=leaves,
            witnesses=witnesses.take(plan.witnesses, leaves),
            roles=plan.roles,
        )

    def _own_objects(self, tree: Any) -> torch.Tensor:
        """Write the non-tensor state of this rank as bytes, filled up with spaces."""
        data = objects.dump(tree)
        if len(data) > self._objects_bytes:
            self._objects_bytes = -(-(len(data) + len(data) // 8) // _OBJECTS_BYTES) * _OBJECTS_BYTES
        return torch.frombuffer(bytearray(data.ljust(self._objects_bytes)), dtype=torch.uint8)

    def _state_of(self, key: str) -> Any:
        item = self._items[key]
        if key in self._modules:
            return get_model_state_dict(item)
        if key in self._owners:
            optimizers.check(key, item)
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
        spread = self._own.targets(reader)
        wanted: dict[Any, Wanted] = {}
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, tensor in (*targets.values(), *spread.values()):
            local = local_of(tensor)
            if local.numel():
                wanted[name, local.data_ptr()] = Wanted(name, box_of(name, tensor, self._rank), local)
                if is_seen_through(tensor):
                    copies.append((tensor, local))
        with torch.no_grad():
            reader.read_all(wanted.values())
            for tensor, local in copies:
                fill(tensor, local)
        states = {
            key: objects.decode(tree[key], lambda tag, name: leaf(tag, targets[name][1]))
            for key in self._items
        }
        for key, state in states.items():
            try:
                self._set(key, state)
            except _NOT_ITS_FAULT:
                raise
            except Exception as error:
                raise MismatchError(
                    f"{reader.folder}: {key} can't be restored from what was saved of it: "
                    f"{type(error).__name__}: {error!s:.300}"
                ) from error
        gradients = {name: tensor for name, (_, tensor) in spread.items()}
        self.notes = self._own.restore(reader, gradients)

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

    def private(self, reader: CheckpointReader, rank: int, under: str = "") -> dict[str, torch.Tensor]:
        """Read what a rank had for itself when the checkpoint was written, by name below ``under``."""
        return private(reader, rank, under)

    def restore_streams(self, reader: CheckpointReader) -> list[str]:
        """Set the tracked generators to where they were; returns the keys of those of which that can't be told.

        Raises
        ------
        MismatchError
            If one was of another kind.
        IntegrityError
            If a state is damaged.
        """
        return self._own.restore_streams(reader)

    def _saved_objects(self, reader: CheckpointReader) -> Any:
        manifest = reader.manifest
        tree = manifest.objects
        unowned = {key: item for key, item in self._items.items() if key not in self._modules}
        if manifest.differing_ranks and manifest.world_size != self._world_size:
            ask(unowned, tree, reader)  # who knows better what is wrong
            paths = ", ".join(sorted(self._items))
            raise MismatchError(
                f"{reader.folder}: the non-tensor state ({paths}) of ranks "
                f"{list(manifest.differing_ranks)[:8]} differed from rank 0's when it was saved on "
                f"{manifest.world_size} ranks, so there is no telling what {self._world_size} ranks should "
                f"get: continue on {manifest.world_size} ranks, or track only state that all ranks share"
            )
        if self._rank in manifest.differing_ranks:
            own = private(reader, self._rank, "objects").get("")
            if own is None or own.dtype != torch.uint8:
                raise IntegrityError(f"{reader.folder}: rank {self._rank}'s non-tensor state is not there")
            tree = objects.parse(own.numpy().tobytes())
        ask(unowned, tree, reader)
        return tree

    def _targets(self, tree: Any, reader: CheckpointReader) -> dict[str, Target]:
        """Tensors to read into, by name: each with the name under which it is stored."""
        if not isinstance(tree, dict):
            raise IntegrityError(f"{reader.folder}: its non-tensor state is no mapping")
        problems = key_problems(set(self._items), set(tree)) + self._own.problems(reader)
        targets: dict[str, Target] = {}
        for key in self._items.keys() & tree.keys():
            names = objects.tensor_names(tree[key])
            check_names(names, targets, reader)
            if key in self._owners:
                owner, item = self._owners[key], self._items[key]
                problems += optimizer_targets(key, owner, item, tree[key], reader, targets)
                continue
            if not names and key not in self._modules:
                continue
            have = present(key, self._state_of(key))
            if key in self._modules:
                problems += module_targets(have, names, self._rank, reader, targets)
            else:
                made_targets(have, names, reader, targets)
        if problems:
            raise MismatchError(
                f"{reader.folder}: does not fit the tracked state:\n  "
                + "\n  ".join(sorted(problems))
                + "\nTrack what the checkpoint was taken of, or begin a new run in another run_dir; to take over "
                "what fits: hr.Checkpoint(old_run_dir).load_into(model, pattern=…, strict=False)"
            )
        return targets


def _check_memory(key: str, module: torch.nn.Module) -> None:
    """Refuse tensors of which several elements are one in memory: they could be saved, and never read back."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.layout is not torch.strided:
            continue  # refused by name at the save
        local = local_of(tensor)
        if any(size > 1 and stride == 0 for size, stride in zip(local.shape, local.stride(), strict=True)):
            raise StateError(
                f"{key}/{name}: elements of this tensor share memory, as after expand(), so that it can't be restored in "
                "place; register a copy of it: tensor.clone()"
            )


def _instead_of(key: str, item: object) -> str:
    """Say what to track in place of an object without a state."""
    if isinstance(item, DataLoader):
        return "take run.loader(dataset, global_batch=…) in its place, or torchdata's StatefulDataLoader"
    if isinstance(item, (bool, int, float, str)):
        return f"track a dict, whose values may change: {key}={{{key!r}: {item!r}}}"
    return "give it those, or track a dict"
