"""What the exit codes of a job's ranks mean for the run. The batch script keeps to the same rule."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_resume.errors import EXIT_CONTINUE, EXIT_DONE

#: Shells and srun report a death by signal N as 128 + N; 64 is the last real-time signal.
_SIGNAL_CODES = range(129, 128 + 64 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to do after an attempt, and why."""

    decision: Literal["done", "continue", "stop"]
    why: str


def died_by_signal(exit_code: int) -> bool:
    """Whether a code, as Python (negative) or a shell (128 + N) gives it, means a death by signal."""
    return exit_code < 0 or exit_code in _SIGNAL_CODES


def after_exit(exit_codes: Sequence[int]) -> Outcome:
    """Decide from the exit codes of all ranks.

    A rank that fails takes its peers down in many ways, so the most hopeful code decides: one rank that
    saved (75), or was killed rather than failed, has the run continued. A program that is simply wrong
    fails with the same small code on the rank that hits it first, and is not run again.

    Parameters
    ----------
    exit_codes
        One for each rank, negative or above 128 for a death by signal.
    """
    if not exit_codes:
        return Outcome(decision="stop", why="no rank was started")
    saved = [rank for rank, code in enumerate(exit_codes) if code == EXIT_CONTINUE]
    killed = [rank for rank, code in enumerate(exit_codes) if died_by_signal(code)]
    failed = [rank for rank, code in enumerate(exit_codes) if code not in (EXIT_DONE, EXIT_CONTINUE)]
    if saved:
        return Outcome(decision="continue", why=f"{_ranks(saved)} left with exit code {EXIT_CONTINUE}")
    if killed:
        number = exit_codes[killed[0]]
        return Outcome(
            decision="continue",
            why=f"{_ranks(killed)} killed by signal {_signal(-number if number < 0 else number - 128)}",
        )
    if failed:
        return Outcome(decision="stop", why=f"{_ranks(failed)} failed with exit code {exit_codes[failed[0]]}")
    return Outcome(decision="done", why="all ranks finished")


def _signal(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
