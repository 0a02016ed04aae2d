"""A job's entry that runs from the source as it was submitted, whatever becomes of the files meanwhile.

The working folder, and with it paths to data, stay what they are. What changes is where Python finds the project:
paths into it are exchanged for the same paths in the snapshot, in the entry, in ``sys.path`` and in ``PYTHONPATH``.
"""

from __future__ import annotations

import inspect
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.entry import CommandEntry, Entry, FunctionEntry, TargetEntry, usual_signals
from hpc_resume.provenance.packages import installed_packages
from hpc_resume.provenance.running import VARIABLE, chosen_folder
from hpc_resume.provenance.source import Source, read_source
from hpc_resume.provenance.sources import Chosen
from hpc_resume.rundir import RunDirectory

#: Runs a module of the snapshot as ``python -m`` would one of the current folder.
_RUNNER = "hpc_resume.launch.module"
#: Arguments of a command that are files with these suffixes come from the snapshot, too.
_FROZEN = (".py", ".yaml", ".yml", ".toml", ".cfg", ".ini")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A project, and a folder that holds the same at the same paths.

    Parameters
    ----------
    root
        The project's folder.
    folder
        The other one.
    """

    root: Path
    folder: Path

    def path(self, path: str | Path) -> Path | None:
        """Give the counterpart of a path, if it lies in the project and there is one."""
        try:
            inside = Path(path or ".").resolve().relative_to(self.root)
        except (ValueError, OSError):
            return None
        moved = self.folder / inside
        return moved if moved.exists() and not _passes_a_link(self.folder, inside) else None

    def entry(self, entry: Entry) -> Entry:
        """Give an entry that runs the same from the other folder."""
        if isinstance(entry, TargetEntry):
            if entry.place.endswith(".py") or os.sep in entry.place:
                moved = self.path(entry.place)
                return entry if moved is None else replace(entry, place=str(moved))
            moved = self.path(Path.cwd())
            return entry if moved is None else replace(entry, folder=str(moved))
        if isinstance(entry, CommandEntry):
            return CommandEntry(command=tuple(self._words(entry.command)))
        return entry

    def search_path(self, entries: Sequence[str], editable: Sequence[str] = ()) -> list[str]:
        """Give the counterparts of those folders of a search path, and of installations in place, that have one."""
        found = [self.path(entry) for entry in entries]
        for project in editable:
            found += [self.path(project), self.path(Path(project, "src"))]
        return list(dict.fromkeys(str(path) for path in found if path is not None and path.is_dir()))

    def _words(self, command: Sequence[str]) -> list[str]:
        place, here = module_place(command), self.path(Path.cwd())
        words = [self._word(word) for word in command]
        if place is not None and here is not None:
            words[place:place] = [_RUNNER, str(here)]
        return words

    def _word(self, word: str) -> str:
        flag, equals, value = word.rpartition("=")
        if not value.endswith(_FROZEN) or not _is_file(value):
            return word
        moved = self.path(value)
        return word if moved is None else f"{flag}{equals}{moved}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcedEntry:
    """What a job runs, with the source that it runs it from.

    Parameters
    ----------
    payload
        The entry, pickled: functions of modules are to be looked up in the snapshot.
    name, run_name
        Of the entry.
    run_dir
        The run's folder, whose ``sources/`` says which snapshot.
    start
        The script or folder that the project was found from.
    root
        The project's folder; ``None``: the job runs what is there when it starts.
    editable
        Folders of packages that are installed in place, in the project.
    """

    payload: bytes
    name: str
    run_name: str
    run_dir: str
    start: str
    root: str | None
    editable: tuple[str, ...] = ()

    def __call__(self) -> Any:
        """Run in the job, on every rank."""
        usual_signals()
        if self.root is None:
            os.environ[VARIABLE] = self.start
            return pickle.loads(self.payload)()  # noqa: S301 - our own, from the submission
        folder = chosen_folder(RunDirectory(Path(self.run_dir)))
        os.environ[VARIABLE] = str(folder)
        moved = Moved(root=Path(self.root), folder=folder)
        sys.path[:0] = moved.search_path(sys.path, self.editable)
        inherited = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
        first = moved.search_path(inherited, self.editable)
        if first:
            os.environ["PYTHONPATH"] = os.pathsep.join([*first, *inherited])
        return moved.entry(pickle.loads(self.payload))()  # noqa: S301 - as above


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """What a submission runs, as it was found before anything is written.

    Parameters
    ----------
    start
        The script, or the folder of a notebook; ``None`` if there is none.
    source
        The project as it was read; ``None`` if the job runs what is there when it starts.
    """

    start: Path | None
    source: Source | None

    @classmethod
    def of(cls, entry: Entry, config: Config) -> Project:
        """Find the project of an entry, and read it unless the settings say ``live``.

        Raises
        ------
        UsageError
            If it is too large for one.
        """
        start = source_start(entry)
        live = start is None or config.environment.source == "live"
        return cls(start=start, source=None if live or start is None else read_source(start))

    def bind(self, entry: Entry, run: RunDirectory, chosen: Chosen | None) -> Entry | SourcedEntry:
        """Make an entry that runs from the source that its run's directory names as chosen, or from what is there."""
        if chosen is not None:
            return sourced(entry, run, start=Path(chosen.root), root=Path(chosen.root))
        return entry if self.start is None else sourced(entry, run, start=self.start, root=None)


