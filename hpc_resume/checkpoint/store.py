"""The committed checkpoints of a run: which there are, and where damaged ones go."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import Path

from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.files import DISK, Clock, Filesystem, may_be_damage, obstacle
from hpc_resume.rollbacks import active_names
from hpc_resume.rundir import RunDirectory, checkpoint_step

Entry = tuple[str, Manifest | IntegrityError]


def newest_first(run: RunDirectory) -> Iterator[Entry]:
    """Go through the checkpoints that a run may go on from, newest first; none is read before it is its turn.

    Yields
    ------
    (str, Manifest or IntegrityError)
        Name, and the manifest or what is wrong with it. At equal steps the one created last comes first.

    Raises
    ------
    IntegrityError
        If it is not known which ones a rollback has set aside.
    """
    yield from _newest_first(run, active_names(run))


def all_newest_first(run: RunDirectory) -> Iterator[Entry]:
    """Go through all committed checkpoints as :func:`newest_first` does; those that are set aside come last."""
    active = active_names(run)
    yield from _newest_first(run, active)
    yield from _newest_first(run, sorted(set(run.checkpoint_names()) - set(active)))


def _newest_first(run: RunDirectory, names: Collection[str]) -> Iterator[Entry]:
    names = sorted(names, key=checkpoint_step, reverse=True)
    for _, alike in groupby(names, checkpoint_step):
        entries: list[tuple[float, str, Manifest | IntegrityError]] = []
        for name in alike:
            try:
                manifest = read_manifest(run.checkpoints / name)
            except IntegrityError as error:
                entries.append((0.0, name, error))
            else:
                entries.append((manifest.created, name, manifest))
        for _, name, manifest_or_error in sorted(entries, key=lambda entry: entry[:2], reverse=True):
            yield name, manifest_or_error


def find(run: RunDirectory, step: int | None = None) -> tuple[str, Manifest]:
    """Find the newest checkpoint, or the one of a step.

    Raises
    ------
    CheckpointNotFound
        If there is none.
    IntegrityError
        If its manifest is damaged.
    """
    steps = []
    for name, manifest in newest_first(run) if step is None else all_newest_first(run):
        steps.append(checkpoint_step(name))
        if step is None or steps[-1] == step:
            if isinstance(manifest, IntegrityError):
                raise manifest
            return name, manifest
    there = f"there are steps {', '.join(map(str, steps))}" if steps else "there is none at all"
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise CheckpointNotFound(f"{run.root}: {wanted}; {there}")


def referring(run: RunDirectory, name: str) -> str | None:
    """Name a committed checkpoint, set aside or not, part of whose bytes lie in this one; None if none does.

    Raises
    ------
    IntegrityError
        If one can't be read for a reason that is not its own; its bytes are needed all the same.
    """
    for each in reversed(run.checkpoint_names()):
        try:
            if each != name and name in read_manifest(run.checkpoints / each).refers:
                return each
        except IntegrityError as error:
            if (hindered := obstacle(error)) is not None and not may_be_damage(hindered):
                raise
    return None


def quarantine(
    run: RunDirectory, name: str, reason: str, *, fs: Filesystem = DISK, clock: Clock = time.time
) -> Path:
    """Move a damaged checkpoint aside, whole, with the reason beside it.

    Returns
    -------
    Path
        Where it is now.
    """
    target = run.quarantine / f"{name}.{uuid.uuid4().hex[:4]}"
    record = {"checkpoint": name, "reason": reason, "when": clock()}
    fs.write_file(target.with_suffix(f"{target.suffix}.json"), json.dumps(record, indent=1).encode())
    fs.rename(run.checkpoints / name, target)
    fs.fsync_dir(run.quarantine)
    fs.fsync_dir(run.checkpoints)
    return target
