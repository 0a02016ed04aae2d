"""The journal of one attempt: append-only events, one JSON object a line.

Each line ends with its checksum, under the name ``"#"``::

    {"t": 1795532183.225, "event": "begun", "#": "5f3c0a91"}

It is the CRC-32 of the line's bytes before it. Lines without one, of earlier versions, are read all the same.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_resume import log
from hpc_resume.errors import IntegrityError
from hpc_resume.files import append_whole
from hpc_resume.untrusted import read_regular

#: A longer journal is none; one event takes some hundred bytes.
_LONGEST_BYTES = 1 << 28
_CHECKSUM = "#"  # no name that a keyword argument could have
_SEALED = re.compile(rb'(.*), "#": "([0-9a-f]{8})"\}', re.DOTALL)
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
        line = write_line({"t": round(self._clock(), 3), "event": kind, **fields})
        data = self._kept + line
        try:
            append_whole(self._fd, data)
            self._kept = b""
            if durable:
                os.fsync(self._fd)
        except OSError as error:
            if not self._kept:
                log.say(f"{self.path}: can't be written ({error}); trying again later")
            self._kept = data if len(data) < _KEPT_BYTES else self._kept

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_line(record: Mapping[str, Any]) -> bytes:
    """Give a record as a line with its checksum; it must not be empty."""
    body = json.dumps(record, allow_nan=True).encode()[:-1]
    return b'%s, "%s": "%08x"}\n' % (body, _CHECKSUM.encode(), zlib.crc32(body))


def read_events(path: Path, kinds: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Read a journal.

    Parameters
    ----------
    path
        A file of JSON lines; one that does not exist is empty.
    kinds
        Only these events: lines of others are not even parsed, which makes a run's many journals quick to read.

    Returns
    -------
    list of dict
        The events in order, without their checksums. A line that is no JSON object (the torn last line of a
        killed process), or that is not what was written, is left out.

    Raises
    ------
    IntegrityError
        If it can't be read, or is no file.
    """
    try:
        lines = read_regular(path, longest_bytes=_LONGEST_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    if kinds is not None:
        marks = [b'"event": "%s"' % kind.encode() for kind in kinds]
        lines = [line for line in lines if any(mark in line for mark in marks)]
    events = [record for line in lines if (record := _read_line(line)) is not None]
    return events if kinds is None else [event for event in events if event.get("event") in kinds]


def damaged_lines(path: Path, *, sealed: bool) -> Iterator[tuple[int, str]]:
    """Find the lines of a file of JSON lines that are not what was written.

    Parameters
    ----------
    path
        The file.
    sealed
        Whether every line must have a checksum; where one has, the others must have one anyway.

    Yields
    ------
    (int, str)
        The line's number, from 1, and what is wrong. The last line may be torn: a process that was killed
        while it wrote leaves the beginning of one.
    """
    *whole, rest = read_regular(path, longest_bytes=_LONGEST_BYTES).split(b"\n")
    sealed = sealed or any(map(_intact, [*whole, rest]))
    for number, line in enumerate(whole, 1):
        if _read_line(line) is None or (sealed and not _intact(line)):
            yield number, "is not what was written"
    if rest and _intact(rest[:-1]):  # its end, too, was written, and is something else now
        yield len(whole) + 1, "is not what was written: it goes on after its end"


def _intact(line: bytes) -> bool:
    """Whether a line has a checksum, and the right one."""
    match = _SEALED.fullmatch(line)
    return match is not None and zlib.crc32(match[1]) == int(match[2], 16)


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or (_CHECKSUM in record and not _intact(line)):
        return None
    record.pop(_CHECKSUM, None)
    return record
