"""From a DTensor to a layout: what its mesh and placements say, as plain numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.errors import StateError


def layout_of(name: str, tensor: DTensor, rank: int, *, check: bool = True) -> Layout:
    """Say how a DTensor is spread over ranks.

    ``_StridedShard`` (FSDP2 over tensor parallelism) means that its mesh dimension splits after the later ones
    that split the same tensor dimension into ``split_factor`` parts. Where that does not come out even, a DTensor
    can say something else of itself than FSDP2 lets it hold; what it holds counts.

    Parameters
    ----------
    name
        For messages.
    tensor
        The tensor.
    rank
        This process.
    check
        Compare the result with what it holds.

    Raises
    ------
    StateError
        If it can't be stored: sums that are not finished, or a placement that is unknown or not contiguous.
    """
    mesh = tensor.device_mesh
    extents = tuple(mesh.mesh.shape)
    layout = Layout(extents, _ranks(mesh.mesh), _splits(name, tensor, extents))
    group = layout.group_of(rank)
    if group is None:
        raise StateError(
            f"{name}: rank {rank} has no part in its mesh of ranks {list(layout.ranks)[:8]}; track it only there"
        )
    box, local = layout.box(tensor.shape, group), tensor.to_local()
    if check and box.size != tuple(local.shape):
        raise StateError(
            f"{name}: rank {rank} holds {list(local.shape)} of {list(tensor.shape)}, but {tensor.placements} over a "
            f"mesh of {list(extents)} means {list(box.size)}: this kind of sharding can't be stored"
        )
    return layout


def _splits(name: str, tensor: DTensor, extents: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Order in which mesh dimensions split the tensor: ``(mesh dimension, tensor dimension)``."""
    order: list[tuple[int, int]] = []
    # The rightmost first: each one stands before those to its right, unless it is strided.
    for mesh_dim, placement in reversed(list(enumerate(tensor.placements))):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, Partial):
            raise StateError(
                f"{name}: its parts are still to be summed ({placement}); redistribute it before saving"
            )
        factor = getattr(placement, "split_factor", None)
        if factor is None and not isinstance(placement, Shard):
            raise StateError(f"{name}: tensors placed by {placement} can't be stored")
        dim = placement.dim  # type: ignore[attr-defined]
        place = _place(order, extents, dim, 1 if factor is None else int(factor))
        if place is None:
            raise StateError(
                f"{name}: {tensor.placements} over a mesh of {list(extents)} leaves each rank with pieces that do not "
                "lie together; this kind of sharding can't be stored"
            )
        order.insert(place, (mesh_dim, dim))
    return tuple(order)


def _place(order: Sequence[tuple[int, int]], extents: tuple[int, ...], dim: int, factor: int) -> int | None:
    """Where in an order a split belongs that comes after others that have made ``factor`` parts; None: nowhere."""
    parts = 1
    for place, (mesh_dim, other) in enumerate(order):
        if parts == factor:
            return place
        if other == dim:
            parts *= extents[mesh_dim]
    return len(order) if parts == factor else None


def _ranks(mesh: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(rank) for rank in mesh.flatten().tolist())


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, as plain values: its own memory, unless :func:`is_seen_through`."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.requires_grad:
        local = local.detach()
    if local.is_conj() or local.is_neg():
        return local.resolve_conj().resolve_neg()
    return local


def is_seen_through(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the conjugate, or the negative, of what is in its memory: a lazy view of PyTorch's."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.is_conj() or local.is_neg()


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Set what this rank holds of a tensor, whatever its memory is to it."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local.detach().copy_(values)


def box_of(name: str, tensor: torch.Tensor, rank: int) -> Box:
    """Say which part of a tensor a rank holds; see :func:`layout_of`."""
    if not isinstance(tensor, DTensor):
        return Box.whole(tensor.shape)
    layout = layout_of(name, tensor, rank)
    group = layout.group_of(rank)
    assert group is not None
    return layout.box(tensor.shape, group)


def wrapped_by_ddp(modules: Iterable[torch.nn.Module]) -> set[torch.nn.Parameter]:
    """Give the parameters of all modules under DDP, those that it leaves alone, too."""
    return {parameter for module in _ddps(modules) for parameter in module.parameters()}


def _ddps(modules: Iterable[torch.nn.Module]) -> Iterator[DistributedDataParallel]:
    for tracked in modules:
        for module in tracked.modules():
            if isinstance(module, DistributedDataParallel):
                yield module


def _synchronised(module: DistributedDataParallel) -> Iterator[torch.nn.Parameter]:
    """Give the parameters that DDP was not told to leave alone, as experts that each rank has for itself."""
    for name, parameter in module.module.named_parameters():
        # For those of the outermost module DDP's documentation wants a dot in front.
        spelled = {name} if "." in name else {name, f".{name}"}
        if spelled.isdisjoint(module.parameters_to_ignore):
            yield parameter


def kept_equal_by_ddp(
    modules: Iterable[torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[int, Layout]:
    """Find the plain tensors that DDP keeps equal on the ranks of a group: parameters, and what optimizers make of them.

    State of a parameter follows from the parameter and its gradients, which are the same on all ranks: its moments as
    well as the number of its steps. Not so where the optimizer calls the script to compute the loss, which is a rank's
    own. Buffers are not among them: DDP overwrites them with rank 0's before a forward pass, which then changes each
    rank's by that rank's samples. Nor are parameters that DDP was told to leave alone.

    Parameters
    ----------
    modules, optimizers
        All that are tracked.

    Returns
    -------
    dict
        By address of a tensor's memory, the ranks that hold it.
    """
    parameters: dict[torch.Tensor, Layout] = {}
    for module in _ddps(modules):
        ranks = sorted(torch.distributed.get_process_group_ranks(module.process_group))
        parameters.update(dict.fromkeys(_synchronised(module), Layout.replicated(ranks)))
    found = {parameter.data_ptr(): layout for parameter, layout in parameters.items()}
    for optimizer in optimizers:
        if needs_closure(optimizer):
            continue
        for parameter, state in optimizer.state.items():
            if parameter in parameters:
                for value in state.values():
                    if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                        found[value.data_ptr()] = parameters[parameter]
    return found


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer computes the loss by itself, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
