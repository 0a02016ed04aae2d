"""Gradient accumulation: a rank's part of a step in pieces that fit into its memory, and what each one weighs.

The gradient of a step is the mean over the global batch, whatever the ranks and the micro-batches. DDP and FSDP2
average over the ranks, so a micro-batch of *m* samples out of *G* on *W* ranks, whose loss is a mean over its
samples, weighs ``m * W / G``. All ranks make the same number of micro-batches: FSDP2 communicates in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of a global batch: contiguous, and at most one sample larger than another rank's.

    Parameters
    ----------
    global_batch
        Samples of all ranks.
    rank, world_size
        Whose part.
    """

    global_batch: int
    rank: int
    world_size: int

    @property
    def begin(self) -> int:
        """Samples of the ranks before it."""
        return self.rank * (self.global_batch // self.world_size) + min(self.rank, self._rest)

    @property
    def samples(self) -> int:
        """Samples of this rank."""
        return self.global_batch // self.world_size + (self.rank < self._rest)

    @property
    def largest(self) -> int:
        """Samples of the rank that has most."""
        return -(-self.global_batch // self.world_size)

    @property
    def even(self) -> bool:
        """Whether all ranks have equally many."""
        return self._rest == 0

    @property
    def _rest(self) -> int:
        return self.global_batch % self.world_size

    def pieces(self, limit: int | None) -> list[tuple[int, int, float]]:
        """Cut it into micro-batches.

        Parameters
        ----------
        limit
            Most samples in one; None for a single one.

        Returns
        -------
        list of (int, int, float)
            Where each begins and ends, and its weight. As many on every rank: one that has a sample less than
            there are pieces takes its first sample twice, once with weight 0.
        """
        count = 1 if limit is None else -(-self.largest // limit)
        unit = self.world_size / self.global_batch
        size, rest = divmod(self.samples, count)
        if size == 0:
            return [(0, 1, 0.0), *((place, place + 1, unit) for place in range(self.samples))]
        ends = [(place + 1) * size + min(place + 1, rest) for place in range(count)]
        return [(begin, end, (end - begin) * unit) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def micro_batches(
    batch: Any, models: Sequence[nn.Module], *, share: Share | None, world_size: int, limit: int | None
) -> Iterator[tuple[Any, float]]:
    """Cut a batch into micro-batches; the models synchronise gradients in the last one only.

    Parameters
    ----------
    batch
        A tensor or array with samples in its first dimension, or dicts, lists and tuples of those.
    models
        With DDP or FSDP2 anywhere in them.
    share
        Which part of the global batch it is; None: all ranks have as many samples as are in it.
    world_size
        Ranks.
    limit
        Most samples in a micro-batch; None for the whole batch at once.

    Yields
    ------
    (Any, float)
        A micro-batch like ``batch``, and the weight of its loss.

    Raises
    ------
    UsageError
        If the batch can't be cut, or is not this rank's part of the step.
    """
    found = count_samples(batch)
    if share is None:
        if found is None:
            raise UsageError(
                "run.micro_batches: there is no tensor in the batch, so its samples can't be counted"
            )
        share = Share(global_batch=found * world_size, rank=0, world_size=world_size)
    elif found is not None and found != share.samples:
        raise UsageError(
            f"run.micro_batches: the batch has {found} samples in its first dimension, but this rank's part of the "
            f"step is {share.samples} of {share.global_batch}; give it what the loader gave, whole"
        )
    pieces = share.pieces(limit)
    for place, (begin, end, weight) in enumerate(pieces):
        whole = (begin, end) == (0, share.samples)
        micro = batch if whole else _cut(batch, slice(begin, end), share.samples, "batch")
        with contextlib.ExitStack() as stack:
            if place < len(pieces) - 1:
                _keep_gradients_local(models, stack)
            yield micro, weight


def _keep_gradients_local(models: Sequence[nn.Module], stack: contextlib.ExitStack) -> None:
    """Let gradients add up on this rank until the stack is left."""
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
        elif isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(False, recurse=False)
            stack.callback(module.set_requires_gradient_sync, True, recurse=False)


def count_samples(batch: Any) -> int | None:
    """Length of the first dimension of the first tensor in a batch; None if there is none."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return int(batch.shape[0]) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((found for each in batch if (found := count_samples(each)) is not None), None)
    return None


def _cut(value: Any, piece: slice, samples: int, path: str) -> Any:
    """Take some samples of a batch; what has none (a number, a string) stays as it is."""
    if isinstance(value, torch.Tensor | np.ndarray):
        if value.ndim == 0:
            return value
        if value.shape[0] != samples:
            raise UsageError(
                f"run.micro_batches: {path} has shape {list(value.shape)} in a batch of {samples} samples, so it "
                "can't be told which rows belong to which; put samples first, and pass what is shared outside of "
                "the batch"
            )
        return value[piece]
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return value
    if isinstance(value, Mapping):
        return {key: _cut(each, piece, samples, f"{path}[{key!r}]") for key, each in value.items()}
    if isinstance(value, list | tuple):
        if len(value) == samples and count_samples(value) is None:
            return value[piece]  # one string or number a sample
        parts = [_cut(each, piece, samples, f"{path}[{place}]") for place, each in enumerate(value)]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts)
    raise UsageError(
        f"run.micro_batches: {path} is a {type(value).__qualname__}, which can't be cut into samples; have "
        "collate_fn make tensors, dicts, lists and tuples"
    )
