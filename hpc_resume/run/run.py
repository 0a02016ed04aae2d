"""A training run inside its job: the object that users' scripts hold."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hpc_resume.config import Config
from hpc_resume.errors import Interrupted, UsageError
from hpc_resume.files import Clock
from hpc_resume.run import numerics
from hpc_resume.run.initialising import Initialiser, initialise
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.loop import Loop
from hpc_resume.run.microbatches import micro_batches
from hpc_resume.run.observing import Observing
from hpc_resume.run.order import WINDOW
from hpc_resume.run.session import Session
from hpc_resume.run.settling import settle
from hpc_resume.run.tracking.trackers import DONE, FAILED, INTERRUPTED


class Run(Observing):
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
        Single settings over those (``seed=1``, ``checkpoint={"every_steps": 100}``); the rest of a group stays.

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
        super().__init__(Session(settle(config, settings), clock=clock))
        self._loop = Loop(self._session)
        self._begun = False

    def __enter__(self) -> Run:
        """Meet the other ranks and begin an attempt."""
        self._session.begin(self.device)
        self._begun = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the attempt: done, interrupted, or failed."""
        outcome = DONE if error is None else INTERRUPTED if isinstance(error, Interrupted) else FAILED
        try:
            if error is None:
                self._finish()
            elif isinstance(error, SystemExit):
                self._session.exits(error)
            elif isinstance(error, Exception):
                self._session.crash(error)
            else:
                self._session.leaving.cancel()
        except BaseException as failure:
            outcome = INTERRUPTED if isinstance(failure, Interrupted) else FAILED
            raise
        finally:
            self._session.trackers.close(outcome)

    def _finish(self) -> None:
        """Save what is to be saved, and end the attempt; if that fails, as one that has failed."""
        try:
            self._loop.leave()
            self._session.settle()
        except Exception as error:
            self._session.crash(error)
            raise
        self._session.finish()

    def loader(
        self,
        dataset: Any,
        global_batch: int,
        *,
        shuffle: bool = True,
        uneven: bool = False,
        drop_last: bool = False,
        weights: Any = None,
        lengths: Any = None,
        window: int = WINDOW,
        augment_seed: bool = True,
        **options: Any,
    ) -> ElasticLoader:
        """Load batches of a map-style dataset, in the same order on any number of ranks; see docs/data.md.

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
        drop_last
            An epoch ends with its last whole global batch. Without it the rest comes first in the next one's.
        weights
            Draw samples with replacement, as often as their weights say; one for each sample.
        lengths
            Put samples of about one length into one global batch; one for each sample.
        window
            So many global batches are sorted by length together.
        augment_seed
            Seed the generators of Python, NumPy and PyTorch (the CPU's) before each sample, by seed, epoch and
            index. Without it, random augmentations depend on ranks, workers and interruptions.
        **options
            For ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory`` …

        Raises
        ------
        UsageError
            If the dataset has no length, or something contradicts itself.
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
            drop_last=drop_last,
            weights=weights,
            lengths=lengths,
            window=window,
            augment_seed=augment_seed,
            allow_change=self.config.allow_config_change is not None,
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
            share=self._loop.share,
            world_size=self.world_size,
            limit=size or self._session.fitness.limit,
        )
        self._loop.weighed = True

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the node type's ``precision``; a context manager for the forward pass."""
        return self._session.fitness.autocast(self.device.type)

    def uses(self, *, data: Any = None, validation: Any = None, preprocessing: str | None = None) -> None:
        """Say what the run trains on, in place of the settings ``data.…``; before :meth:`track`, on all ranks.

        ``data`` and ``validation`` are a folder or file, a list of those, ``{name: path}``, or a Hugging Face dataset;
        ``preprocessing`` is a version. :meth:`track` refuses a change for which ``allow_data_change`` gives no reason.
        """
        self._loop.check_untracked("run.uses")
        self._session.data.declare(data, validation, preprocessing)

    def deterministic(self) -> None:
        """Have PyTorch compute the same bits each time, on as many ranks of the same kind of node.

        Call it first of all. It sets ``torch.use_deterministic_algorithms``, cuDNN's flags and cuBLAS's workspace,
        and says in the log what that costs. TF32 stays as it is: it rounds, but always alike.

        Raises
        ------
        UsageError
            If something has been computed on the GPU already.
        """
        self._session.leaving.say(numerics.deterministic())

    def initialise(self, module: torch.nn.Module, init: Initialiser | None = None) -> None:
        """Initialise a model from (the run's seed, name): the same on any number of ranks, in any sharding.

        Each module's ``reset_parameters`` draws whole tensors on the CPU, one module after the other, and each rank
        keeps its part. A model on the meta device gets its memory on :attr:`device`.

        Parameters
        ----------
        module
            Plain, compiled, under DDP, or sharded by ``fully_shard`` or tensor parallelism.
        init
            ``init(module, name)`` is called for each module with parameters or buffers of its own, after its
            ``reset_parameters``.

        Raises
        ------
        UsageError
            If nothing initialises a parameter; names all of them.

        Examples
        --------
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = Net()
        >>> fully_shard(model)  # doctest: +SKIP
        >>> run.initialise(model)  # doctest: +SKIP
        """
        initialise(module, init, seed=self.config.seed, device=self.device)

    def track(self, **items: Any) -> None:
        """Name what is saved, and restore it if there is something to restore.

        Parameters
        ----------
        **items
            Modules, optimizers, schedulers, gradient scalers, the loader; anything with ``state_dict`` and
            ``load_state_dict``; plain dicts of numbers, strings and tensors; random generators of PyTorch, NumPy
            and Python.

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
        self._loop.track(items)

    def steps(self, data: Iterable[Any], *, until: int | None = None) -> Iterator[tuple[int, Any]]:
        """Go through the remaining steps; saves, stops and continues as needed.

        Parameters
        ----------
        data
            Gives a batch a step: :meth:`loader`, or any loader with ``state_dict`` and ``load_state_dict``, begun
            anew when it has come to its end. Both must be tracked. Any other iterable is gone through once, and
            begins at its start when the run goes on.
        until
            Number of steps of the whole run. Inside of a loop over :meth:`epochs`, leave it out: an epoch's steps.

        Yields
        ------
        (int, Any)
            Index of the step, from 0, and its batch.

        Raises
        ------
        UsageError
            If the data's position would be lost.
        Interrupted
            When the run has been saved and is to be continued: leaves with exit code 75.
        """
        return self._loop.steps(data, until, sys._getframe(1))  # noqa: SLF001 - the script's

    def epochs(self, data: ElasticLoader, *, until: int) -> Iterator[int]:
        """Go through the remaining epochs, each with a loop over :meth:`steps` and with what follows it.

        A run that goes on does so in the epoch in which it was. What stands before the loop over its steps is then
        done again; what follows it belongs to the epoch's last step: it is done once, and a checkpoint is taken
        only after it. So schedules and early stopping an epoch belong there. Call :meth:`breathe` in a validation
        that takes long.

        Parameters
        ----------
        data
            :meth:`loader`; tracked.
        until
            Number of epochs of the whole run.

        Yields
        ------
        int
            Index of the epoch, from 0.

        Raises
        ------
        UsageError
            If the data does not know its epochs, or if an epoch is left before its end.
        Interrupted
            When the run has been saved and is to be continued: leaves with exit code 75.

        Examples
        --------
        >>> for epoch in run.epochs(data, until=90):  # doctest: +SKIP
        ...     for step, batch in run.steps(data):
        ...         ...
        ...     validate(model)
        ...     scheduler.step()
        """
        return self._loop.epochs(data, until, sys._getframe(1))  # noqa: SLF001 - the script's

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
        self._loop.breathe(step_done=step_done)
