"""What an examination found: one thing, how it is, and what that means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    what
        ``"free space"``.
    level
        ``"ok"``; ``"note"``: worth knowing; ``"bad"``: a run would fail because of it.
    detail
        How it is, and what to do about it.
    """

    what: str
    level: Literal["ok", "note", "bad"]
    detail: str


def patiently(
    what: str, look: Callable[[], Sequence[Finding]], *, patience_s: float, hint: str
) -> list[Finding]:
    """Look at something that may hang, as a broken GPU or filesystem does, or fail in any way.

    Parameters
    ----------
    what
        Name of the finding if there is no answer.
    look
        Called on a thread, which is left behind if it hangs.
    patience_s
        How long it may take.
    hint
        What a hang may mean.
    """
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(look())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
            found.append(Finding(what=what, level="bad", detail=f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(patience_s)
    if thread.is_alive():
        return [Finding(what=what, level="bad", detail=f"no answer within {patience_s:g} s: {hint}")]
    return found
