"""Metrics: what ``run.log`` is given, one JSON line a step, in a file of this rank's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hpc_resume import log
from hpc_resume.errors import UsageError
from hpc_resume.files import Clock, append_whole
from hpc_resume.journal import write_line
from hpc_resume.run.tracking.trackers import Row, Trackers

#: Values are turned into numbers and written at most this often: reading a GPU tensor waits for the GPU.
_FLUSH_S = 1.0
#: What a line holds besides.
_TAKEN = frozenset({"step", "t"})


class Metrics:
    """Collects metrics and writes them now and then.

    Parameters
    ----------
    path
        The file; appended to.
    clock
        Unix time in seconds.
    trackers
        They get the same.
    """

    def __init__(self, path: Path, *, clock: Clock, trackers: Trackers | None = None) -> None:
        self._trackers = trackers
        self._path = path
        self._clock = clock
        self._pending: dict[int, dict[str, Any]] = {}
        self._flushed = clock()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Keep values of a step; tensors are not read yet.

        Raises
        ------
        UsageError
            If a value is neither a number nor a one-element tensor, or its name is taken.
        """
        checked = {name: _check(name, value) for name, value in values.items()}
        self._pending.setdefault(step, {"t": self._clock()}).update(checked)

    def maybe_flush(self) -> None:
        """Write what is pending if the last time was long enough ago."""
        if self._pending and self._clock() - self._flushed >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        self._flushed = self._clock()
        pending, self._pending = self._pending, {}  # whatever goes wrong below would go wrong again
        if not pending:
            return
        lines: list[bytes] = []
        rows: list[Row] = []
        for step, row in pending.items():
            numbers = {name: float(value) for name, value in row.items()}
            lines.append(write_line({**numbers, "step": step}))
            rows.append((step, numbers.pop("t"), numbers))
        if self._trackers is not None:
            self._trackers.send(rows)
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                append_whole(fd, b"".join(lines))
            finally:
                os.close(fd)
        except OSError as error:  # a full disk ends no training
            log.say(f"{self._path}: metrics of {len(lines)} steps are lost ({error})")


def _check(name: str, value: Any) -> Any:
    """Give a value as it is kept: a number, or a tensor that is read later."""
    if name in _TAKEN:
        raise UsageError(f"run.log: {name!r} is recorded by itself; leave it out, or give it another name")
    if hasattr(value, "detach"):
        if value.numel() == 1:
            return value.detach()
        what = f"a tensor of shape {list(value.shape)}"
    else:
        try:
            return float(value)
        except (TypeError, ValueError):
            what = repr(value) if isinstance(value, (str, type(None))) else f"a {type(value).__name__}"
    raise UsageError(
        f"run.log: {name} is {what}, and only numbers and one-element tensors can be logged; "
        f"give one, such as {name}.mean()"
    )
