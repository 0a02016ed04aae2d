"""Threads that work through a list while the caller goes on to look around."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: The caller looks around this often.
_LOOK_S = 0.25
#: Who leaves early waits this long for a thread: one that hangs in a filesystem must not keep the process.
_LEAVE_S = 1.0


class Crew(Generic[T, R]):
    """Some threads for one task, which may find more items as it goes.

    Parameters
    ----------
    work
        Does one item. What takes long looks at :attr:`halted`.
    threads
        How many at once.
    look
        Called on the caller's thread at least four times a second; what it raises ends the work.

    Attributes
    ----------
    halted
        Nobody wants the results any more.
    """

    def __init__(self, work: Callable[[T], R], *, threads: int, look: Callable[[], None]) -> None:
        self._work = work
        self._threads = threads
        self._look = look
        self._todo: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()
        self._open = 0
        self.halted = False

    def add(self, items: Iterable[T]) -> None:
        """Give it more to do."""
        for item in items:
            self._open += 1
            self._todo.put(item)

    def results(self) -> Iterator[R]:
        """Give the results as they come, until all items are done; raises what the work raises."""
        workers = [
            threading.Thread(target=self._labour, name="hpc-resume-data", daemon=True)
            for _ in range(self._threads)  # one item may become many
        ]
        for worker in workers:
            worker.start()
        looked_s = time.monotonic()
        try:
            while self._open:
                if time.monotonic() - looked_s >= _LOOK_S:
                    self._look()
                    looked_s = time.monotonic()
                try:
                    result, error = self._done.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                self._open -= 1
                if error is not None:
                    raise error
                yield result  # type: ignore[misc]  # without an error there is a result
        finally:
            self.halted = True
            for _ in workers:
                self._todo.put(None)
            until_s = time.monotonic() + _LEAVE_S
            for worker in workers:
                worker.join(max(until_s - time.monotonic(), 0))

    def _labour(self) -> None:
        while (item := self._todo.get()) is not None and not self.halted:
            try:
                self._done.put((self._work(item), None))
            except BaseException as error:  # noqa: BLE001 - the caller's to judge
                self._done.put((None, error))
