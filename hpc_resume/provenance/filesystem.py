"""What the filesystem of a run directory is and does, found out by doing it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.provenance.finding import Finding

#: Types in /proc/self/mountinfo that more than one machine can mount.
_SHARED = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse.beegfs",
        "fuse.ceph",
        "fuse.glusterfs",
        "fuse.juicefs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "orangefs",
        "panfs",
        "pvfs2",
        "quobyte",
        "smb3",
        "virtiofs",
        "wekafs",
    ]
)
#: Types that surely are one machine's.
_LOCAL = frozenset(["btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"])
#: Durable within this, or every checkpoint of many small files suffers.
_SLOW_S = 1.0
#: A rank whose clock is further off than this misjudges the end of its job, which is in the scheduler's time.
_SKEW_S = 5.0
_BAD_SKEW_S = 60.0
#: A checkpoint is a folder with a file for each rank, and a journal needs some.
_FEW_INODES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """Where a path's bytes are.

    Parameters
    ----------
    point
        Folder that it is mounted at.
    kind
        Type of the filesystem, as the kernel calls it.
    """

    point: str
    kind: str

    @property
    def shared(self) -> bool | None:
        """Whether other machines can have it; ``None``: the type does not say."""
        return True if self.kind in _SHARED else False if self.kind in _LOCAL else None


def mount_of(path: Path, *, mountinfo: str | None = None) -> Mount:
    """Find the filesystem of a path that exists.

    Parameters
    ----------
    path
        Absolute, without links.
    mountinfo
        Text of ``/proc/self/mountinfo``; without it the kernel is asked.

    Notes
    -----
    Source: proc(5); the fifth field is the mount point, with octal escapes, and the type follows the dash.
    """
    if mountinfo is None:
        mountinfo = Path("/proc/self/mountinfo").read_text()
    best = Mount(point="/", kind="unknown")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        if path.is_relative_to(point) and len(point) >= len(best.point):
            best = Mount(point=point, kind=after.split(" ")[0])
    return best


def existing(path: Path) -> Path:
    """Give the folder, or the first one above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def check_writing(folder: Path, *, fs: Filesystem = DISK, clock: Clock = time.time) -> list[Finding]:
    """Write a file as checkpoints are written, read it back, and take it away again.

    Parameters
    ----------
    folder
        Must exist.
    fs
        The calls that reach the disk.
    clock
        Unix time in seconds, to compare with the filesystem's.
    """
    with _scratch(folder) as path:
        data = os.urandom(4096)
        began_s = time.monotonic()
        try:
            fs.write_file(path, data)
            took_s = time.monotonic() - began_s
            if path.read_bytes() != data:
                return [
                    Finding(
                        what="writing", level="bad", detail=f"{folder} gives back other bytes than written"
                    )
                ]
            skew_s = path.stat().st_mtime - clock()
        except OSError as error:
            return [
                Finding(what="writing", level="bad", detail=f"{folder} can't be written: {error.strerror}")
            ]
        return [
            Finding(
                what="writing",
                level="ok" if took_s < _SLOW_S else "note",
                detail=f"a file is durable (fsync, rename, fsync of the folder) after {took_s * 1000:.0f} ms",
            ),
            _clock_finding(skew_s),
        ]


def check_calls(folder: Path, *, fs: Filesystem = DISK) -> list[Finding]:
    """Try what not every network filesystem can: hard links, locks, and writing past the page cache.

    Parameters
    ----------
    folder
        Must exist and be writable.
    fs
        The calls that reach the disk.
    """
    with _scratch(folder) as path, _scratch(folder) as other:
        fs.write_file(path, b"x")
        found = []
        try:
            fs.link(path, other)
            found.append(Finding(what="hard links", level="ok", detail="can be had"))
        except OSError as error:
            why = f"{error.strerror}; a run directory needs them once, for run.json"
            found.append(Finding(what="hard links", level="bad", detail=why))
        found.append(_try("locks", _lock, path, meaning="hpc_resume needs none, but HDF5 elsewhere may"))
        found.append(_try("O_DIRECT", _direct, path, meaning="checkpoints go through the page cache"))
        return found


def check_space(folder: Path, *, need_bytes: int) -> list[Finding]:
    """Look at the free space and inodes of a filesystem; quotas are another matter.

    Parameters
    ----------
    folder
        Must exist.
    need_bytes
        Less is bad.
    """
    facts = os.statvfs(folder)
    free_bytes = facts.f_bavail * facts.f_frsize
    found = [
        Finding(
            what="free space",
            level="ok" if free_bytes >= need_bytes else "bad",
            detail=f"{_gb(free_bytes)} of {_gb(facts.f_blocks * facts.f_frsize)}; needed: {_gb(need_bytes)}",
        )
    ]
    if facts.f_files:  # some filesystems do not count
        enough = facts.f_favail >= _FEW_INODES
        found.append(
            Finding(
                what="free inodes",
                level="ok" if enough else "bad",
                detail=f"{facts.f_favail} of {facts.f_files}",
            )
        )
    return found


def _clock_finding(skew_s: float) -> Finding:
    off_s = abs(skew_s)
    if off_s <= _SKEW_S:
        return Finding(what="clock", level="ok", detail="agrees with the filesystem's")
    detail = f"{off_s:.0f} s off the filesystem's; tell the administrators"
    return Finding(what="clock", level="note" if off_s <= _BAD_SKEW_S else "bad", detail=detail)


def _lock(path: Path) -> None:
    with path.open("rb+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _direct(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as page:  # aligned, as O_DIRECT wants it
            os.pwrite(fd, page, 0)
    finally:
        os.close(fd)


def _try(what: str, call: Callable[[Path], None], path: Path, *, meaning: str) -> Finding:
    try:
        call(path)
    except OSError as error:
        return Finding(what=what, level="note", detail=f"{error.strerror}: {meaning}")
    return Finding(what=what, level="ok", detail="can be had")


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    path = folder / f".hpc-resume-doctor-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
