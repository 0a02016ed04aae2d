"""One rank's snapshot of a state: what it is going to write, live or copied into the staging area."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_resume.checkpoint.arena import Arena
from hpc_resume.checkpoint.blocks import Partitions
from hpc_resume.checkpoint.hashing import Bytes
from hpc_resume.checkpoint.health import Roles
from hpc_resume.checkpoint.image import Image, Piece, full_image
from hpc_resume.checkpoint.structure import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """One rank's part of a state, as live tensors.

    Parameters
    ----------
    structure
        Of the global state.
    pieces
        What this rank stores; the same object as long as the structure stays the same.
    sources
        The live tensor, or part of one, of each piece.
    objects
        The non-tensor state as typed JSON, by tracked key.
    leaves
        All live tensors by name.
    witnesses
        Of tensors that are stored once and that each rank has; see :mod:`hpc_resume.checkpoint.witnesses`.
    roles
        What the tensors are for.
    """

    structure: Structure
    pieces: tuple[Piece, ...]
    sources: tuple[torch.Tensor, ...]
    objects: Any
    leaves: Mapping[str, torch.Tensor]
    witnesses: Mapping[str, str] = field(default_factory=dict)
    roles: Roles = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One rank's part of a state, as bytes that do not change any more.

    Parameters
    ----------
    structure, pieces, objects, witnesses, roles
        As captured.
    image
        The shard that holds all pieces.
    data
        Bytes of each piece.
    size_bytes
        Of all pieces.
    cuts
        The blocks and segments of each piece.
    arena
        The staging area, if they lie in it; else they are the live tensors' own: write them before training
        goes on.
    """

    structure: Structure
    pieces: tuple[Piece, ...]
    objects: Any
    image: Image
    data: tuple[Bytes, ...]
    size_bytes: int
    cuts: tuple[Partitions, ...]
    arena: Arena | None = None
    witnesses: Mapping[str, str] = field(default_factory=dict)
    roles: Roles = field(default_factory=dict)


#: A state up to this size is always staged.
_ALWAYS_STAGED_BYTES = 64 << 20


class Camera:
    """Takes snapshots; keeps the staging area and the file's image while the structure stays the same.

    Parameters
    ----------
    threads
        That copy.
    limit_bytes
        Host memory that the staging area may take; a state that needs more is written while training waits.
    """

    def __init__(self, *, threads: int = 2, limit_bytes: int | None = None) -> None:
        self._threads = threads
        self._limit_bytes = limit_bytes
        self._pieces: tuple[Piece, ...] | None = None
        self._image: Image | None = None
        self._cuts: tuple[Partitions, ...] = ()
        self._size_bytes = 0
        self._arena: Arena | None = None

    def take(self, captured: Captured, *, stage: bool) -> Snapshot:
        """Take a snapshot.

        Parameters
        ----------
        captured
            The state.
        stage
            Copy it into the staging area, so that training can go on; the copy of the snapshot before is
            overwritten. Not done where the area would take more memory than it may; done anyway for a small
            state, whose many tensors are copied faster than they are looked at one by one.
        """
        image = self._settle(captured.pieces)
        if (stage or image.size_bytes <= _ALWAYS_STAGED_BYTES) and self.may_stage(captured):
            if self._arena is None:
                pinned = any(source.device.type == "cuda" for source in captured.sources)
                self._arena = Arena(image, captured.pieces, threads=self._threads, pinned=pinned)
            self._arena.stage(captured.sources)
            data, arena = self._arena.data, self._arena
        else:
            data, arena = tuple(bytes_of(source) for source in captured.sources), None
        return Snapshot(
            structure=captured.structure,
            pieces=captured.pieces,
            objects=captured.objects,
            image=image,
            data=data,
            size_bytes=self._size_bytes,
            cuts=self._cuts,
            arena=arena,
            witnesses=captured.witnesses,
            roles=captured.roles,
        )

    def may_stage(self, captured: Captured) -> bool:
        """Whether the staging area for a state fits into the memory that it may take."""
        return self._limit_bytes is None or self._settle(captured.pieces).size_bytes <= self._limit_bytes

    def _settle(self, pieces: tuple[Piece, ...]) -> Image:
        if self._image is None or self._pieces is not pieces:
            self._image = full_image(pieces)
            self._cuts = tuple(piece.cut for piece in pieces)
            self._size_bytes = sum(length for _, length in self._image.data)
            self._pieces = pieces
            self.close()
        return self._image

    def close(self) -> None:
        """Give the staging area up."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """Bytes of a tensor in C order: its own memory where it is contiguous on the CPU, else a copy."""
    flat: Bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def pieces_of(structure: Structure, rank: int) -> tuple[Piece, ...]:
    """List what a rank stores of a state."""
    tensors = structure.tensors
    return tuple(
        Piece(name, tensors[name].dtype, tensors[name].shape, box) for name, box in structure.stored_by(rank)
    )
