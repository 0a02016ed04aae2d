"""What acts when nothing has come for too long, what it takes as signs of life, and how the ranks act alike."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hpc_resume.policy.deadline import LAST_WORD_S, save_limit_s
from hpc_resume.run.agreement import FOLLOW_S
from hpc_resume.run.peers import Peers

#: A last save gets at least this long, whatever the scheduler says: its end of a job is not to the second.
LEAST_SAVE_S = 10.0
#: Key in the control store: seconds after the request after which rank 0 gives up.
_PATIENCE = "patience"


class Watchdog:
    """Does one thing after a time, on a thread, in place of what it was to do before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it guards nothing any more. What it does looks here first: it may have been cancelled too late."""
        with self._lock:
            return self._closed

    def set(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Do something after a time, instead of what was to be done before; nothing once it is closed."""
        with self._lock:
            if self._closed:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(seconds, action, args)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """Guard nothing any more."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()


class SignsOfLife:
    """What a rank does while no step of it ends: it breathes, or it saves.

    Attributes
    ----------
    breathed_s, saved_s
        When it did so last, by the monotonic clock; a save counts when it has ended.
    """

    def __init__(self) -> None:
        self.breathed_s = self.saved_s = -math.inf
        self._save_began_s: float | None = None

    def breathe(self) -> None:
        """Note that it breathes."""
        self.breathed_s = time.monotonic()

    @contextlib.contextmanager
    def while_saving(self) -> Iterator[None]:
        """Note that it saves meanwhile."""
        self._save_began_s = time.monotonic()
        try:
            yield
        finally:
            self._save_began_s, self.saved_s = None, time.monotonic()

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._save_began_s is not None

    def save_left_s(self, saves_s: Sequence[float], ends_in_s: float | None) -> float:
        """Seconds that the save which is under way may still take; 0 without one.

        Parameters
        ----------
        saves_s
            What earlier ones took.
        ends_in_s
            Until the end of the job, if that is known: like a save before a stop, it may last until then.
        """
        if (began_s := self._save_began_s) is None:
            return 0.0
        took_s = time.monotonic() - began_s
        left_s = save_limit_s(saves_s) - took_s
        if ends_in_s is not None:
            left_s = min(left_s, max(ends_in_s - LAST_WORD_S, LEAST_SAVE_S - took_s))
        return max(left_s, 0.0)


def tell_patience(peers: Peers, seconds: float) -> None:
    """On rank 0: tell the others how long after the request it gives up."""
    peers.apart().store.set(_PATIENCE, json.dumps(seconds))


def told_patience_s(peers: Peers | None, usual_s: float) -> float:
    """On other ranks: tell how long after the request to give up: a little later than rank 0, which may prolong it.

    Parameters
    ----------
    peers
        The other ranks; None before they have met.
    usual_s
        How long rank 0 waits if it has not said otherwise.

    Returns
    -------
    float
        0 if rank 0 can't be followed: it is gone, or not yet met.
    """
    if peers is not None:
        store = peers.apart().store
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0
            told_s = float(json.loads(store.get(_PATIENCE))) if store.check([_PATIENCE]) else usual_s
            return told_s + FOLLOW_S
    return 0.0
