"""Standing in for a rank that has died while saving: writing its part from what this rank holds alike."""

from __future__ import annotations

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.placement import local_of
from hpc_resume.checkpoint.snapshot import Captured, pieces_of
from hpc_resume.checkpoint.structure import Structure, TensorRecord


def substitute(captured: Captured, rank: int, *, own_rank: int) -> Captured | None:
    """Take another rank's part of a captured state, if this rank holds all of it too; else None.

    Valid only while the live tensors are what they were when the state was captured. What was that rank's
    alone (generators) is not in it.

    Parameters
    ----------
    captured
        This rank's part.
    rank
        The other one, which has died.
    own_rank
        This one.
    """
    pieces = pieces_of(captured.structure, rank)
    sources = []
    for piece in pieces:
        box = held_box(captured.structure.tensors[piece.name], own_rank)
        if box is None or box.intersect(piece.box) != piece.box:
            return None
        sources.append(local_of(captured.leaves[piece.name])[piece.box.slices_in(box)])
    return Captured(
        structure=captured.structure,
        pieces=pieces,
        sources=tuple(sources),
        objects=captured.objects,
        leaves=captured.leaves,
        roles=captured.roles,
    )


def keepers(structure: Structure, rank: int, world_size: int) -> set[int]:
    """Ranks that hold all that a rank stores, itself included; by rule, so that all name the same."""
    able = set(range(world_size))
    layouts = {structure.tensors[piece.name].layout for piece in pieces_of(structure, rank)}
    for layout in layouts:
        group = None if layout is None else layout.group_of(rank)
        able &= {rank} if layout is None or group is None else set(layout.holders(group))
    return able


def held_box(record: TensorRecord, rank: int) -> Box | None:
    """Give what of a tensor a rank holds; None if nothing does by rule."""
    group = None if record.layout is None else record.layout.group_of(rank)
    if group is None or record.layout is None:
        return None
    return record.layout.box(record.shape, group)
