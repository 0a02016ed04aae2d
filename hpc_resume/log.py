"""What is said to the person who reads the log, on standard error. A log that can't be written ends nothing.

It often lies in the run's own folder: the disk that is too full for a checkpoint is too full for the line that
tells of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

#: A full disk, a pipe or terminal that nobody reads any more; a stream that is closed; none at all.
_UNWRITABLE = (OSError, ValueError, AttributeError)


def say(text: str) -> None:
    """Write a line, if it can be written."""
    with contextlib.suppress(*_UNWRITABLE):
        sys.stderr.write(f"hpc_resume: {text}\n")
        sys.stderr.flush()


def show(error: BaseException) -> None:
    """Write an exception with its traceback, if it can be written."""
    with contextlib.suppress(*_UNWRITABLE):
        traceback.print_exception(error)
        sys.stderr.flush()


def settle() -> None:
    """Write out what is still to be written, before the process ends; let go of streams that can't be written.

    At its end Python tries once more, and if that fails exits with 120 instead of the exit code that was meant.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except _UNWRITABLE:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process lives
