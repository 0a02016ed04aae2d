"""What a run lets be seen of it: metrics, trackers that get them, and a probe of its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc_resume.errors import UsageError
from hpc_resume.run import generators
from hpc_resume.run.loop import Loop
from hpc_resume.run.place import Place
from hpc_resume.run.tracking.mlflow import Mlflow
from hpc_resume.run.tracking.tensorboard import TensorBoard
from hpc_resume.run.tracking.trackers import Silent
from hpc_resume.run.tracking.wandb import Wandb


class Observing(Place):
    """The part of :class:`hpc_resume.Run` that watches and is watched."""

    _loop: Loop
    _begun: bool

    def probe(self, function: Callable[..., Any], *, batch: Any = None) -> None:
        """Have a function show that what was restored computes what was saved; call it before :meth:`track`.

        It runs before saves and after a restore, on all ranks, without gradients, with the tracked modules in
        evaluation mode and random generators put back afterwards. On the same kind of nodes it must give the same
        to the bit, on others within ``validation.tolerance``; else an older checkpoint is tried.

        Parameters
        ----------
        function
            Gives a number, a one-element tensor, or a dict of those: the loss on fixed data. It changes nothing.
        batch
            That data: tensors, in dicts, lists and tuples. It is stored in the run directory by its digest, rank 0's
            for all, and given to the function, on :attr:`device`.

        Raises
        ------
        UsageError
            If it is called too late, or the batch can't be stored.

        Examples
        --------
        >>> run.probe(lambda batch: loss_fn(model(batch["x"]), batch["y"]), batch=fixed)  # doctest: +SKIP
        >>> run.track(model=model, optimizer=optimizer, data=data)  # doctest: +SKIP
        """
        if not self._begun or self._loop.tracking:
            raise UsageError("run.probe: call it inside 'with hr.Run() as run:', before run.track(…)")
        self._session.probe(function, batch, self._device)

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
        self._session.metrics.log(self._session.step, values)

    def tensorboard(self, **options: Any) -> Any:
        """Write what :meth:`log` is given for TensorBoard, too; call it after :meth:`track`.

        Parameters
        ----------
        **options
            Of ``torch.utils.tensorboard.SummaryWriter``; ``log_dir`` is ``trackers/tensorboard`` in the run directory.

        Returns
        -------
        SummaryWriter
            For images, text and the like; on other ranks than 0 an object that does nothing.
        """
        folder = self._session.directory.trackers / "tensorboard"
        return self._attach(TensorBoard, folder, self._session.step, options)

    def wandb(self, **options: Any) -> Any:
        """Send what :meth:`log` is given to Weights & Biases, too; call it after :meth:`track`.

        Parameters
        ----------
        **options
            Of ``wandb.init``; ``id`` is the run's own, and the same in every attempt.

        Returns
        -------
        wandb.Run
            On other ranks than 0 an object that does nothing.
        """
        return self._attach(Wandb, *self._about(), options)

    def mlflow(self, **options: Any) -> Any:
        """Send what :meth:`log` is given to MLflow, too; call it after :meth:`track`.

        Parameters
        ----------
        **options
            Of ``mlflow.start_run``, and ``tracking_uri`` and ``experiment``.

        Returns
        -------
        mlflow.ActiveRun
            The same run in every attempt; on other ranks than 0 an object that does nothing.
        """
        return self._attach(Mlflow, *self._about(), options)

    def _about(self) -> tuple[Path, str, str, Mapping[str, Any]]:
        """Give the folder of trackers, and the run's id, name and arguments."""
        session = self._session
        config = session.config
        return session.directory.trackers, session.facts.run_id, config.name, config.entry.kwargs

    def _attach(self, kind: type[TensorBoard | Wandb | Mlflow], *arguments: Any) -> Any:
        """Begin to hand metrics on to a tracker, on rank 0."""
        if not self._loop.tracking:
            raise UsageError(
                "a tracker must know at which step the run goes on: call run.tensorboard(), run.wandb() and "
                "run.mlflow() after run.track(…)"
            )
        if self._session.rank != 0:
            return Silent()
        with generators.put_back():  # some draw a name, in a new run alone
            return self._session.trackers.attach(kind.name, lambda: kind(*arguments)).object
