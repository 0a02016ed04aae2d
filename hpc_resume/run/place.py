"""Where a script is: which rank of which attempt of which run, and on what."""

from __future__ import annotations

from typing import Any

import torch

from hpc_resume.config import Config
from hpc_resume.run.fitness import DTYPES
from hpc_resume.run.session import Session
from hpc_resume.run.settling import device_of
from hpc_resume.rundir import RunDirectory


class Place:
    """What a script can ask its run.

    Parameters
    ----------
    session
        This rank's side of the attempt.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._device = device_of(session.environment.local_rank)

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

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """What is set otherwise than when the restored checkpoint was taken: old and new value, by name.

        Arguments of the script go by their own names (``"lr"``), settings by dotted ones. Empty before
        :meth:`track`, in a new run, and once a checkpoint was taken with the new settings. What the checkpoint
        holds was restored: a learning rate is the optimizer's until the script sets it.

        Examples
        --------
        >>> run.track(model=model, optimizer=optimizer)  # doctest: +SKIP
        >>> if "lr" in run.changed:  # doctest: +SKIP
        ...     for group in optimizer.param_groups:
        ...         group["lr"] = lr
        """
        return dict(self._session.changed)
