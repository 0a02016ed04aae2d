"""What Slurm is asked about more than one job: how all of a user's jobs are, and how large an array may be."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from functools import partial

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.command import Runner, run_command

#: A queue of many thousand jobs takes slurmctld seconds.
_COMMAND_TIMEOUT_S = 60.0
#: sbatch's words for a limit on jobs that are submitted and not over. Source: job_reason_string() in Slurm's
#: slurm_protocol_defs.c, and strerror ESLURM_ACCOUNTING_POLICY.
_SUBMIT_LIMIT = re.compile(r"(?:Assoc|QOS)\w*Submit\w*Limit|job submit limit", re.IGNORECASE)


class SlurmArrays:
    """Job arrays of this user, on the cluster that the Slurm commands of this machine speak of.

    Parameters
    ----------
    runner
        Runs a command; a test gives its own.
    """

    def __init__(self, runner: Runner | None = None) -> None:
        self._run: Runner = runner or partial(run_command, environ={})

    def largest_array(self) -> int:
        """How many elements one job array may have.

        Raises
        ------
        SchedulerError
            If Slurm does not say, or allows no arrays.
        """
        text = self._ask("scontrol", "show", "config")
        size = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
        if size is None:
            raise SchedulerError("scontrol show config: says no MaxArraySize; submit the runs one by one")
        # Its indices go up to MaxArraySize - 1. Source: slurm.conf(5), MaxArraySize and max_array_tasks.
        tasks = re.search(r"^SchedulerParameters\s*=.*\bmax_array_tasks=(\d+)", text, re.MULTILINE)
        largest = min(int(size[1]), int(tasks[1]) if tasks else int(size[1]))
        if largest < 1:
            raise SchedulerError(
                "this site allows no job arrays (MaxArraySize=0); submit the runs one by one"
            )
        return largest

    def job_states(self, users: Iterable[int] = ()) -> dict[str, str]:
        """Tell how all jobs of some users are that Slurm remembers: ``{"120_3": "RUNNING"}``.

        Those that are over are forgotten after minutes (MinJobAge).

        Parameters
        ----------
        users
            Their numbers; by default, who asks.

        Raises
        ------
        SchedulerError
            If Slurm does not answer.
        """
        # --array: each element by itself, also those that wait
        whose = ",".join(map(str, sorted(users) or [os.getuid()]))
        words = ["squeue", "--noheader", "--array", "--states=all", f"--user={whose}", "--format=%i %T"]
        lines = (line.split() for line in self._ask(*words).splitlines())
        return {line[0]: line[1] for line in lines if len(line) == 2}

    def _ask(self, *words: str) -> str:
        said = " ".join(words)
        try:
            done = self._run(words, _COMMAND_TIMEOUT_S)
        except FileNotFoundError:
            raise SchedulerError(f"{said}: there is no {words[0]} on PATH; ask on a login node") from None
        except subprocess.TimeoutExpired:
            raise SchedulerError(f"{said}: no answer within {_COMMAND_TIMEOUT_S:g} s; try again") from None
        if done.code != 0:
            raise SchedulerError(f"{said}: {done.complaint}")
        return done.out


def is_submit_limit(complaint: str) -> bool:
    """Whether sbatch refused a job because the user has too many already: fewer, or later, may be accepted."""
    return _SUBMIT_LIMIT.search(complaint) is not None
