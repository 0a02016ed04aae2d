"""The folder of an array of runs: one run directory for each, and what says that they belong together.

::

    SWEEP_DIR/
      sweep.json                   what the array is called, written once
      jobs/                        what was submitted from here: scripts, lists of runs, logs of batch scripts
      lr=0.001,seed=3/             the run with these arguments, a run directory like any other
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.errors import CheckpointNotFound, HpcResumeError, IntegrityError
from hpc_resume.files import DISK, Clock, Filesystem, JsonObject
from hpc_resume.rundir import RunDirectory, digest, sealed
from hpc_resume.untrusted import brief, check_nesting, parse_json, read_regular

SCHEMA = 1
#: A longer sweep.json is none.
_LONGEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SweepDirectory:
    """Paths of an array of runs.

    Parameters
    ----------
    root
        The folder; it need not exist until :meth:`create`.
    """

    root: Path

    @property
    def identity_path(self) -> Path:
        """``sweep.json``: where it is, the folder holds an array of runs."""
        return self.root / "sweep.json"

    def run(self, name: str) -> RunDirectory:
        """Directory of one run."""
        return RunDirectory(self.root / name)

    def create(self, name: str, *, fs: Filesystem = DISK, clock: Clock = time.time) -> JsonObject:
        """Make the folder and ``sweep.json`` if they are not there yet, and return the identity."""
        if not self.identity_path.exists():
            fs.make_dirs(self.root)
            fs.write_file(self.identity_path, sealed({"schema": SCHEMA, "name": name, "created": clock()}))
        return self.identity()

    def identity(self) -> JsonObject:
        """Read ``sweep.json``.

        Raises
        ------
        CheckpointNotFound
            If the folder holds no array of runs.
        IntegrityError
            If the file is damaged.
        """
        try:
            identity = parse_json(read_regular(self.identity_path, longest_bytes=_LONGEST_BYTES))
            check_nesting(identity, 8)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(
                f"{self.root}: no array of runs (there is no sweep.json in it); give the folder that submit named"
            ) from None
        except ValueError as error:
            raise IntegrityError(f"{self.identity_path}: damaged ({error!s:.200})") from error
        except OSError as error:
            raise IntegrityError(f"{self.identity_path}: can't be read ({error.strerror})") from error
        if not isinstance(identity, dict) or identity.get("digest") != digest(identity):
            raise IntegrityError(f"{self.identity_path}: damaged (its digest differs)")
        if identity.get("schema") != SCHEMA:
            raise IntegrityError(
                f"{self.identity_path}: schema {brief(identity.get('schema'))}, but this version reads {SCHEMA}"
            )
        return identity

    def names(self) -> list[str]:
        """Names of the runs, in the order in which they were submitted first; damaged ones come last."""
        created: dict[str, float] = {}
        for path in self.root.glob("*/run.json"):
            created[path.parent.name] = float("inf")
            with contextlib.suppress(HpcResumeError, TypeError, ValueError, KeyError):
                created[path.parent.name] = float(RunDirectory(path.parent).identity()["created"])
        return sorted(created, key=lambda name: (created[name], name))
