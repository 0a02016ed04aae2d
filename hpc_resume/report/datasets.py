"""Data snapshots as people name them: a saved file, a run, or the data itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hpc_resume.errors import CheckpointNotFound, HpcResumeError, IntegrityError, UsageError
from hpc_resume.provenance.datahash import Reading, Taken, Taking, take_snapshot
from hpc_resume.provenance.datarecord import DataRecord
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.records import data_path
from hpc_resume.report.checkpoints import find_checkpoint
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import open_regular

#: How a saved snapshot begins.
_FIRST = b'{"schema": '


def snapshot_of(paths: list[Path], reading: Reading, tell: Callable[[Taking], None]) -> Taken:
    """Take the snapshot of some data; see :func:`~hpc_resume.provenance.datahash.take_snapshot`.

    Raises
    ------
    UsageError
        If it can't be taken.
    HpcResumeError
        If the filesystem fails.
    """
    try:
        return take_snapshot(paths, reading, tell=tell)
    except OSError as error:
        if isinstance(error, HpcResumeError):
            raise
        raise HpcResumeError(f"{error.filename or paths[0]}: {error.strerror}; try again later") from error


def open_snapshot(path: Path, reading: Reading, tell: Callable[[Taking], None]) -> DataSnapshot:
    """Give the snapshot that a path stands for.

    Parameters
    ----------
    path
        A file that ``hpc-resume data snapshot --save`` wrote or that lies in ``RUN_DIR/data``; the folder of a
        run: the data of its newest checkpoint; any other folder or file: itself, now.
    reading
        How data is read.
    tell
        Told how far that is.

    Raises
    ------
    CheckpointNotFound
        If it is a run that says nothing of its data.
    IntegrityError
        If a saved snapshot is damaged.
    UsageError
        If there is nothing, or it can't be read.
    """
    run = RunDirectory(path)
    if run.identity_path.is_file():
        name, manifest = find_checkpoint(path, None)
        digest = DataRecord.from_json(manifest.environment.get("data")).digest
        if digest is None:
            raise CheckpointNotFound(f"{path}: checkpoint {name} does not say what data it was trained on")
        path = data_path(run, digest)
        if not path.is_file():
            raise IntegrityError(f"{path}: is gone; checkpoint {name} names it")
        return DataSnapshot.load(path)
    if path.is_file() and _is_saved(path):
        return DataSnapshot.load(path)
    return snapshot_of([path], reading, tell).snapshot


def _is_saved(path: Path) -> bool:
    try:
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            return path.suffix == ".json" and file.read(len(_FIRST)) == _FIRST
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror})") from error
