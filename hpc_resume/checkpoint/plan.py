"""The plan of a save: what all ranks store of a state, and what this one does.

It follows from the structure of the state alone, and is made again only when that has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint import dtypes, witnesses
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.health import Roles, roles_of
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.layout import Layout, spread
from hpc_resume.checkpoint.placement import kept_equal_by_ddp, layout_of
from hpc_resume.checkpoint.snapshot import pieces_of
from hpc_resume.checkpoint.standin import held_box
from hpc_resume.checkpoint.structure import Structure, TensorRecord

#: Names under this are no tensors of the model but one rank's own (generators, differing objects).
RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Plan:
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
        What to look at of tensors that are stored once and that each rank has, to compare it with the other ranks'.
    roles
        What the tensors are for.
    """

    signature: list[Any]
    structure: Structure
    pieces: tuple[Piece, ...]
    cuts: tuple[tuple[str, tuple[slice, ...] | None], ...]
    witnesses: tuple[witnesses.Look, ...]
    roles: Roles


class Planner:
    """Makes plans, and keeps them.

    Parameters
    ----------
    modules, optimizers
        All that are tracked, by key.
    rank, world_size
        This process's place.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._modules = modules
        self._optimizers = optimizers
        self._rank = rank
        self._world_size = world_size
        self._replicas = world_size > 1 and any(
            isinstance(module, DistributedDataParallel)
            for tracked in modules.values()
            for module in tracked.modules()
        )
        self._plans: dict[int, Plan] = {}

    def plan(self, leaves: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Plan:
        """Decide who stores what; the same plan as before while nothing but values has changed.

        Parameters
        ----------
        leaves
            The tensors of the state, by name.
        own
            Those of this rank alone.
        """
        replicated: dict[int, Layout] = {}
        if self._replicas:
            replicated = kept_equal_by_ddp(self._modules.values(), self._optimizers.values())
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
            plan = self._plans[len(signature)] = self._make(signature, leaves, own, replicated)
        return plan

    def _make(
        self,
        signature: list[Any],
        leaves: Mapping[str, torch.Tensor],
        own: Mapping[str, torch.Tensor],
        replicated: Mapping[int, Layout],
    ) -> Plan:
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
        chosen: tuple[witnesses.Look, ...] = ()
        if self._world_size > 1:
            chosen = witnesses.choose(leaves, records, modules=self._modules, optimizers=self._optimizers)
        roles = roles_of(leaves, self._modules, self._optimizers)
        return Plan(signature, structure, (*pieces, *private), tuple(cuts), chosen, roles)
