"""Commit and fencing: how a checkpoint comes to be, and who may make it so.

A checkpoint is written in its attempt's own staging folder::

    attempts/0003/staging/0000012000/shards/rank-00000-of-00004.h5 …
                                     receipts/00000.json …

When all receipts are there, anybody writes ``shards/manifest.json`` and renames ``shards`` to
``checkpoints/0000012000-3f9a1c2e``. That rename is the commit, so ``checkpoints/`` never holds anything
unfinished, and one without a manifest is damaged.

The next attempt fences this one off by moving everything out of its staging folder and removing the folder:
from then on each path that this attempt could commit from is gone, on filesystems that address by handle
(NFS) too. Whatever it committed before is seen by the next attempt, because it looks after fencing.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.receipt import Receipt, to_manifest
from hpc_resume.errors import IntegrityError
from hpc_resume.files import DISK, Filesystem
from hpc_resume.rundir import RunDirectory, checkpoint_step

STAGING = "staging"
UNFINISHED = "unfinished"


def claim_attempt(run: RunDirectory, *, fs: Filesystem = DISK) -> int:
    """Begin a new attempt and fence off all earlier ones.

    The folder appears together with its staging folder, by one rename that fails if the number is taken.

    Returns
    -------
    int
        Its number, from 1.
    """
    draft = run.attempts / f".claim-{uuid.uuid4().hex}"
    fs.mkdir(draft)
    fs.mkdir(draft / STAGING)
    number = max(run.attempt_numbers(), default=0) + 1
    while True:
        try:
            fs.rename(draft, run.attempt(number))
            break
        except OSError:
            if not run.attempt(number).exists():
                raise
            number += 1
    fs.fsync_dir(run.attempts)
    for earlier in run.attempt_numbers():
        if earlier < number:
            _fence(run, earlier, fs)
    return number


def _fence(run: RunDirectory, attempt: int, fs: Filesystem) -> None:
    staging = run.attempt(attempt) / STAGING
    unfinished = run.attempt(attempt) / UNFINISHED
    while staging.exists():
        unfinished.mkdir(exist_ok=True)
        for name in fs.listdir(staging):
            fs.rename(staging / name, unfinished / f"{name}-{uuid.uuid4().hex[:4]}")
        try:
            fs.rmdir(staging)
        except OSError:
            if not fs.listdir(staging):
                raise  # not that the old owner has added something meanwhile
    fs.fsync_dir(run.attempt(attempt))


@paused_collector()
def finish_commit(run: RunDirectory, folder: Path, *, fs: Filesystem = DISK) -> str:
    """Turn a staged checkpoint into a committed one.

    Parameters
    ----------
    run
        The run directory.
    folder
        The staged checkpoint, holding ``shards`` and ``receipts``.

    Returns
    -------
    str
        Name of the committed checkpoint.

    Raises
    ------
    IntegrityError
        If a receipt or shard is missing or damaged; nothing was changed then.
    FileNotFoundError
        If the folder is gone.
    """
    receipts = _all_receipts(folder, fs)
    return publish(run, folder, to_manifest(receipts, parent_of(run, receipts[0].header.step)), fs=fs)


def parent_of(run: RunDirectory, step: int) -> str | None:
    """Name of the newest committed checkpoint before a step."""
    parents = [name for name in run.checkpoint_names() if checkpoint_step(name) < step]
    return parents[-1] if parents else None


def publish(run: RunDirectory, folder: Path, manifest: Manifest, *, fs: Filesystem = DISK) -> str:
    """Commit the shards in a staged checkpoint's folder under a manifest; see :func:`finish_commit`.

    Returns
    -------
    str
        Name of the committed checkpoint.
    """
    shards = folder / "shards"
    for name in manifest.refers:
        if not (run.checkpoints / name).is_dir():
            raise IntegrityError(f"{folder}: it refers to bytes of {name}, which is not there any more")
    for shard in manifest.shards:
        size = (shards / shard.file).stat().st_size
        if size != shard.size_bytes:
            raise IntegrityError(
                f"{shards / shard.file}: {size} bytes, but its receipt says {shard.size_bytes}"
            )
    for name in set(fs.listdir(shards)) - {shard.file for shard in manifest.shards} - {MANIFEST}:
        # Half-written files of ranks that have died, and shards that were written in their stead in vain.
        fs.rename(shards / name, folder / f"left-{name}")
    # The manifest comes in by a rename from outside: shards/ never holds half a manifest.
    draft = folder / f"manifest-{uuid.uuid4().hex[:8]}.json"
    fs.write_file(draft, manifest.to_bytes())
    fs.rename(draft, shards / MANIFEST)
    fs.fsync_dir(shards)
    target = run.checkpoints / manifest.name
    try:
        fs.rename(shards, target)
    except OSError:
        if not target.exists():
            raise
        read_manifest(target)  # somebody else finished the same commit: the name holds the content id
    fs.fsync_dir(run.checkpoints)
    shutil.rmtree(folder, ignore_errors=True)
    return manifest.name


def read_receipts(folder: Path, fs: Filesystem) -> dict[int, Receipt]:
    """Receipts of a staged checkpoint by rank; a rank's own rather than one in its stead."""
    found: dict[int, Receipt] = {}
    for name in fs.listdir(folder / "receipts"):
        if name.endswith(".json") and name[0] != ".":
            receipt = Receipt.read(folder / "receipts" / name)
            standing = found.get(receipt.shard.rank)
            if standing is None or receipt.by == receipt.shard.rank:
                found[receipt.shard.rank] = receipt
    return found


def _all_receipts(folder: Path, fs: Filesystem) -> list[Receipt]:
    """One receipt for each rank of a staged checkpoint, ascending."""
    found = read_receipts(folder, fs)
    if not found:
        raise IntegrityError(f"{folder}: no rank has written its receipt")
    world_size = next(iter(found.values())).header.world_size
    missing = sorted(set(range(world_size)) - found.keys())
    if missing:
        raise IntegrityError(
            f"{folder}: receipts of ranks {_some(missing)} of {world_size} are missing: they were killed while "
            "saving. The shards that are there are kept for inspection"
        )
    return [found[rank] for rank in range(world_size)]


def _some(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text} and {len(ranks) - 8} more"


def finish_earlier_commits(run: RunDirectory, *, fs: Filesystem = DISK) -> tuple[list[str], list[str]]:
    """Commit what fenced attempts had written completely but not committed.

    Returns
    -------
    (list of str, list of str)
        Names that are committed now, and for each one that can't be the reason; its files stay.
    """
    committed, refused = [], []
    for attempt in run.attempt_numbers():
        unfinished = run.attempt(attempt) / UNFINISHED
        if not unfinished.is_dir():
            continue
        for name in fs.listdir(unfinished):
            folder = unfinished / name
            if not (folder / "shards").is_dir() or (folder / "refused.txt").exists():
                continue
            try:
                committed.append(finish_commit(run, folder, fs=fs))
            except (IntegrityError, FileNotFoundError) as error:
                refused.append(str(error))
                (folder / "refused.txt").write_text(f"{error}\n")
        if not os.listdir(unfinished):  # noqa: PTH208 - names are all that is needed
            unfinished.rmdir()
    return committed, refused
