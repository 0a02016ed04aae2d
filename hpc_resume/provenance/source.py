"""What the source of a run is: the files of its project, found from the script, and read.

In a git repository these are the files that git tracks and the code that it doesn't ignore; elsewhere the code in
the script's folder and below. Data, results, environments and what is larger than code ever is are left out.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from hpc_resume.errors import UsageError
from hpc_resume.provenance.git import repository_of, tracked_files, untracked_files
from hpc_resume.provenance.listing import Listing, SourceFile, is_plain_path

#: What is code, or says how code runs. Anything else counts only if git tracks it.
_CODE = frozenset(
    [
        ".py",
        ".pyi",
        ".pyx",
        ".pxd",
        ".ipynb",
        ".yaml",
        ".yml",
        ".toml",
        ".cfg",
        ".ini",
        ".json",
        ".j2",
        ".gin",
        ".proto",
        ".sh",
        ".sbatch",
        ".slurm",
        ".c",
        ".cc",
        ".cpp",
        ".cu",
        ".cuh",
        ".h",
        ".hpp",
        ".f90",
        ".jl",
        ".lua",
    ]
)
#: A larger file is data, or was generated.
_LARGEST_BYTES = 1 << 20
_LARGEST_PYTHON_BYTES = 1 << 24
MOST_FILES = 5_000
MOST_BYTES = 1 << 26
#: A folder with more entries holds data; so many are looked at in all where there is no git.
_MOST_ENTRIES = 2_000
_MOST_LOOKED_AT = 20_000
#: Neither code nor anything that code looks for.
_NEVER = frozenset(
    [
        "__pycache__",
        ".git",
        ".hg",
        ".svn",
        ".mypy_cache",
        ".pytest_cache",
        ".ruff_cache",
        ".hypothesis",
        ".ipynb_checkpoints",
        ".tox",
        ".nox",
        ".venv",
        "node_modules",
    ]
)
#: A folder with one of these is an environment or a run's, or an array's of runs.
_NO_CODE_BELOW = ("pyvenv.cfg", "conda-meta", "run.json", "sweep.json")
_OURS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a project, read.

    Parameters
    ----------
    root
        The project's folder.
    contents
        Bytes of each file by its path in the project, and whether it may be run as a program.
    left_out
        Paths beside those files that are not among them: data, results, environments.
    note
        What is not as usual about it; empty if nothing is.
    """

    root: Path
    contents: Mapping[str, tuple[bytes, bool]]
    left_out: tuple[str, ...] = ()
    note: str = ""

    @cached_property
    def listing(self) -> Listing:
        """Its files by name and digest."""
        return Listing(
            {
                path: SourceFile.of(data, executable=executable)
                for path, (data, executable) in self.contents.items()
            }
        )


def read_source(start: Path) -> Source | None:
    """Read the project that a script or folder belongs to.

    Parameters
    ----------
    start
        A script, or the folder of a notebook.

    Returns
    -------
    Source or None
        ``None`` if it is no project: software that was installed, or nothing is there.

    Raises
    ------
    UsageError
        If it is too large for one.
    """
    start = start.resolve()
    if not start.exists() or is_installed(start):
        return None
    folder = start if start.is_dir() else start.parent
    found = _tracked(start, folder)
    root, names, note = found if found is not None else (folder, *_walked(folder))
    contents = dict(_read(root, names))
    return Source(root=root, contents=contents, left_out=tuple(sorted(_left_out(root, contents))), note=note)


def is_installed(path: Path) -> bool:
    """Whether a file is an installed package's or Python's own, and no project's."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "scripts")]
    if sys.prefix != sys.base_prefix:
        places.append(sys.prefix)
    return any(path.is_relative_to(place) for place in places if place)


def _tracked(start: Path, folder: Path) -> tuple[Path, list[str], str] | None:
    """Give the work tree and the names of its source; ``None`` where git can't say, or ignores the script."""
    root = repository_of(folder)
    if root is None or (tracked := tracked_files(root)) is None:
        return None
    tracked = [name for name in tracked if _counts(root / name, code_only=False)]
    folders = {PurePosixPath(name).parent for name in tracked}
    fresh = [
        name
        for name in _outside_runs(root, untracked_files(root) or [])
        if _counts(root / name, code_only=True)
    ]
    names = sorted({*tracked, *fresh, *_generated(root, folders)})
    own = start.relative_to(root).as_posix()
    if start.is_file() and own not in names:
        return None
    _check_size(root, names)
    return root, names, ""


