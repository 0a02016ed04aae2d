"""Elastic data: the same samples in the same global batches on any number of ranks.

The order is a function of the seed and the position alone (:mod:`hpc_resume.run.order`), so the whole state of the
data is one number, the samples consumed by all ranks.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from hpc_resume.errors import Declined, UsageError
from hpc_resume.files import JsonObject
from hpc_resume.run import generators
from hpc_resume.run.microbatches import Share
from hpc_resume.run.order import WINDOW, Draws, Integers, Order
from hpc_resume.run.samples import Samples, Unwrapped, as_it_is
from hpc_resume.run.workers import Shielded

#: Places in the order are computed about so many at a time: NumPy costs as much for one.
_AHEAD = 1024
#: What of the order may change if somebody says why; what it is an order of may not.
_MAY_CHANGE = frozenset({"seed", "global_batch", "shuffle"})
#: What of its state says where it is.
_POSITION = frozenset({"samples", "steps"})
#: What DataLoader takes and we do not, and what to use instead.
_INSTEAD = {
    "batch_size": "global_batch, which counts the samples of all ranks",
    "batch_sampler": "global_batch, with lengths=… for batches of about one length",
    "generator": "the run's seed: hr.Run(seed=…)",
}
_SAMPLERS = {
    "RandomSampler": "shuffle=True, the default",
    "SequentialSampler": "shuffle=False",
    "SubsetRandomSampler": "torch.utils.data.Subset(dataset, indices) as the dataset",
    "WeightedRandomSampler": "weights=…",
    "DistributedSampler": "nothing: the ranks get their parts of each global batch by themselves",
    "StatefulDistributedSampler": "nothing: the ranks get their parts of each global batch by themselves",
}
_OWN = (
    "shuffle=, weights= or lengths=; with a sampler of your own, pass run.steps and run.track a loader that has "
    "state_dict() and load_state_dict(), such as torchdata's StatefulDataLoader"
)


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
    drop_last, weights, lengths, window
        See :class:`~hpc_resume.run.order.Order`.
    augment_seed
        Whether generators are seeded before each sample.
    allow_change
        A position may be gone on from with another seed, global batch or shuffling. What has been used stays used;
        from the next sample on the order is the new one, so within the epoch some samples may come twice and others
        not at all. With another global batch alone, each still comes once.
    **options
        For ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` …

    Raises
    ------
    UsageError
        If the dataset has no length, or something contradicts itself.
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
        drop_last: bool = False,
        weights: Any = None,
        lengths: Any = None,
        window: int = WINDOW,
        augment_seed: bool = True,
        allow_change: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise UsageError(
                f"run.loader: {type(dataset).__qualname__} has no length; pass your own loader to run.steps and "
                "run.track, one with state_dict() and load_state_dict(), such as torchdata's StatefulDataLoader"
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
        _refuse(options)
        #: What the samples are of.
        self.dataset: Any = dataset
        self._global_batch = global_batch
        #: This rank's part of each global batch.
        self.share = share
        self._seed = seed
        self._order = Order(
            len(dataset),
            global_batch,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            weights=weights,
            lengths=lengths,
            window=window,
        )
        self._augment_seed = augment_seed
        self._options = options
        #: Samples handed out so far, over all ranks.
        self.samples = 0
        self._steps = 0
        self._allow_change = allow_change
        #: How the order differs from that of the restored position, in words.
        self.changes: tuple[str, ...] = ()

    # ------------------------------------------------- epochs

    @property
    def global_batch(self) -> int:
        """Samples in a step, over all ranks."""
        return self._global_batch

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return self._order.epoch_samples

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every sample was used; where the global batch does not divide it, the last one is shared."""
        return -(-self._order.epoch_samples // self._global_batch)

    def steps_for(self, epochs: float) -> int:
        """Count the steps of so many epochs from the beginning: ``until=data.steps_for(90)``."""
        # From where it is: with another global batch than before, the steps so far had other sizes.
        left = epochs * self._order.epoch_samples - self.samples
        return self._steps - int(-left // self._global_batch)

    @property
    def epoch(self) -> int:
        """Epoch of the step that is being done (of its first sample), from 0."""
        return max(self.samples - self._global_batch, 0) // self._order.epoch_samples

    @property
    def epoch_ends(self) -> bool:
        """Whether the last sample of an epoch is in the step that is being done."""
        return self.samples // self._order.epoch_samples > self.epoch

    # ------------------------------------------------- batches

    def indices(self, step: int) -> Integers:
        """Sample indices of this rank's part of a step's global batch, shape ``(share.samples,)``."""
        return self._draws(step, 1).take(0).index

    def _draws(self, step: int, count: int) -> Draws:
        """Give this rank's parts of some steps, shape ``(count, share.samples)``."""
        # With another global batch than before, a step begins at no multiple of it.
        begins = np.arange(step, step + count) * self._global_batch + self.samples % self._global_batch
        return self._order.at((begins + self.share.begin)[:, None] + np.arange(self.share.samples))

    def __iter__(self) -> Iterator[Any]:
        """Go on from the samples handed out so far."""
        first = self.samples // self._global_batch
        options = dict(self._options)
        if options.get("num_workers"):
            options["worker_init_fn"] = Shielded(Unwrapped(options.get("worker_init_fn")))
        samples = Samples(
            self.dataset,
            options.pop("collate_fn", None) or default_collate,
            seed=self._seed,
            seeded=self._augment_seed,
        )
        # A generator of its own: DataLoader draws from it at each start, and drawing from the global
        # one would make a resumed run differ from an uninterrupted one.
        generator = torch.Generator().manual_seed(
            generators.derive(self._seed, "loader", first, self.share.rank)
        )
        loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]  # it gives whole batches, by __getitems__
            batch_sampler=_Steps(self, first),  # type: ignore[arg-type]  # ... for what the order drew
            collate_fn=as_it_is,
            generator=generator,
            **options,
        )
        for batch in loader:
            self.samples += self._global_batch
            self._steps += 1
            yield batch

    # ------------------------------------------------- state

    def state_dict(self) -> JsonObject:
        """Return the position, and what it is a position in."""
        return {"samples": self.samples, "steps": self._steps, **self._order.described}

    def check_state(self, state: JsonObject) -> None:
        """Refuse a position in other data or another order, before anything is loaded.

        Raises
        ------
        UsageError
            If it is one.
        """
        samples, mine = state.get("samples"), self._order.described
        if type(samples) is not int or samples < 0 or type(self._steps_in(state)) is not int:
            raise UsageError(f"run.loader: samples={samples!r:.40} is no position")
        differences = {
            key: f"{key} was {state.get(key)!r}, is {mine.get(key)!r}"
            for key in dict.fromkeys([*mine, *state])
            if key not in _POSITION and state.get(key) != mine.get(key)
        }
        # The global batch cuts the epochs of these, so samples would come twice or never.
        fixed = {"global_batch"} if {"drop_last", "lengths"} & mine.keys() else set()
        may = differences.keys() <= _MAY_CHANGE - fixed
        if differences and not (self._allow_change and may):
            allow = "allow it by allow_config_change (a reason), " if may else ""
            raise UsageError(
                f"run.loader: the checkpoint belongs to other data or another order: {'; '.join(differences.values())}. "
                f"Set them back, {allow}or begin a new run in another run_dir"
            )
        self.changes = tuple(differences.values())

    def _steps_in(self, state: JsonObject) -> Any:
        """Give the steps of a position; earlier versions counted samples alone, and took all in one global batch."""
        if "steps" in state:
            return state["steps"]
        batch = state.get("global_batch")
        return state["samples"] // (batch if type(batch) is int and batch > 0 else self._global_batch)

    def load_state_dict(self, state: JsonObject) -> None:
        """Go to a position.

        Raises
        ------
        UsageError
            If it is a position in other data or another order.
        """
        self.check_state(state)
        self.samples, self._steps = int(state["samples"]), self._steps_in(state)


