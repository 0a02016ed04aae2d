"""Processes that load data live as long as their rank wants them to, whatever signals the job is sent."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from hpc_resume.scheduler.signals import WARNINGS


class Shielded:
    """Initialises a worker of a data loader such that the job's signals do not end it.

    Slurm signals every process of a job, and a worker that dies makes its rank raise in the middle of a step,
    which could have been completed and saved. So a worker passes over warnings, and takes a SIGTERM from its rank
    alone, which is how data loaders end theirs.

    Parameters
    ----------
    then
        The user's ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        """Run in the worker, before it has any other thread."""
        for number in WARNINGS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(
            target=_end_by_rank, args=(os.getppid(),), name="hpc-resume-shield", daemon=True
        ).start()
        if self._then is not None:
            self._then(worker)


def _end_by_rank(rank_pid: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == rank_pid:
            os._exit(0)
