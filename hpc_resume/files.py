"""Durable writes: the only way in which files of a run directory come to be.

``write → fsync → rename → fsync of the directory`` is spelled out once, here. What saves is handed a
:class:`Filesystem`, so that a test can hand it one that fails at a chosen call.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: A full disk, a quota, a server that does not answer: no fault of the program, and it may pass.
_PASSING = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
    }
)


#: Of those, what a damaged medium answers, too, and then it stays.
_DOUBTFUL = frozenset({errno.EIO, errno.EREMOTEIO})
#: What this process or its node has too little of, whichever file it opens.
_LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is a filesystem's and may be gone another time."""
    return any(isinstance(each, OSError) and each.errno in _PASSING for each in _causes(error))


def obstacle(error: BaseException | None) -> OSError | MemoryError | None:
    """Give what kept a file from being read that may well be whole; None if an error speaks of the file itself."""
    for each in _causes(error):
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno in _PASSING | _LACKING):
            return each
    return None


def may_be_damage(error: OSError | MemoryError) -> bool:
    """Whether an obstacle may also be a medium that is damaged."""
    return isinstance(error, OSError) and error.errno in _DOUBTFUL


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error, and what it was raised from."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__


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

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; unlike a rename, this never replaces."""
        os.link(source, target)

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

    def make_dirs(self, path: Path) -> None:
        """Make a folder and those above it, as far as they are not there; durable on return."""
        if not path.is_dir():
            self.make_dirs(path.parent)
            with contextlib.suppress(FileExistsError):  # somebody was faster
                self.mkdir(path)
            self.fsync_dir(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all that is in it, as far as the filesystem lets us."""
        with contextlib.suppress(OSError):
            for name in self.listdir(path):
                inner = path / name
                if inner.is_dir() and not inner.is_symlink():
                    self.remove_tree(inner)
                else:
                    with contextlib.suppress(OSError):
                        self.unlink(inner)
            self.rmdir(path)

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
        with self.replacing(path, os.O_WRONLY) as fd:
            self.write_all(fd, data, 0)

    @contextlib.contextmanager
    def replacing(
        self, path: Path, flags: int, open_file: Callable[[Path, int], int] | None = None
    ) -> Iterator[int]:
        """Write a file under a temporary name; on leaving it is made durable, and then ``path``.

        A failure removes the temporary file if the filesystem lets us, and its message names the file.

        Parameters
        ----------
        path
            What it becomes.
        flags
            Of ``open``, besides those that create.
        open_file
            Opens it, if not :meth:`open`.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            fd = (open_file or self.open)(temporary, flags | os.O_CREAT | os.O_TRUNC)
            try:
                yield fd
                self.fsync(fd)
            finally:
                self.close(fd)
            self.rename(temporary, path)
            self.fsync_dir(path.parent)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                error.filename = str(path)  # what fails on a descriptor does not know its name
            raise


#: The real one.
DISK = Filesystem()

#: A clock gives Unix time in seconds.
Clock = Callable[[], float]

JsonObject = dict[str, Any]


def append_whole(fd: int, data: bytes) -> None:
    """Append to a file that only this process writes: all of it, or nothing.

    Raises
    ------
    OSError
        If it can't be; what was written of it is taken back.
    """
    size_bytes = os.fstat(fd).st_size
    written = 0
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError:
        if written:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size_bytes)
        raise
