"""Durable writes: the only way in which files of a run directory come to be.

``write → fsync → rename → fsync of the directory`` is spelled out once, here. What saves is handed a
:class:`Filesystem`, so that a test can hand it one that fails at a chosen call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Filesystem:
    """The calls that reach the disk, one method each; a test overrides them to inject faults."""

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        """Open a file and return its descriptor, closed on exec."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        """Write at an offset; returns the number of bytes written, which may be fewer than given."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size_bytes: int) -> None:
        """Set a file's length."""
        os.ftruncate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        """Wait until a file's bytes are on disk."""
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Move a file or folder; replaces a file that is there."""
        os.rename(source, target)  # noqa: PTH104 - the system call itself is what matters here

    def mkdir(self, path: Path) -> None:
        """Make one folder; fails if it exists."""
        os.mkdir(path)  # noqa: PTH102 - as above

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)  # noqa: PTH106 - as above

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)  # noqa: PTH108 - as above

    def listdir(self, path: Path) -> list[str]:
        """Names in a folder, sorted."""
        return sorted(os.listdir(path))  # noqa: PTH208 - as above

    def fsync_dir(self, path: Path) -> None:
        """Wait until a folder's entries are on disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def write_all(self, fd: int, data: memoryview | bytes, offset: int) -> None:
        """Write all bytes at an offset, however many calls it takes."""
        view = memoryview(data).cast("B")
        while view:
            written = self.pwrite(fd, view, offset)
            if written <= 0:
                raise OSError(f"pwrite wrote {written} of {len(view)} bytes at offset {offset}")
            view, offset = view[written:], offset + written

    def write_file(self, path: Path, data: bytes) -> None:
        """Make ``path`` hold ``data``, all or nothing, and durable on return.

        A temporary name beside it carries the process id, so that two writers never share one.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            self.write_all(fd, data, 0)
            self.fsync(fd)
        finally:
            self.close(fd)
        self.rename(temporary, path)
        self.fsync_dir(path.parent)


#: The real one.
DISK = Filesystem()

#: A clock gives Unix time in seconds.
Clock = Callable[[], float]

JsonObject = dict[str, Any]
