"""The attempt budget: a run may go on as long as it makes progress."""

from __future__ import annotations

from collections.abc import Sequence


def idle_attempts(first_steps: Sequence[int]) -> int:
    """Count the attempts at the end of a history that brought the run nowhere.

    Parameters
    ----------
    first_steps
        For each attempt of a job in order, and last for the one that is beginning: the step that it began
        at, which is what the one before it had saved.

    Returns
    -------
    int
        How many attempts in a row, up to the last one that ended, saved nothing new.

    Examples
    --------
    >>> idle_attempts([0, 100, 100, 100])
    2
    >>> idle_attempts([0, 100, 100, 150])
    0
    """
    idle = 0
    for before, after in zip(reversed(first_steps[:-1]), reversed(first_steps[1:]), strict=True):
        if after > before:
            break
        idle += 1
    return idle