def _refuse(options: JsonObject) -> None:
    """Refuse what DataLoader takes and follows from what we have, and say what to use instead."""
    sampler = options.get("sampler")
    if sampler is not None:
        kind = type(sampler).__name__
        raise UsageError(f"run.loader: sampler={kind}: instead of it, use {_SAMPLERS.get(kind, _OWN)}")
    taken = [f"{name}=: use {instead}" for name, instead in _INSTEAD.items() if name in options]
    if taken:
        raise UsageError(f"run.loader: {'; '.join(taken)}")
    known = inspect.signature(DataLoader).parameters
    for name in options.keys() - known.keys():
        near = difflib.get_close_matches(name, [*known, *inspect.signature(ElasticLoader).parameters], n=1)
        hint = f"did you mean {near[0]}?" if near else "those of torch.utils.data.DataLoader are taken"
        raise UsageError(f"run.loader: no such option {name!r}; {hint}")


class _Steps:
    """Batch sampler: what the order draws for this rank, step after step."""

    def __init__(self, loader: ElasticLoader, first: int) -> None:
        self._loader = loader
        self._first = first

    def __iter__(self) -> Iterator[Draws]:
        step = self._first
        count = max(_AHEAD // self._loader.share.samples, 1)
        while True:
            draws = self._loader._draws(step, count)  # noqa: SLF001 - one noun, two faces
            for place in range(count):
                yield draws.take(place)
            step += count
