"""Deleting checkpoints: plan, then apply. What a kept one refers to, and the last whole one, is never in a plan."""

from __future__ import annotations

import json
import time
from collections.abc import Collection

from hpc_resume.checkpoint.commit import awaited_by_unfinished
from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.checkpoint.store import all_newest_first
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.files import DISK, Clock, Filesystem, obstacle
from hpc_resume.policy.retention import Candidate, RetentionPlan, plan_retention
from hpc_resume.rollbacks import set_aside
from hpc_resume.rundir import RunDirectory, checkpoint_step


def plan_pruning(
    run: RunDirectory,
    *,
    keep: int,
    every_steps: int | None = None,
    pinned_steps: Collection[int] = (),
    drop_set_aside: bool = False,
    threads: int = 2,
    fs: Filesystem = DISK,
) -> RetentionPlan:
    """Plan what to delete of a run; only reads.

    Every byte of the newest full checkpoint is verified; if it is damaged, the one before it counts as the
    newest, and so on. If its norms have jumped, the newest one before it whose norms have not is kept, too.

    Parameters
    ----------
    run
        The run directory.
    keep, every_steps
        See :func:`~hpc_resume.policy.retention.plan_retention`.
    pinned_steps
        Steps to keep in any case.
    drop_set_aside
        Delete what rollbacks have set aside, too; without it, that is kept.
    threads
        That read.
    fs
        Filesystem.

    Raises
    ------
    CheckpointNotFound
        If a pinned step has none.
    UsageError
        If less than one is to be kept.
    IntegrityError
        If a manifest can't be read for a reason that is not its own: what it refers to is needed all the same.
    """
    found: list[Candidate] = []
    proven = False
    aside = set_aside(run)
    for name, manifest in all_newest_first(run):
        if isinstance(manifest, IntegrityError):
            _insist(manifest)
        whole = isinstance(manifest, Manifest)
        if isinstance(manifest, Manifest) and manifest.resumable and name not in aside and not proven:
            whole = not verify_checkpoint(run.checkpoints / name, manifest, threads=threads)
            proven = whole and not manifest.health.jumped  # else a run may go on from one before it
        found.append(_candidate(name, manifest, valid=whole, aside=name in aside))
    steps = {each.step for each in found}
    if lacking := sorted(set(pinned_steps) - steps):
        raise CheckpointNotFound(
            f"{run.root}: no checkpoint of step {lacking[0]} to pin; there are: "
            f"{', '.join(map(str, sorted(steps))) or 'none at all'}"
        )
    pinned = {each.name for each in found if each.step in pinned_steps} | awaited_by_unfinished(run, fs=fs)
    try:
        return plan_retention(
            found, keep=keep, every_steps=every_steps, pinned=pinned, drop_set_aside=drop_set_aside
        )
    except ValueError as error:
        raise UsageError(f"{run.root}: {error}") from error


def _insist(error: IntegrityError) -> None:
    """Delete nothing while what is needed can't be known."""
    if obstacle(error) is not None:
        raise IntegrityError(
            f"{error}; what it refers to must stay, and can't be known, so nothing is deleted: try again where and when "
            "it can be read"
        ) from error


def _candidate(name: str, manifest: Manifest | IntegrityError, *, valid: bool, aside: bool) -> Candidate:
    if isinstance(manifest, IntegrityError):
        return Candidate(
            name=name,
            step=checkpoint_step(name),
            full=False,
            valid=False,
            refers=(),
            size_bytes=0,
            set_aside=aside,
        )
    return Candidate(
        name=name,
        step=manifest.step,
        full=manifest.resumable,
        valid=valid,
        refers=manifest.refers,
        size_bytes=manifest.size_bytes,
        set_aside=aside,
        jumped=bool(manifest.health.jumped),
    )


def apply_pruning(
    run: RunDirectory, plan: RetentionPlan, *, fs: Filesystem = DISK, clock: Clock = time.time
) -> None:
    """Delete what a plan says: each one is noted, moved out of ``checkpoints/`` in one piece, then removed.

    No attempt may be alive: it could commit something that refers to what is deleted.

    Parameters
    ----------
    run
        The run directory.
    plan
        From :func:`plan_pruning`; it must still be true.
    fs, clock
        Filesystem and Unix time in seconds.

    Raises
    ------
    UsageError
        If the run has changed since; nothing is deleted then.
    IntegrityError
        As :func:`plan_pruning`.
    """
    names = set(run.checkpoint_names())
    if names != {*plan.remove, *plan.keep} or (plan.remove and not plan.keep):
        raise UsageError(f"{run.root}: its checkpoints have changed since the plan was made; plan again")
    for name in plan.keep:
        try:
            needed = set(read_manifest(run.checkpoints / name).refers) & set(plan.remove)
        except IntegrityError as error:
            _insist(error)
            continue  # it is damaged, with them or without
        if needed:
            raise UsageError(f"{run.root}: {name} refers to {min(needed)}, which is to be deleted")
    fs.make_dirs(run.pruned)
    for name in fs.listdir(run.pruned):
        if (run.pruned / name).is_dir():  # of somebody who was interrupted
            fs.remove_tree(run.pruned / name)
    for name in plan.remove:
        note = {"checkpoint": name, "when": clock()}
        fs.write_file(run.pruned / f"{name}.json", json.dumps(note, indent=1).encode())
        fs.rename(run.checkpoints / name, run.pruned / name)
        fs.fsync_dir(run.checkpoints)
        fs.remove_tree(run.pruned / name)
