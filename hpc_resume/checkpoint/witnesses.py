"""Witnesses: samples of plain tensors, by which ranks that hold the same are told from ranks that do not.

Of a plain tensor that nothing keeps equal, rank 0's is stored. That is right where ranks replicate it without
saying so, and would lose what the others have where they do not: stages of a pipeline, or models of their own.
A few elements of each tell the two apart. They need not be the same to the bit: replicas drift where kernels are not
deterministic. Of optimizers' state under DDP every rank stores a part, because it is the same everywhere: a few
elements tell whether an optimizer has a mind of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.structure import TensorRecord

if TYPE_CHECKING:
    import torch

_LEADER = Layout.replicated((0,))
#: So many tensors of a state are looked at, so many of optimizers, and so many elements of each.
_TENSORS = 64
_STATES = 8
_ELEMENTS = 8
#: Replicas that have drifted differ by less than this part of their norm, other tensors by more.
_TOLERANCE = 0.1


def pick(
    tensors: Mapping[str, torch.Tensor],
    records: Mapping[str, TensorRecord],
    *,
    modules: set[str],
    parameters: set[int],
) -> tuple[str, ...]:
    """Choose tensors to look at, the same on all ranks that have the same.

    Parameters
    ----------
    tensors, records
        Of the state, by name.
    modules, parameters
        Keys of modules, and addresses of their parameters. Their buffers may differ: DDP, too, takes rank 0's.
    """
    from torch.distributed.tensor import DTensor

    names = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.numel()
        and not isinstance(tensor, DTensor)
        and records[name].layout == _LEADER
        and (name.split("/", 1)[0] not in modules or tensor.data_ptr() in parameters)
    ]
    return _spread(names, _TENSORS)


def pick_replicas(
    tensors: Mapping[str, torch.Tensor], records: Mapping[str, TensorRecord]
) -> tuple[str, ...]:
    """Choose tensors of optimizers to look at that are taken for replicas: nothing but DDP's habit says so."""
    from torch.distributed.tensor import DTensor

    names = [
        name
        for name, tensor in sorted(tensors.items())
        if tensor.numel() and not isinstance(tensor, DTensor) and records[name].layout != _LEADER
    ]
    return _spread(names, _STATES)


def _spread(names: Sequence[str], most: int) -> tuple[str, ...]:
    places = np.linspace(0, len(names) - 1, min(len(names), most)).round().astype(int)
    return tuple(names[place] for place in places)


def take(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Take some elements of each tensor, as the hex digits of little-endian doubles."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        places = np.linspace(0, tensor.numel() - 1, min(tensor.numel(), _ELEMENTS)).round().astype(int)
        chosen = [tensor.detach()[np.unravel_index(place, tuple(tensor.shape))] for place in places]
        parts = torch.view_as_real(torch.stack(chosen)) if tensor.is_complex() else chosen
        values = torch.stack([part.to(torch.float64) for part in parts])
        found[name] = values.cpu().numpy().astype("<f8").tobytes().hex()
    return found


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """List the tensors of two ranks that are not the same."""
    found = []
    for name in one.keys() & other.keys():
        a, b = (np.frombuffer(bytes.fromhex(samples[name]), "<f8") for samples in (one, other))
        if a.shape == b.shape:
            finite = np.isfinite(a) & np.isfinite(b)
            a, b = a[finite], b[finite]
            if np.linalg.norm(a - b) > _TOLERANCE * max(np.linalg.norm(a), np.linalg.norm(b)):
                found.append(name)
    return sorted(found)
