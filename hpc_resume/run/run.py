"""A training run inside its job: the object that users' scripts hold."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import Interrupted, UsageError
from hpc_resume.files import Clock
from hpc_resume.run.agreement import NOT_BEGUN
from hpc_resume.run.fitness import DTYPES
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.microbatches import micro_batches
from hpc_resume.run.rehearsing import Rehearsing
from hpc_resume.run.session import Session
from hpc_resume.run.settling import device_of, settle
from hpc_resume.rundir import RunDirectory


class Run:
    """A training run that outlives its jobs.

    Use it as a context manager around everything from building the model to the last step; the same script
    runs under plain ``python``, ``torchrun``, ``srun`` and submitit, on one rank or many.

    Parameters
    ----------
    run_dir
        Folder of the run, on a filesystem that all nodes share. Without it: what the launcher says, or
        ``runs/NAME``.
    config
        Settings, or a YAML file of them. Without it: what the launcher says.
    clock
        Unix time in seconds.
    **settings
        Single settings over those (``seed=1``, ``checkpoint={"every_steps": 100}``).

    Raises
    ------
    ConfigError
        If a setting is wrong.

    Examples
    --------
    >>> import hpc_resume as hr
    >>> with hr.Run("runs/mine") as run:  # doctest: +SKIP
    ...     model = Net().to(run.device)
    ...     data = run.loader(dataset, global_batch=64)
    ...     run.track(model=model, optimizer=optimizer, data=data)
    ...     for step, batch in run.steps(data, until=2000):
    ...         ...
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        *,
        config: Config | str | Path | None = None,
        clock: Clock = time.time,
        **settings: Any,
    ) -> None:
        if run_dir is not None:
            settings["run_dir"] = str(Path(run_dir).absolute())
        self._session = Session(settle(config, settings), clock=clock)
        self._device = device_of(self._session.environment.local_rank)
        self._state: TrackedState | None = None
        self._loader: ElasticLoader | None = None
        self._stepping: ElasticLoader | None = None
        self._weighed = False
        self._begun = False
        self._inside = False
        self._pid = os.getpid()

    @property
    def rank(self) -> int:
        """Number of this process among all of the attempt's, from 0."""
        return self._session.rank

    @property
    def world_size(self) -> int:
        """Processes of this attempt."""
        return self._session.world_size

    @property
    def local_rank(self) -> int:
        """Number of this process among those on its node, from 0."""
        return self._session.environment.local_rank

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return self._device

    @property
    def precision(self) -> torch.dtype:
        """What :meth:`autocast` computes in: the node type's ``precision``, float32 by default."""
        return DTYPES[self._session.fitness.precision]

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._session.step

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._session.facts.number

    @property
    def directory(self) -> RunDirectory:
        """The run directory."""
        return self._session.directory

    @property
    def config(self) -> Config:
        """The resolved settings."""
        return self._session.config

    def __enter__(self) -> Run:
        """Meet the other ranks and begin an attempt."""
        self._session.begin(self._device)
        self._begun = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the attempt: done, interrupted, or failed."""
        if error is None:
            if self._state is not None and self.step > self._session.saver.saved_step:
                self._save("done")  # the loop was left early, on purpose
            self._session.finish()
        elif isinstance(error, SystemExit):
            self._session.shut_down(destroy=isinstance(error, Interrupted))
        elif isinstance(error, Exception):
            self._session.crash(error)
        else:
            self._session.cancel()

    def loader(
        self,
        dataset: Any,
        global_batch: int,
        *,
        shuffle: bool = True,
        uneven: bool = False,
        **options: Any,
    ) -> ElasticLoader:
        """Load batches of a map-style dataset, in the same order on any number of ranks.

        Parameters
        ----------
        dataset
            Has ``__len__`` and ``__getitem__``.
        global_batch
            Samples in a step, over all ranks; it stays the same on whatever the run goes on.
        shuffle
            Whether the order is random, by the run's seed.
        uneven
            Take numbers of ranks that do not divide it, too: some ranks then have one sample more than others, and
            :meth:`micro_batches` weighs them.
        **options
            For ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` …

        Raises
        ------
        UsageError
            If the dataset has no length.
        Declined
            If the batch can't be split over so many ranks; another node type is tried then, if there is one.
        """
        return ElasticLoader(
            dataset,
            global_batch,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            shuffle=shuffle,
            uneven=uneven,
            **options,
        )

    def micro_batches(
        self, batch: Any, *models: torch.nn.Module, size: int | None = None
    ) -> Iterator[tuple[Any, float]]:
        """Cut this rank's part of a step into micro-batches whose weighted gradients are those of the global batch.

        Parameters
        ----------
        batch
            What :meth:`steps` gave: a tensor with samples in its first dimension, or dicts, lists and tuples of
            such.
        *models
            Under DDP or ``fully_shard``: they synchronise gradients in the last micro-batch only. Without them it
            is done in each: under FSDP2 that takes longer, and no rank then holds the gradients of the whole model.
        size
            Most samples in a micro-batch; without it the node type's ``micro_batch``, or all at once.

        Yields
        ------
        (Any, float)
            A micro-batch, and the weight by which to multiply the mean loss over its samples.

        Raises
        ------
        UsageError
            If the batch can't be cut into samples.

        Examples
        --------
        >>> for step, batch in run.steps(data, until=2000):  # doctest: +SKIP
        ...     for micro, weight in run.micro_batches(batch, model):
        ...         with run.autocast():
        ...             loss = loss_fn(model(micro)) * weight
        ...         loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        """
        yield from micro_batches(
            batch,
            models,
            share=self._stepping.share if self._stepping is not None else None,
            world_size=self.world_size,
            limit=size or self._session.fitness.limit,
        )
        self._weighed = True

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the node type's ``precision``; a context manager for the forward pass."""
        return self._session.fitness.autocast(self._device.type)

    def track(self, **items: Any) -> None:
        """Name what is saved, and restore it if there is something to restore.

        Parameters
        ----------
        **items
            Modules, optimizers, schedulers, gradient scalers, the loader; anything with ``state_dict`` and
            ``load_state_dict``; plain dicts of numbers, strings and tensors.

        Raises
        ------
        StateError
            If an item can't be saved and restored.
        MismatchError
            If the newest checkpoint does not fit; lists every difference.
        IntegrityError
            If there are checkpoints, but none is whole.
        BudgetSpent
            If too many attempts in a row made no progress.
        """
        if not self._begun:
            raise UsageError("run.track: the run has not begun; call it inside 'with hr.Run() as run:'")
        if self._state is not None:
            raise UsageError(
                "run.track: call it once, with everything: run.track(model=…, optimizer=…, data=…)"
            )
        self._state = TrackedState(items, rank=self.rank, world_size=self.world_size)
        self._loader = next((item for item in items.values() if isinstance(item, ElasticLoader)), None)
        self._session.restore(self._state, None if self._loader is None else self._loader.share)

    def steps(self, data: Iterable[Any], *, until: int) -> Iterator[tuple[int, Any]]:
        """Go through the remaining steps; saves, stops and continues as needed.

        Parameters
        ----------
        data
            Gives a batch a step: :meth:`loader`, or any iterable that is tracked.
        until
            Number of steps of the whole run.

        Yields
        ------
        (int, Any)
            Index of the step, from 0, and its batch.

        Raises
        ------
        Interrupted
            When the run has been saved and is to be continued: leaves with exit code 75.
        """
        if self._state is None:
            raise UsageError(
                "run.steps: nothing is tracked, so nothing would be saved; call run.track(…) before the loop"
            )
        if isinstance(data, ElasticLoader) and data is not self._loader:
            raise UsageError(
                "run.steps: this loader is not tracked, so its position would be lost; "
                "pass it to run.track(data=…) too"
            )
        rehearsing = None
        if "HPC_RESUME_REHEARSAL" in os.environ and self.rank == 0:
            frame = sys._getframe(1)  # noqa: SLF001 - the script's
            rehearsing = Rehearsing(self.directory.root, frame, self._state.items)
        batches = iter(data)
        self._inside = False
        while True:
            if rehearsing is not None:
                rehearsing.at(self.step)
            self._session.boundary(self._state, self._samples, until)
            if self.step >= until:
                break
            self._inside = True  # from the batch on: fetching it moves generators and positions
            try:
                batch = next(batches)
            except StopIteration:
                self._inside = False
                self._session.rest()
                break
            self._stepping, self._weighed = (data if data is self._loader else None), False
            yield self.step, batch
            self._inside = False
            self._check_weights()
            self._session.step += 1
        self._save("done")

    def breathe(self, *, step_done: bool = False) -> None:
        """Let a stop happen here: call it every second or so in whatever takes long, on all ranks or on some.

        Steps let stops happen by themselves. A long evaluation, compilation or preparation of data does not: the
        job may end in the middle of it, and what was trained since the last checkpoint would be lost. While
        nothing has asked for a stop, this costs less than a microsecond.

        - Before :meth:`track` it leaves at once; what was saved before remains.
        - Between steps (before or after a loop over :meth:`steps`) the state is that of the completed steps: if
          all ranks have agreed to stop after this one, it is saved, and the run leaves.
        - Inside a step (from fetching its batch to the end of the loop's body) the state is of no step. So the
          run goes on to the end of the step, where it will stop. Only when no save fits any more before the end
          of the job it leaves as it is, and the last checkpoint serves.

        Parameters
        ----------
        step_done
            Inside a step: all of it is done that must not be lost, and the rest of the body is not done again
            when the run goes on. Say so in an evaluation that follows ``optimizer.step()`` and changes nothing
            that is tracked.

        Raises
        ------
        Interrupted
            When the run is to be continued: leaves with exit code 75.
        """
        if not self._session.stopping.pending or os.getpid() != self._pid:
            return  # a process that was forked, such as a data loader's worker, has no say
        completed: int | None = self.step if self._state is not None else NOT_BEGUN
        if self._inside:
            completed = self.step + 1 if step_done else None
        self._session.breathe(self._state, self._samples, completed)

    def log(self, **values: Any) -> None:
        """Record metrics of the step that is being done.

        Parameters
        ----------
        **values
            Numbers or one-element tensors. Each rank records its own; reports show the mean over ranks.
            Tensors are read about once a second, so that logging waits for no GPU.

        Raises
        ------
        UsageError
            If a value is neither, or is called ``step`` or ``t``, which are recorded by themselves.
        """
        self._session.metrics.log(self.step, values)

    def _check_weights(self) -> None:
        """Refuse a step whose ranks had unequal parts and weighed them equally."""
        loader, self._stepping = self._stepping, None
        if loader is not None and not (loader.share.even or self._weighed):
            raise UsageError(
                f"step {self.step}: global_batch={loader.share.global_batch} is split unevenly over "
                f"{self.world_size} ranks, and nothing weighed the parts; go through all of "
                "run.micro_batches(batch, model) in each step, and multiply each loss by its weight"
            )

    @property
    def _samples(self) -> int:
        return self._loader.samples if self._loader is not None else 0

    def _save(self, reason: str) -> None:
        assert self._state is not None
        self._session.save(self._state, self._samples, reason, wait=True)
