"""Signals are recorded, nothing more; a thread sees them even while Python's main thread is busy in C.

Python runs its signal handlers on the main thread, between bytecodes: never while that thread waits in a
collective. ``signal.set_wakeup_fd`` has the C handler write the signal's number into a pipe at once, and the
thread at the other end takes it from there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

#: What schedulers, people and launchers send: warnings, the end, a Ctrl-C.
WATCHED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
#: Warnings of the end: schedulers send them to the processes that a rank has forked, too, which would die.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
#: Ends the thread; no signal has this number.
_END = 0


class SignalWatch:
    """Calls back, on a thread of its own, for each watched signal that this process gets.

    A second Ctrl-C raises ``KeyboardInterrupt`` as usual: somebody is in a hurry. Forked processes, such as the
    workers of a data loader, are not watched; they pass over warnings, which are not for them.

    Parameters
    ----------
    on_signal
        Called with the signal's name, such as ``"SIGUSR2"``.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self._on_signal = on_signal
        self._previous: dict[signal.Signals, Any] = {}
        self._interrupts = 0
        self._write_fd: int | None = None
        self._previous_fd = -1
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Install the handlers and start the thread.

        Returns
        -------
        bool
            False if this is not the main thread, where Python allows no handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        self._write_fd = write_fd
        self._thread = threading.Thread(
            target=self._listen, args=(read_fd,), name="hpc-resume-signals", daemon=True
        )
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._record)
        os.register_at_fork(after_in_child=self._forked)  # for good, so it looks whether this watch goes on
        return True

    def stop(self, *, ignored: Collection[signal.Signals] = (), patience_s: float | None = None) -> None:
        """End the watch.

        Parameters
        ----------
        ignored
            Signals that are ignored from now on; the others mean what they did before.
        patience_s
            How long to wait for a call that is under way; None: until it has returned.
        """
        if self._write_fd is None:
            return
        self._restore(ignored=ignored)
        os.write(self._write_fd, bytes([_END]))  # closing it would not do: a forked process may hold it open
        os.close(self._write_fd)
        self._write_fd = None
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(patience_s)

    def _restore(self, *, ignored: Collection[signal.Signals]) -> None:
        for number, previous in self._previous.items():
            keep = signal.SIG_DFL if previous is None else previous
            signal.signal(number, signal.SIG_IGN if number in ignored else keep)
        signal.set_wakeup_fd(self._previous_fd)

    def _forked(self) -> None:
        """In a forked process: what it is sent must not count as sent to this one."""
        if self._write_fd is not None:
            self._restore(ignored=WARNINGS)
            os.close(self._write_fd)
            self._write_fd = None

    def _record(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        # The C handler has written the number already; here only impatience is noted.
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def _listen(self, read_fd: int) -> None:
        with os.fdopen(read_fd, "rb", buffering=0) as pipe:
            while True:
                for number in pipe.read(64):
                    if number == _END:
                        return
                    if number in WATCHED:
                        self._on_signal(signal.Signals(number).name)
