"""What is decided at the end of an attempt, for whoever has the run continued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a run goes on.

    Parameters
    ----------
    action
        ``"continue"`` or ``"stop"``.
    why
        In words.
    delay_s
        The next attempt begins no sooner than this many seconds from now.
    exclude
        Nodes that the next attempt must not get, each with the reason in ``why``.
    move_on
        The next attempt asks for the next of the configured node types.
    """

    action: Literal["continue", "stop"]
    why: str
    delay_s: float = 0.0
    exclude: tuple[str, ...] = ()
    move_on: bool = False
