"""Fields of a manifest that were read from a file: each as it must be, or a TypeError or ValueError."""

from __future__ import annotations

from typing import Any

from hpc_resume.checkpoint.structure import integers, string
from hpc_resume.files import JsonObject
from hpc_resume.untrusted import check_nesting

#: Deepest nesting of what is only shown to people.
_MAX_NESTING = 16


def listed(value: Any) -> list[Any]:
    """Return a list as it is."""
    if not isinstance(value, list):
        raise TypeError("no list where there must be one")
    return value


def shown(value: Any) -> JsonObject:
    """Return an object that is only shown to people."""
    if not isinstance(value, dict):
        raise TypeError("no object where there must be one")
    check_nesting(value, _MAX_NESTING)
    return value


def time_s(value: Any) -> float:
    """Return a time in seconds."""
    if type(value) not in {int, float}:
        raise TypeError("a time that is no number")
    return float(value)


def maybe_string(value: Any) -> str | None:
    """Return a string or None as it is."""
    return None if value is None else string(value)


def pair(value: Any) -> tuple[int, int]:
    """Return two integers."""
    first, second = integers(value)
    return first, second
