"""Whether crashed ranks are started again in the same allocation. The batch script keeps to the same rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_resume.policy.exits import died_by_signal

#: Killed by a warning, before a rank knew what it means: 128 + SIGUSR1, 128 + SIGUSR2, and as Python counts.
_WARNED = frozenset({138, 140, -10, -12})


def starts_again(
    exit_codes: Sequence[int],
    last_word: Mapping[str, Any] | None,
    *,
    left_s: float | None,
    least_s: float,
    restarts: int,
    most: int,
) -> bool:
    """Decide after the end of an attempt in a job that nobody is ending.

    A crash is worth another try in place; a stop is not: whoever asked for it wants the allocation back.

    Parameters
    ----------
    exit_codes
        Of the ranks.
    last_word
        The last request to stop or ending in the attempt's journal; ``None`` if it has left none, as when its
        rank 0 was killed. Launchers end the peers of a rank that died by SIGTERM: a request that says no more
        than that is no stop if ranks were killed after it.
    left_s
        Until the end of the job; ``None`` if it has none.
    least_s
        Less is not worth a restart.
    restarts, most
        How often that has been done in a row without a new checkpoint, and how often it may be.
    """
    if restarts >= most or (left_s is not None and left_s <= least_s):
        return False
    if last_word is None or _is_about_a_peer(last_word):
        killed = [code for code in exit_codes if died_by_signal(code)]
        return bool(killed) and not _WARNED & set(killed)
    elsewhere = last_word.get("exclude") or last_word.get("move_on")
    return last_word.get("cause") == "crash" and last_word.get("decision") == "continue" and not elsewhere


def _is_about_a_peer(word: Mapping[str, Any]) -> bool:
    return word.get("event") == "stop_requested" and (word.get("cause"), word.get("signal")) == (
        "signal",
        "SIGTERM",
    )
