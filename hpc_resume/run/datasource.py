"""Where the data of a run lies: as settings and scripts say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc_resume.errors import UsageError
from hpc_resume.provenance.datafiles import named_roots
from hpc_resume.provenance.huggingface import fingerprints_of
from hpc_resume.rundir import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where data lies, or what it says of itself.

    Parameters
    ----------
    paths
        Folders and files, perhaps by name.
    fingerprints
        Of Hugging Face datasets in memory.
    """

    paths: tuple[str, ...] | Mapping[str, str] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.paths or self.fingerprints)

    @property
    def each(self) -> tuple[str, ...]:
        """The paths, without their names."""
        return tuple(self.paths.values()) if isinstance(self.paths, Mapping) else self.paths

    def check_apart(self, run: RunDirectory) -> None:
        """Refuse data that the run itself would change.

        Raises
        ------
        UsageError
            If the run directory lies in it.
        """
        for path in self.each:
            root = named_roots([path])[""].resolve()
            if run.root.resolve().is_relative_to(root):
                raise UsageError(
                    f"{root}: the run directory {run.root} lies in it, so the data would change with every "
                    "checkpoint; give the folder of the data alone, or another run_dir"
                )

    @classmethod
    def of(cls, given: Any, what: str) -> Source:
        """Read what a script gives: a path, a dataset with a fingerprint, several of one, or paths by name.

        Raises
        ------
        UsageError
            If it is something else.
        """
        if isinstance(given, str | os.PathLike):
            return cls(paths=(os.fsdecode(given),))
        if (fingerprints := fingerprints_of(given, what)) is not None:
            return cls(fingerprints=fingerprints)
        if isinstance(given, Mapping) and all(
            isinstance(each, str | os.PathLike) and isinstance(name, str) and name
            for name, each in given.items()
        ):
            return cls(paths={name: os.fsdecode(each) for name, each in given.items()})
        if isinstance(given, list | tuple):
            parts = [cls.of(each, f"{what}[{place}]") for place, each in enumerate(given)]
            paths = [path for part in parts if isinstance(part.paths, tuple) for path in part.paths]
            found = {name: each for part in parts for name, each in part.fingerprints.items()}
            if all(isinstance(part.paths, tuple) for part in parts):
                return cls(paths=tuple(paths), fingerprints=found)
        raise UsageError(
            f"run.uses: {what}: {type(given).__name__} is neither a path nor a dataset with a fingerprint; give "
            "the folder or file that it is read from, a list of those, or {name: path}"
        )
