"""Reading what may be damaged or made up: files that are none, JSON that is a bomb, text that steers terminals."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
import sys
from pathlib import Path
from typing import Any

#: Longest integer in JSON that is read. Source: Python's own limit, which Python 3.10 need not have.
_LONGEST_DIGITS = 4300
#: Read at a time: memory is taken for what is there, not for what may be.
_PIECE_BYTES = 1 << 20
_LONG_NUMBER = re.compile(r"\d{400,}")
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60


def open_regular(path: Path | str, *, dir_fd: int | None = None, follow: bool = False) -> int:
    """Open a regular file for reading, and nothing else: a FIFO would block, a device might act.

    Parameters
    ----------
    path
        The file.
    dir_fd
        Folder from which ``path`` counts.
    follow
        Whether it may be a symbolic link to one.

    Raises
    ------
    OSError
        If it can't be opened, or is no regular file.
    """
    _check_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow).st_mode, path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        _check_regular(os.fstat(fd).st_mode, path)  # it may have been exchanged meanwhile
    except OSError:
        os.close(fd)
        raise
    return fd


def read_regular(path: Path | str, *, longest_bytes: int, follow: bool = True) -> bytes:
    """Read a regular file; see :func:`open_regular`.

    Raises
    ------
    OSError
        If it can't be read, is no regular file, or is longer.
    """
    fd = open_regular(path, follow=follow)
    data = bytearray()
    with os.fdopen(fd, "rb", buffering=0) as file:
        if os.fstat(fd).st_size > longest_bytes:
            raise OSError(errno.EFBIG, f"longer than {longest_bytes} bytes", str(path))
        while piece := file.read(_PIECE_BYTES):
            data += piece
            if len(data) > longest_bytes:
                raise OSError(errno.EFBIG, f"longer than {longest_bytes} bytes", str(path))
    return bytes(data)


def _check_regular(mode: int, path: Path | str) -> None:
    if not stat.S_ISREG(mode):
        what = next((word for test, word in _KINDS if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"{what}, not a regular file", str(path))


def parse_json(data: bytes) -> Any:
    """Parse JSON of one meaning only: UTF-8, no key twice, every number finite and of bounded length.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    text = data.decode()
    if getattr(sys, "get_int_max_str_digits", int)() == 0 and any(
        len(number[0]) > _LONGEST_DIGITS for number in _LONG_NUMBER.finditer(text)
    ):
        raise ValueError(f"a number of more than {_LONGEST_DIGITS} digits")
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_finite, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is no finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def check_nesting(value: Any, deepest: int) -> None:
    """Check that a JSON value is not nested deeper; never recurses itself.

    Raises
    ------
    ValueError
        If it is.
    """
    level = [value]
    for _ in range(deepest + 1):
        level = [
            item
            for node in level
            if isinstance(node, list | dict)
            for item in (node if isinstance(node, list) else node.values())
        ]
        if not level:
            return
    raise ValueError(f"nested more than {deepest} deep")


def check_text(text: str) -> str:
    """Return a text as it is if it can be written as UTF-8; JSON can spell half characters that can't.

    Raises
    ------
    ValueError
        If it can't.
    """
    if not text.isascii():
        text.encode()
    return text


def brief(value: Any) -> str:
    """Spell a value for a message, in bounded time and length, however large or deep it is."""
    return _BRIEF.repr(value)


def printable(text: str) -> str:
    r"""Make text that a terminal only shows: what is not printable, line ends and tabs apart, is spelled ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
