"""A filesystem under test: it fails, stops or does half of its n-th call, and knows what a power cut leaves.

It works on a real folder. Beside it, it keeps in memory what is durable: the bytes of each file as of its last
fsync, the names in each folder as of that folder's last fsync. Nothing is really synced, so a save is quick.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

from hpc_resume.files import Filesystem


class Killed(BaseException):
    """The process is gone; nothing may catch it."""


class Faulty(Filesystem):
    """Counts every call that changes something, and has its way with one of them.

    Parameters
    ----------
    base
        A folder that is taken for durable; all that is under it is watched.
    at
        Number of the call, from 1; None: no fault.
    fault
        An errno: the call fails without effect. ``"late"``: it fails with EIO, after it has taken effect.
        ``"stop"``: the process is killed before it. ``"half"``: the process is killed after it, a write half
        done. ``"short"``: a write writes half, and says so. A function: is called, then all goes on.
    lasting
        From then on every call fails that needs space, until :attr:`full` is reset.
    direct
        Where O_DIRECT is refused: ``"open"``, ``"write"``, or nowhere.
    """

    def __init__(
        self,
        base: Path,
        *,
        at: int | None = None,
        fault: int | str | Callable[[], None] = "stop",
        lasting: bool = False,
        direct: str = "",
    ) -> None:
        self.base = base
        self.at = at
        self.fault = fault
        self.lasting = lasting
        self.direct = direct
        self.calls = 0
        self.log: list[str] = []
        self.hit = ""
        self.full = self.dead = False
        self._lock = threading.RLock()
        self._number = 0
        self._ids: dict[int, int] = {}  # by inode, which may be given again when a file is gone
        self._fds: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        self._names: dict[int, dict[str, int]] = {}
        self._folders: set[int] = set()

    # ------------------------------------------------------------ faults

    def _turn(self, what: str, path: object, *, needs_space: bool) -> str:
        """Count a call; returns how it is to be done: all of it (""), or "late", "half", "short"."""
        with self._lock:
            if self.dead:
                raise Killed(what)
            self.calls += 1
            self.log.append(f"{what} {path}")
            if self.full and needs_space:
                raise _error(errno.ENOSPC, path)
            if self.calls != self.at:
                return ""
            self.hit = what
        if callable(self.fault):
            self.fault()
            return ""
        if self.fault == "stop":
            self.dead = True
            raise Killed(what)
        if isinstance(self.fault, int):
            self.full = self.lasting
            if self.lasting and not needs_space:
                return ""
            raise _error(self.fault, path)
        return self.fault

    def _end(self, mode: str, what: str) -> None:
        if mode == "late":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if mode == "half":
            self.dead = True
            raise Killed(what)

    def _id(self, path: Path) -> int:
        status = path.lstat()
        if status.st_ino not in self._ids:
            self._number += 1
            self._ids[status.st_ino] = self._number
            if stat.S_ISDIR(status.st_mode):
                self._folders.add(self._number)
        return self._ids[status.st_ino]

    def _forget(self, path: Path) -> None:
        """The last name of an inode is about to go."""
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
            self._ids.pop(status.st_ino, None)

    # ------------------------------------------------------------ calls

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if self.direct == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        changes = flags & os.O_TRUNC or (flags & os.O_CREAT and not path.exists())
        how = self._turn("open", path, needs_space=True) if changes else ""
        fd = super().open(path, flags, mode)
        with self._lock:
            self._fds[fd] = self._id(path)
            if changes:
                self._dirty.add(self._fds[fd])
        try:
            self._end(how, "open")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        how = self._turn("pwrite", self._fds[fd], needs_space=True)
        if self.direct == "write" and os.get_blocking(fd) and _is_direct(fd):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._dirty.add(self._fds[fd])
        part = data[: max(len(data) // 2, 1)] if how in {"half", "short"} else data
        written = super().pwrite(fd, part, offset)
        self._end(how, "pwrite")
        return written

    def truncate(self, fd: int, size_bytes: int) -> None:
        how = self._turn("truncate", self._fds[fd], needs_space=False)
        self._dirty.add(self._fds[fd])
        super().truncate(fd, size_bytes)
        self._end(how, "truncate")

    def fsync(self, fd: int) -> None:
        how = self._turn("fsync", self._fds[fd], needs_space=True)
        with self._lock:
            self._bytes[self._fds[fd]] = Path(f"/proc/self/fd/{fd}").read_bytes()
            self._dirty.discard(self._fds[fd])
        self._end(how, "fsync")

    def fsync_dir(self, path: Path) -> None:
        how = self._turn("fsync_dir", path, needs_space=False)
        with self._lock:
            self._names[self._id(path)] = {inner.name: self._id(inner) for inner in path.iterdir()}
        self._end(how, "fsync_dir")

    def rename(self, source: Path, target: Path) -> None:
        how = self._turn("rename", f"{source} {target}", needs_space=False)
        try:
            with self._lock:
                if target.exists() and not target.is_dir():
                    self._forget(target)
                super().rename(source, target)
        finally:
            self._end(how, "rename")

    def link(self, source: Path, target: Path) -> None:
        how = self._turn("link", target, needs_space=True)
        super().link(source, target)
        self._end(how, "link")

    def mkdir(self, path: Path) -> None:
        how = self._turn("mkdir", path, needs_space=True)
        try:
            super().mkdir(path)
        finally:
            self._end(how, "mkdir")

    def rmdir(self, path: Path) -> None:
        how = self._turn("rmdir", path, needs_space=False)
        try:
            with self._lock:
                inode = path.stat().st_ino
                super().rmdir(path)
                self._ids.pop(inode, None)
        finally:
            self._end(how, "rmdir")

    def unlink(self, path: Path) -> None:
        how = self._turn("unlink", path, needs_space=False)
        try:
            with self._lock:
                self._forget(path)
                super().unlink(path)
        finally:
            self._end(how, "unlink")

    # ------------------------------------------------------------ power cuts

    def sync_all(self) -> None:
        """Take everything that is there for durable."""
        for folder in (self.base, *(path for path in self.base.rglob("*") if path.is_dir())):
            self._names[self._id(folder)] = {inner.name: self._id(inner) for inner in folder.iterdir()}
            self._bytes.update(
                {self._id(inner): inner.read_bytes() for inner in folder.iterdir() if inner.is_file()}
            )

    @property
    def unsynced(self) -> bool:
        """Whether there are bytes that a power cut takes although their file is there."""
        return bool(self._dirty & set(self._ids.values()))

    def after_power_cut(self, into: Path, *, names_late: bool) -> None:
        """Make what a power cut leaves.

        Parameters
        ----------
        into
            A new folder: what ``base`` is then.
        names_late
            The one extreme: of names only what was synced is there. Else the other one: all names are there,
            but bytes that were not synced are zeros.
        """
        into.mkdir()
        if names_late:
            self._build(self._id(self.base), into)
        else:
            self._copy(self.base, into)

    def _build(self, folder: int, into: Path) -> None:
        for name, inner in self._names.get(folder, {}).items():
            if inner in self._folders:
                (into / name).mkdir()
                self._build(inner, into / name)
            else:
                (into / name).write_bytes(self._bytes.get(inner, b""))

    def _copy(self, folder: Path, into: Path) -> None:
        for path in folder.iterdir():
            if path.is_dir():
                (into / path.name).mkdir()
                self._copy(path, into / path.name)
                continue
            number = self._id(path)
            known = self._bytes.get(number, b"") if number in self._dirty or number in self._bytes else None
            data = bytes(path.stat().st_size) if number in self._dirty else known
            (into / path.name).write_bytes(path.read_bytes() if data is None else data)


def _error(number: int, path: object) -> OSError:
    """As the system says it: calls on a descriptor know no name."""
    return OSError(number, os.strerror(number), *([] if isinstance(path, int) else [str(path)]))


def _is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
