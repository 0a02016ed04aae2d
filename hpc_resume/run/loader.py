"""Elastic data: the same samples in the same global batches on any number of ranks.

The order is a function of (seed, epoch) alone: a keyed permutation that gives the index at any position
without making a list, so the whole state of the data is one number, the samples consumed by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset

from hpc_resume.errors import Declined, UsageError
from hpc_resume.files import JsonObject
from hpc_resume.run.microbatches import Share
from hpc_resume.run.workers import Shielded

_ROUNDS = 8
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser. Source: Steele, Lea, Flood, OOPSLA 2014."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def permute(positions: npt.ArrayLike, size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Give the sample indices at some positions of an epoch's order.

    A Feistel network over the next power of four, walked until it lands inside (at most four rounds of it
    on average): a bijection of ``range(size)`` for each (seed, epoch). Source: Black and Rogaway, Ciphers
    with Arbitrary Finite Domains, CT-RSA 2002.

    Parameters
    ----------
    positions
        Within the epoch, ``0 <= position < size``.
    size
        Samples in the dataset.
    seed, epoch
        Which order.
    """
    half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    with np.errstate(over="ignore"):
        origin = np.array([(seed & 0xFFFFFFFF) << 32 | (epoch & 0xFFFFFFFF)], dtype=np.uint64)
        base = _mix(origin ^ _mix(np.array([(seed >> 32) & 0xFFFFFFFF], dtype=np.uint64)))
        keys = _mix(base + np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95))
        values = np.atleast_1d(np.asarray(positions, dtype=np.uint64)).copy()
        outside = np.ones(values.shape, dtype=bool)
        while outside.any():
            left, right = values[outside] >> half_bits, values[outside] & half_mask
            for key in keys:
                left, right = right, left ^ (_mix(right ^ key) & half_mask)
            values[outside] = left << half_bits | right
            outside = values >= np.uint64(size)
    found: npt.NDArray[np.int64] = values.astype(np.int64)
    return found


class ElasticLoader:
    """Batches of a map-style dataset, endlessly, epoch after epoch.

    The global batch of step *s* is positions ``s * global_batch`` to ``(s + 1) * global_batch`` of the
    concatenated epochs; each rank loads a contiguous part of it.

    Parameters
    ----------
    dataset
        Has ``__len__`` and ``__getitem__``.
    global_batch
        Samples in a step, over all ranks.
    rank, world_size
        This process's place.
    seed
        Of the order.
    shuffle
        Whether the order is random.
    uneven
        Some ranks may get one sample more than others.
    **options
        For ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` …

    Raises
    ------
    UsageError
        If the dataset has no length.
    Declined
        If the batch can't be split over so many ranks.
    """

    def __init__(
        self,
        dataset: Any,
        global_batch: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        uneven: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise UsageError(
                f"run.loader: {type(dataset).__qualname__} has no length; pass your own loader to run.steps and "
                "run.track, one with state_dict() and load_state_dict()"
            )
        if len(dataset) == 0:
            raise UsageError("run.loader: the dataset is empty")
        if global_batch < 1:
            raise UsageError(f"run.loader: global_batch={global_batch} must be 1 or more")
        share = Share(global_batch=global_batch, rank=rank, world_size=world_size)
        if global_batch < world_size:
            raise Declined(
                f"run.loader: global_batch={global_batch} leaves some of {world_size} ranks without a sample; "
                "take fewer ranks"
            )
        if not (share.even or uneven):
            near = max(world_size, round(global_batch / world_size) * world_size)
            raise Declined(
                f"run.loader: global_batch={global_batch} can't be split evenly over {world_size} ranks, and "
                "uneven parts would weigh samples differently. Have run.micro_batches weigh them, and allow them: "
                "run.loader(…, uneven=True); or choose a global_batch that all your node types divide "
                f"(for {world_size} ranks {near}, say)"
            )
        taken = {"batch_size", "sampler", "batch_sampler", "drop_last", "generator"} & options.keys()
        if taken:
            raise UsageError(
                f"run.loader: {', '.join(sorted(taken))} follow from global_batch; leave them out"
            )
        self._dataset: Any = dataset
        self._size = len(dataset)
        self._global_batch = global_batch
        #: This rank's part of each global batch.
        self.share = share
        self._seed = seed
        self._shuffle = shuffle
        self._options = options
        #: Samples handed out so far, over all ranks.
        self.samples = 0

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Sample indices of this rank's part of a step's global batch, shape ``(share.samples,)``."""
        begin = step * self._global_batch + self.share.begin
        positions = np.arange(begin, begin + self.share.samples)
        if not self._shuffle:
            return positions % self._size
        found = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self._size
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = permute(
                positions[inside] - epoch * self._size, self._size, self._seed, int(epoch)
            )
        return found

    def __iter__(self) -> Iterator[Any]:
        """Go on from the samples handed out so far."""
        first = self.samples // self._global_batch
        options = dict(self._options)
        if options.get("num_workers"):
            options["worker_init_fn"] = Shielded(options.get("worker_init_fn"))
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_sampler=_Steps(self, first),
            # A generator of its own: DataLoader draws from it at each start, and drawing from the global
            # one would make a resumed run differ from an uninterrupted one.
            generator=torch.Generator().manual_seed(self._seed),
            **options,
        )
        for batch in loader:
            self.samples += self._global_batch
            yield batch

    def state_dict(self) -> JsonObject:
        """Return the position, and what it is a position in."""
        return {
            "samples": self.samples,
            "size": self._size,
            "global_batch": self._global_batch,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: JsonObject) -> None:
        """Go to a position.

        Raises
        ------
        UsageError
            If it is a position in other data or another order.
        """
        mine = self.state_dict()
        differences = [
            f"{key} was {state.get(key)!r}, is {value!r}"
            for key, value in mine.items()
            if key != "samples" and state.get(key) != value
        ]
        if differences:
            raise UsageError(
                f"run.loader: the checkpoint belongs to other data or another order: {'; '.join(differences)}. "
                "Set them back, or begin a new run in another run_dir"
            )
        self.samples = int(state["samples"])


class _Steps:
    """Batch sampler: the indices of step after step."""

    def __init__(self, loader: ElasticLoader, first: int) -> None:
        self._loader = loader
        self._first = first

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first
        while True:
            yield self._loader.indices(step).tolist()
            step += 1
