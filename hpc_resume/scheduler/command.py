"""Running a scheduler's command from inside a job that is being signalled."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

#: What Slurm sends to every process of a job, children of its tasks included.
_JOB_SIGNALS = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A command that has ended; ``code`` is negative if a signal ended it."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What it said, on stderr if it is a good command, in one line."""
        said = " ".join((self.err.strip() or self.out).split())
        return said or f"exit code {self.code}, nothing on stderr"


#: Runs a command: words, seconds to wait at most. Raises ``FileNotFoundError`` or ``subprocess.TimeoutExpired``.
Runner = Callable[[Sequence[str], float], Completed]


def run_command(
    words: Sequence[str], timeout_s: float, *, environ: Mapping[str, str] | None = None
) -> Completed:
    """Run a command that the job's own signals can't kill.

    Slurm sends a job's SIGTERM to the children of its tasks too: without care, the ``scontrol`` that asks what
    the SIGTERM meant dies of it (measured). The child inherits this thread's signal mask, through ``exec``
    too, so the signals are blocked from its first instruction on; those that come for this process meanwhile
    are delivered when the mask is restored.

    Parameters
    ----------
    words
        The command and its arguments; no shell is involved.
    timeout_s
        After that many seconds it is killed.
    environ
        Variables on top of this process's own.

    Raises
    ------
    FileNotFoundError
        If there is no such command, as in many containers.
    subprocess.TimeoutExpired
        If it was killed.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    try:
        child = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environ or {})},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    with child:
        try:
            out, err = child.communicate(timeout=timeout_s)
        except BaseException:
            child.kill()
            raise
    return Completed(code=child.returncode, out=out, err=err)