def sourced(entry: Entry, run: RunDirectory, *, start: Path, root: Path | None) -> SourcedEntry:
    """Make an entry that runs from the source that is chosen in its run's directory; see :class:`SourcedEntry`."""
    import cloudpickle  # type: ignore[import-untyped] # as submitit will

    editable: tuple[str, ...] = ()
    if root is not None:
        places = (Path(place).resolve() for place in installed_packages().editable.values())
        editable = tuple(str(place) for place in places if place.is_relative_to(root))
    return SourcedEntry(
        payload=cloudpickle.dumps(entry),
        name=entry.name,
        run_name=entry.run_name,
        run_dir=str(run.root),
        start=str(start),
        root=None if root is None else str(root),
        editable=editable,
    )


def source_start(entry: Entry) -> Path | None:
    """Find the script, or a notebook's folder, that an entry's project is found from; ``None`` if it has none."""
    if isinstance(entry, TargetEntry):
        try:
            return entry.source_path()
        except UsageError:
            return None
    if isinstance(entry, FunctionEntry):
        return _file_of(entry.function) or Path.cwd()
    for word in entry.command[1:]:
        if word.endswith((".py", ".sh")) and _is_file(word):
            return Path(word).absolute()
    place = module_place(entry.command)
    if place is not None:
        return module_file(entry.command[place])
    first = Path(entry.command[0])
    return first.absolute() if first.suffix in {".py", ".sh"} and _is_file(first) else None


def module_place(command: Sequence[str]) -> int | None:
    """Tell which word of a command names a module of the current folder that is run by ``-m``."""
    for place, word in enumerate(command[:-1]):
        if place and word.endswith(".py") and _is_file(word):
            return None
        if word == "-m" and module_file(command[place + 1]) is not None:
            return place + 1
    return None


def module_file(name: str) -> Path | None:
    """Find a module's file in the current folder, without importing anything."""
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        return None
    base = Path.cwd().joinpath(*name.split("."))
    for path in (base.with_name(f"{base.name}.py"), base / "__main__.py"):
        if path.is_file():
            return path
    return None


def _file_of(function: Callable[..., Any]) -> Path | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    path = None if code is None else Path(code.co_filename)
    return path.absolute() if path is not None and path.suffix == ".py" and path.is_file() else None


def _is_file(word: str | Path) -> bool:
    """Whether a word of a command is a file; one that can be no path at all, such as a program for ``-c``, is none."""
    return os.path.isfile(word)  # noqa: PTH113 - pathlib's raises for a name that is too long


def _passes_a_link(folder: Path, inside: Path) -> bool:
    """Whether a path in a snapshot leads out of it, to what was left out."""
    return any((folder / part).is_symlink() for part in (inside, *inside.parents) if part != Path())
