"""Which files a dataset consists of: listed by several threads, each with what tells that it has changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from hpc_resume.errors import UsageError
from hpc_resume.files import may_pass
from hpc_resume.provenance.crew import Crew

#: What others leave in folders of data, and no training reads: what NFS keeps of deleted files that are still
#: open, Python's and macOS's, and what ``datasets`` computes again if it is gone.
IGNORED = (".nfs*", "__pycache__", ".DS_Store", "cache-*.arrow")


class Stamp(NamedTuple):
    """What the filesystem says of a file's contents without reading them.

    The time of the last status change is part of it: it can't be set back, as that of the last modification can.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """Take it from a file's status."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def touched_ns(self) -> int:
        """Unix time, in nanoseconds, at which something about the file changed last."""
        return max(self.mtime_ns, self.ctime_ns)


class DataFile(NamedTuple):
    """One file: what it is called in the dataset, where it lies, its stamp, and where it lies below which path."""

    name: str
    path: str
    stamp: Stamp
    root: str
    below: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """One folder to list: where it lies, below which path, what its files' names begin with, and what is above."""

    path: str
    root: str
    prefix: str
    below: str = ""
    above: tuple[tuple[int, int], ...] = ()


def named_roots(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Give the paths of a dataset names that do not depend on where they lie.

    A single path has none: its files are called what they are called in it. Several are told apart by their last
    parts, as many as that takes.

    Raises
    ------
    UsageError
        If a path is not there, or stands twice.
    """
    roots = [Path(os.path.expandvars(path)).expanduser().absolute() for path in paths]
    for root in roots:
        if not root.exists():
            what = "is a link to something that is not there" if root.is_symlink() else "is not there"
            raise UsageError(f"{root}: {what}; give the folder or file that the data lies in")
    if len(roots) == 1:
        return {"": roots[0]}
    for parts in range(1, max((len(root.parts) for root in roots), default=0) + 1):
        names = ["/".join(root.parts[-parts:]) for root in roots]
        if len(set(names)) == len(roots):
            return dict(zip(names, roots, strict=True))
    twice = next((root for root in roots if roots.count(root) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice}: stands twice among the paths of the data; leave one out")
    return {}


def list_files(
    roots: Mapping[str, Path], *, ignore: Sequence[str], threads: int, look: Callable[[], None]
) -> list[DataFile]:
    """List the files of a dataset, sorted by name.

    Symbolic links are followed: the file that one leads to counts. Empty folders do not count.

    Parameters
    ----------
    roots
        Folders or files by what their names begin with; see :func:`named_roots`.
    ignore
        Patterns, as in a shell, of names of files and folders that do not count.
    threads
        How many list at once.
    look
        Called several times a second; what it raises ends the listing.

    Raises
    ------
    UsageError
        If something can't be listed, or is neither a file nor a folder.
    """

    def work(folder: _Folder) -> tuple[list[DataFile], list[_Folder]]:
        return _list(folder, ignore)

    crew = Crew(work, threads=threads, look=look)
    found: list[DataFile] = []
    for name, root in roots.items():
        place = str(root)
        with _Explained(root):
            status = root.stat()
        if stat.S_ISDIR(status.st_mode):
            crew.add([_Folder(path=place, root=place, prefix=f"{name}/" if name else "")])
        else:
            _check_kind(status.st_mode, root)
            found.append(DataFile(name or root.name, place, Stamp.of(status), place, ""))
    for files, folders in crew.results():
        found += files
        crew.add(folders)
    return sorted(found)


def _list(folder: _Folder, ignore: Sequence[str]) -> tuple[list[DataFile], list[_Folder]]:
    files: list[DataFile] = []
    folders: list[_Folder] = []
    with _Explained(folder.path):
        itself = Path(folder.path).stat()
        here = (itself.st_dev, itself.st_ino)
        if here in folder.above:
            raise UsageError(f"{folder.path}: a symbolic link leads back to a folder above it; take it away")
        with os.scandir(folder.path) as entries:
            kept = [each for each in entries if not any(fnmatchcase(each.name, one) for one in ignore)]
    for entry in kept:
        with _Explained(entry.path):
            status = entry.stat()
        below = f"{folder.below}{entry.name}"
        if stat.S_ISDIR(status.st_mode):
            inner = _Folder(
                path=entry.path,
                root=folder.root,
                prefix=folder.prefix,
                below=f"{below}/",
                above=(*folder.above, here),
            )
            folders.append(inner)
        else:
            _check_kind(status.st_mode, entry.path)
            name = f"{folder.prefix}{below}"
            files.append(DataFile(name, entry.path, Stamp.of(status), folder.root, below))
    return files, folders


def _check_kind(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"{path}: neither a file nor a folder, so it has no contents that could be told apart; "
            "move it away from the data, or name it in data.ignore"
        )


class _Explained:
    """Says what the filesystem says; what may pass is passed on, so that the run goes on another time."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not may_pass(error):
            raise unreadable(self._path, error) from error


def unreadable(path: str | Path, error: OSError) -> UsageError:
    """Say that a file or folder of the data can't be read."""
    if isinstance(error, FileNotFoundError):
        linked = Path(path).is_symlink()
        what = "a link to something that is not there" if linked else "was there when the data was listed"
        return UsageError(f"{path}: {what}; mend it, or wait until nothing changes in the data any more")
    return UsageError(
        f"{path}: the data can't be read ({error.strerror}); make it readable, or name it in data.ignore if it "
        "does not belong to the data"
    )
