"""Whether crashed ranks are started again in the same allocation. The batch script keeps to the same rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc_resume.policy.exits import died_by_signal

#: Killed by a warning, before a rank knew what it means: 128 + SIGUSR1, 128 + SIGUSR2, and as Python counts.
_WARNED = frozenset({138, 140, -10, -12})
#: What an attempt's journal says of its end.
WORDS = frozenset({"stop_requested", "stop_agreed", "ended"})
#: Unknown is why a peer was lost, as long as nobody has said so.
_CRASHES = frozenset({"crash", "unknown"})


def starts_again(
    exit_codes: Sequence[int],
    words: Sequence[Mapping[str, Any]],
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
    words
        The events :data:`WORDS` of the attempt's journal; none if its rank 0 was killed, or there was none yet.
    left_s
        Until the end of the job; ``None`` if it has none.
    least_s
        Less is not worth a restart.
    restarts, most
        How often that has been done in a row without a new checkpoint, and how often it may be.
    """
    if restarts >= most or (left_s is not None and left_s <= least_s):
        return False
    telling = [word for word in words if not _is_about_a_peer(word)]
    if not telling:
        killed = {code for code in exit_codes if died_by_signal(code)}
        return bool(killed) and not _WARNED & killed
    last = telling[-1]
    crashed = last.get("cause") in _CRASHES and last.get("decision") == "continue"
    return crashed and len(telling) == 1 and not (last.get("exclude") or last.get("move_on"))


def _is_about_a_peer(word: Mapping[str, Any]) -> bool:
    """Whether it is the SIGTERM with which launchers end the peers of a rank that died."""
    return word.get("event") == "stop_requested" and (word.get("cause"), word.get("signal")) == (
        "signal",
        "SIGTERM",
    )
