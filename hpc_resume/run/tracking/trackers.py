"""Hands metrics on to experiment trackers, on a thread: no server keeps training waiting, and none ends it."""

from __future__ import annotations

import contextlib
import importlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from hpc_resume.errors import UsageError

#: What an attempt ended as.
DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"
#: Rows of metrics that wait for a slow tracker at most, in batches of a second or so.
_LONGEST_QUEUE = 600
#: A tracker may take so long at the end of an attempt.
_CLOSE_S = 5.0

#: Step from 0, Unix time in seconds, values by name.
Row = tuple[int, float, Mapping[str, float]]


class Tracker(Protocol):
    """What is told of metrics; all but ``end`` on the thread. ``object`` is what users get."""

    name: str
    object: Any

    def send(self, rows: Sequence[Row]) -> None:
        """Take metrics, by ascending step."""

    def flush(self) -> None:
        """Make what was taken durable."""

    def close(self, outcome: str) -> None:
        """Take note that the attempt ends."""

    def end(self, outcome: str) -> None:
        """Do what only the main thread may do then."""


class Trackers:
    """The trackers of a run, on rank 0; on other ranks there are none.

    Parameters
    ----------
    say
        Into the log.
    close_s
        How long they may take at the end.
    """

    def __init__(self, say: Callable[[str], None], *, close_s: float = _CLOSE_S) -> None:
        self._say = say
        self._close_s = close_s
        self._attached: list[Tracker] = []
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread: threading.Thread | None = None
        self._overflown = False

    def attach(self, name: str, make: Callable[[], Tracker]) -> Tracker:
        """Make a tracker, and hand metrics on to it from now on.

        Raises
        ------
        UsageError
            If there is one of its kind already.
        """
        if any(each.name == name for each in self._attached):
            raise UsageError(f"run.{name}: call it once")
        tracker = make()
        self._attached.append(tracker)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hpc-resume-track", daemon=True)
            self._thread.start()
        return tracker

    def send(self, rows: Sequence[Row]) -> None:
        """Hand metrics on; never waits."""
        if self._attached and rows:
            self._put(lambda tracker: tracker.send(rows))

    def flush(self) -> None:
        """Have all that was handed on made durable, without waiting for it."""
        if self._attached:
            self._put(lambda tracker: tracker.flush())

    def close(self, outcome: str) -> None:
        """End with an attempt; waits a little."""
        if self._thread is None:
            return
        self._put(lambda tracker: tracker.close(outcome))
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._close_s)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            names = ", ".join(each.name for each in self._attached)
            self._say(
                f"{names}: not done within {self._close_s:g} s; what is missing there stands in the run's metrics"
            )
        else:
            self._each(lambda tracker: tracker.end(outcome))
        self._thread = None

    def _put(self, what: Callable[[Tracker], None]) -> None:
        try:
            self._queue.put_nowait(what)
        except queue.Full:
            if not self._overflown:
                self._say(
                    "a tracker is too slow: some metrics are left out there; the run's own have them all"
                )
            self._overflown = True

    def _work(self) -> None:
        while (what := self._queue.get()) is not None:
            self._each(what)

    def _each(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._attached):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001 - whatever a tracker does, training goes on
                self._attached.remove(tracker)
                self._say(
                    f"{tracker.name} FAILED and gets no more metrics: {type(error).__name__}: {error!s:.300}"
                )


class Silent:
    """Stands for a tracker's object where there is none: whatever is done with it, nothing happens."""

    def __getattr__(self, name: str) -> Silent:
        """Give itself, whatever is asked for."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Silent:
        """Give itself, whatever is called."""
        return self

    def __setattr__(self, name: str, value: object) -> None:
        pass

    def __getitem__(self, _: object) -> Silent:
        return self

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def needed(module: str, extra: str) -> Any:
    """Import a tracker's package.

    Raises
    ------
    UsageError
        If it is not installed; says how.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"run.{extra}: the package is not installed ({error}): pip install 'hpc_resume[{extra}]'"
        ) from error
