"""Metrics: what ``run.log`` is given, one JSON line a step, in a file of this rank's own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hpc_resume.files import Clock, append_whole

#: Values are turned into numbers and written at most this often: reading a GPU tensor waits for the GPU.
_FLUSH_S = 1.0


class Metrics:
    """Collects metrics and writes them now and then.

    Parameters
    ----------
    path
        The file; appended to.
    clock
        Unix time in seconds.
    """

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._pending: dict[int, dict[str, Any]] = {}
        self._flushed = clock()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Keep values (numbers or one-element tensors) of a step; tensors are not read yet."""
        row = self._pending.setdefault(step, {"t": self._clock()})
        for name, value in values.items():
            row[name] = value.detach() if hasattr(value, "detach") else value

    def maybe_flush(self) -> None:
        """Write what is pending if the last time was long enough ago."""
        if self._pending and self._clock() - self._flushed >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        self._flushed = self._clock()
        if not self._pending:
            return
        lines = []
        for step, row in self._pending.items():
            numbers = {name: float(value) for name, value in row.items()}
            lines.append(json.dumps({"step": step, **numbers}))
        self._pending.clear()
        data = ("\n".join(lines) + "\n").encode()
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                append_whole(fd, data)
            finally:
                os.close(fd)
        except OSError as error:  # a full disk ends no training
            sys.stderr.write(f"hpc_resume: {self._path}: metrics of {len(lines)} steps are lost ({error})\n")
