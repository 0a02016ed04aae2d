"""The journal of one attempt: append-only events, one JSON object a line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_resume.files import append_whole

#: Of lines that could not be written, so many bytes are kept to be written later.
_KEPT_BYTES = 1 << 20


class Journal:
    """Appends events to ``events.jsonl``; one process writes it, anyone reads it.

    Each event is one ``write`` to a file opened with ``O_APPEND``: a process that dies leaves whole lines
    behind, and at most one torn line at the end, which :func:`read_events` passes over. A full disk ends no
    training: what can't be written is said aloud, kept, and written with a later event.

    Parameters
    ----------
    path
        The file; its folder must exist.
    clock
        Gives Unix time in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._kept = b""
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def event(self, kind: str, /, *, durable: bool = False, **fields: Any) -> None:
        """Append one event.

        Parameters
        ----------
        kind
            What happened, in snake case: ``"restored"``, ``"stop_requested"``.
        durable
            Wait until the line is on disk.
        **fields
            JSON values.
        """
        line = json.dumps({"t": round(self._clock(), 3), "event": kind, **fields}, allow_nan=True)
        data = self._kept + (line + "\n").encode()
        try:
            append_whole(self._fd, data)
            self._kept = b""
            if durable:
                os.fsync(self._fd)
        except OSError as error:
            if not self._kept:
                sys.stderr.write(f"hpc_resume: {self.path}: can't be written ({error}); trying again later\n")
            self._kept = data if len(data) < _KEPT_BYTES else self._kept

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read a journal.

    Parameters
    ----------
    path
        A file of JSON lines; one that does not exist is empty.

    Returns
    -------
    list of dict
        The events in order. A line that is no JSON object (the torn last line of a killed process) is left
        out.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            events.append(record)
    return events
