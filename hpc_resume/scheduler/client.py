"""Slurm's commands, asked and told from places where they may hang, be killed or be missing."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import partial

import stamina

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.command import Completed, Runner, run_command

#: One command; slurmctld answers in 10-100 ms, but under load it takes its time.
_COMMAND_TIMEOUT_S = 10.0
#: All tries of one question. KillWait, the time to answer in, is 30 s by default.
_TOTAL_TIMEOUT_S = 20.0
_ATTEMPTS = 4

#: Answers that no second try changes.
FINAL = (
    "invalid job id",
    "not found",  # of an array that is there, an element that waited when it was cancelled (measured)
    "access/permission denied",
    "invalid user id",
    "presently disabled",
    "not supported",
    "can not be requeued",
)


class _TryAgainError(Exception):
    """The command failed in a way that may pass."""


class SlurmClient:
    """Runs Slurm's commands.

    Parameters
    ----------
    runner
        Runs a command; a test gives its own.
    """

    def __init__(self, runner: Runner | None = None) -> None:
        # Unix seconds instead of local time, which is ambiguous once a year.
        self._run: Runner = runner or partial(run_command, environ={"SLURM_TIME_FORMAT": "%s"})

    def ask(self, words: Sequence[str], *, expect: str) -> str:
        """Run a query and return its answer.

        Raises
        ------
        SchedulerError
            If there is none with ``expect`` in it.
        FileNotFoundError
            If there is no such command here.
        """
        done = self.retry(words, final=FINAL, expect=expect)
        if done.code != 0 or expect not in done.out:
            raise SchedulerError(f"{' '.join(words)}: {done.complaint}")
        return done.out

    def retry(self, words: Sequence[str], *, final: Sequence[str], expect: str = "") -> Completed:
        """Run a command until it succeeds, gives a final answer, or the tries are used up."""
        last = Completed(code=-1, out="", err="not run")
        try:
            for attempt in stamina.retry_context(
                on=_TryAgainError,
                attempts=_ATTEMPTS,
                timeout=_TOTAL_TIMEOUT_S,
                wait_initial=0.2,
                wait_max=2.0,
            ):
                with attempt:
                    last = self.once(words)
                    _check(last, final=final, expect=expect)
        except _TryAgainError:
            pass  # the caller reads the last answer
        return last

    def once(self, words: Sequence[str]) -> Completed:
        """Run a command once; ``FileNotFoundError`` if there is none."""
        try:
            return self._run(words, _COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Completed(code=-1, out="", err=f"no answer within {_COMMAND_TIMEOUT_S:g} s")
        except FileNotFoundError:
            raise
        except OSError as error:  # no memory or no process left: may pass
            return Completed(code=-1, out="", err=str(error))


def says(done: Completed, phrases: Sequence[str]) -> bool:
    """Whether a command failed with one of these phrases."""
    complaint = done.complaint.lower()
    return done.code != 0 and any(phrase in complaint for phrase in phrases)


def _check(done: Completed, *, final: Sequence[str], expect: str) -> None:
    """Raise what the retry waits for, unless the command succeeded or gave a final answer."""
    if (done.code != 0 or expect not in done.out) and not says(done, final):
        raise _TryAgainError(done.complaint)
