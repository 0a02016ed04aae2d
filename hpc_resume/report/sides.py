"""What two things that are compared are: a run, an attempt of it, or a checkpoint, as a person names them.

::

    runs/gpt          the run: its newest attempt and its newest full checkpoint
    runs/gpt@12000    the checkpoint of step 12000
    runs/gpt#3        attempt 3, and the last checkpoint that it took
    runs/gpt/checkpoints/0000012000-3f9a1c2e    the checkpoint in this folder
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.manifest import FULL, MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.store import newest_first
from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.files import JsonObject
from hpc_resume.provenance.configuration import read_configuration
from hpc_resume.provenance.remembered import part
from hpc_resume.records import attempt_record
from hpc_resume.rundir import RunDirectory, checkpoint_step, is_checkpoint_name

_SPELLED = re.compile(r"(?P<path>.+?)(?:@(?P<step>\d{1,18})|#(?P<attempt>\d{1,18}))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two things that are compared.

    Parameters
    ----------
    label
        What it is, for people.
    run
        The run directory.
    record
        Of the attempt; empty if there is none.
    folder, manifest
        Of the checkpoint; ``None`` if there is none.
    """

    label: str
    run: RunDirectory
    record: JsonObject
    folder: Path | None
    manifest: Manifest | None

    @property
    def environment(self) -> JsonObject:
        """What it ran on: the attempt's record, or else what the checkpoint says of it."""
        told = part(self.record, "environment")
        return told or (self.manifest.environment if self.manifest is not None else {})

    @property
    def data(self) -> JsonObject:
        """What is said of the data: by the checkpoint, or else by the attempt."""
        mine = {} if self.manifest is None else part(self.manifest.environment, "data")
        return mine or part(self.record, "data")

    def settings(self) -> JsonObject | None:
        """Read its configuration; ``None`` if it is not known.

        Raises
        ------
        IntegrityError
            If it is not what was written.
        """
        mine: Any = None if self.manifest is None else self.manifest.config
        digest: Any = self.record.get("config", mine)
        return read_configuration(self.run, digest) if isinstance(digest, str) else None


def find_side(text: str) -> Side:
    """Find what a person has named; see this module's beginning.

    Raises
    ------
    UsageError
        If a run has no such attempt.
    CheckpointNotFound
        If there is no such run or checkpoint.
    IntegrityError
        If it is damaged.
    """
    match = _SPELLED.fullmatch(text)
    assert match is not None
    # A folder may be called so, too.
    path, step, number = (
        (Path(text), None, None) if Path(text).is_dir() else match.group("path", "step", "attempt")
    )
    resolved = Path(path).resolve()
    if is_checkpoint_name(resolved.name) and (resolved / MANIFEST).exists():
        run = RunDirectory(resolved.parent.parent)
        return _of_checkpoint(run, resolved, read_manifest(resolved))
    run = RunDirectory(resolved)
    run.identity()
    if step is not None:
        return _of_checkpoint(run, *_of_step(run, int(step)))
    numbers = run.attempt_numbers()
    if number is not None:
        if int(number) not in numbers:
            there = ", ".join(map(str, numbers)) or "none"
            raise UsageError(f"{path}: has no attempt {int(number)}; there are: {there}")
        return _of_attempt(run, int(number), _newest(run, attempt=int(number)))
    if not numbers:
        found = _newest(run)
        if found is None:
            raise CheckpointNotFound(f"{path}: has neither an attempt nor a checkpoint yet")
        return _of_checkpoint(run, *found)
    return _of_attempt(run, numbers[-1], _newest(run))


def _of_checkpoint(run: RunDirectory, folder: Path, manifest: Manifest) -> Side:
    return Side(
        label=f"{run.root.name}, step {manifest.step}",
        run=run,
        record=_record_of(run, manifest),
        folder=folder,
        manifest=manifest,
    )


def _record_of(run: RunDirectory, manifest: Manifest) -> JsonObject:
    """Give the record of the attempt that took a checkpoint; of another run's, what the checkpoint says itself."""
    with contextlib.suppress(CheckpointNotFound):
        if run.identity()["run_id"] == manifest.run_id:
            return attempt_record(run, manifest.attempt)
    return {"source": {"digest": manifest.environment.get("source")}}


def _of_attempt(run: RunDirectory, number: int, found: tuple[Path, Manifest] | None) -> Side:
    folder, manifest = found or (None, None)
    saved = "" if manifest is None else f", step {manifest.step}"
    return Side(
        label=f"{run.root.name}, attempt {number}{saved}",
        run=run,
        record=attempt_record(run, number),
        folder=folder,
        manifest=manifest,
    )


def _newest(run: RunDirectory, attempt: int | None = None) -> tuple[Path, Manifest] | None:
    """Find the newest full checkpoint, or that of an attempt."""
    for name, manifest in newest_first(run):
        if isinstance(manifest, IntegrityError):
            raise manifest
        if manifest.content == FULL and attempt in {None, manifest.attempt}:
            return run.checkpoints / name, manifest
    return None


def _of_step(run: RunDirectory, step: int) -> tuple[Path, Manifest]:
    names = run.checkpoint_names()
    fitting = [name for name in names if checkpoint_step(name) == step]
    if not fitting:
        there = ", ".join(str(checkpoint_step(name)) for name in names) or "none at all"
        raise CheckpointNotFound(f"{run.root}: no checkpoint of step {step}; there are: {there}")
    return run.checkpoints / fitting[-1], read_manifest(run.checkpoints / fitting[-1])