def _outside_runs(root: Path, names: list[str]) -> Iterator[str]:
    """Pass over what lies in run directories that git was not told to ignore."""
    known: dict[PurePosixPath, bool] = {}
    for name in names:
        for folder in PurePosixPath(name).parents:
            if folder not in known:
                known[folder] = any((root / folder / mark).exists() for mark in _NO_CODE_BELOW)
        if not any(known[folder] for folder in PurePosixPath(name).parents if folder.name):
            yield name


def _generated(root: Path, folders: set[PurePosixPath]) -> Iterator[str]:
    """Find Python files that git ignores and that lie among those that it tracks, such as ``_version.py``."""
    for folder in folders:
        for entry in _entries(root / folder) or ():
            if entry.name.endswith(".py") and _counts(Path(entry.path), code_only=True):
                yield (folder / entry.name).as_posix()


def _walked(root: Path) -> tuple[list[str], str]:
    """Give the names of the source in a folder and below, and what was not looked at."""
    names: list[str] = []
    level, looked_at = [root], 0
    while level:
        below: list[Path] = []
        for folder in level:
            entries = _entries(folder)
            if entries is None or (folder != root and _holds_no_code(entries)):
                continue
            looked_at += len(entries)
            if looked_at > _MOST_LOOKED_AT or len(names) > MOST_FILES:
                top = [name for name in names if "/" not in name]
                note = (
                    f"{root}: holds too much to look at, so only the code directly in it counts as the source"
                )
                return top, f"{note}; put the script into a folder of its own, or make that a git repository"
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _NEVER and not entry.name.startswith("."):
                        below.append(Path(entry.path))
                elif _counts(Path(entry.path), code_only=True):
                    names.append(Path(entry.path).relative_to(root).as_posix())
        level = sorted(below)
    names.sort()
    _check_size(root, names)
    return names, ""


def _entries(folder: Path) -> list[os.DirEntry[str]] | None:
    """List a folder; ``None`` if it can't be read, or holds more than a folder of code does."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(entry)
                if len(found) > _MOST_ENTRIES:
                    return None
    except OSError:
        return None
    return found


def _holds_no_code(entries: list[os.DirEntry[str]]) -> bool:
    return any(entry.name in _NO_CODE_BELOW for entry in entries)


def _counts(path: Path, *, code_only: bool) -> bool:
    """Whether a file is source, by its name and size."""
    if code_only and path.suffix not in _CODE:
        return False
    if path.is_relative_to(_OURS):
        return False  # this package does not run from snapshots: it makes them
    try:
        facts = path.stat()
    except OSError:
        return False
    largest = _LARGEST_PYTHON_BYTES if path.suffix == ".py" else _LARGEST_BYTES
    return stat.S_ISREG(facts.st_mode) and facts.st_size <= largest


def _check_size(root: Path, names: list[str]) -> None:
    sizes: dict[str, int] = {}
    for name in names:
        try:
            sizes[name] = (root / name).stat().st_size
        except OSError:
            continue
    if len(sizes) > MOST_FILES or sum(sizes.values()) > MOST_BYTES:
        largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
        raise UsageError(
            f"{root}: its source has {len(sizes)} files and {sum(sizes.values()) / 1e6:.0f} MB (the largest: {largest}), "
            f"more than {MOST_FILES} files or {MOST_BYTES / 1e6:.0f} MB; have git ignore what is no code, or let the job "
            "run what is in the folder when it starts: -o environment.source=live"
        )


def _read(root: Path, names: list[str]) -> Iterator[tuple[str, tuple[bytes, bool]]]:
    for name in names:
        path = root / name
        try:
            data = path.read_bytes()
            executable = bool(path.stat().st_mode & stat.S_IXUSR)
        except OSError:
            continue  # it was removed just now
        if is_plain_path(name):
            yield name, (data, executable)


def _left_out(root: Path, contents: Mapping[str, object]) -> Iterator[str]:
    """Find what lies beside the files of a source and is not among them, folder by folder."""
    folders = {parent for name in contents for parent in PurePosixPath(name).parents} or {PurePosixPath()}
    for folder in folders:
        for entry in _entries(root / folder) or ():
            path = folder / entry.name
            if entry.name in _NEVER or entry.name.endswith(".pyc"):
                continue
            if path not in folders and str(path) not in contents and is_plain_path(str(path)):
                yield str(path)
