"""Staging, commit and fencing: how a checkpoint comes to be, and who may make it so.

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
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.manifest import MANIFEST, read_manifest, shard_file
from hpc_resume.checkpoint.receipt import Header, Receipt, to_manifest
from hpc_resume.checkpoint.shard import Piece, write_shard
from hpc_resume.errors import FencedError, IntegrityError
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.rundir import RunDirectory

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


class Staging:
    """One rank's hold on the checkpoint that its attempt is taking.

    Parameters
    ----------
    run
        The run directory.
    attempt
        This attempt's number.
    rank, node
        Who writes, on which host.
    threads
        Writers of a shard.
    fs, clock
        Filesystem and Unix time in seconds.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        rank: int,
        node: str,
        *,
        threads: int = 2,
        fs: Filesystem = DISK,
        clock: Clock = time.time,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._node = node
        self._threads = threads
        self._fs = fs
        self._clock = clock

    def folder(self, step: int) -> Path:
        """Staging folder of one checkpoint."""
        return self._run.attempt(self._attempt) / STAGING / f"{step:010d}"

    def write(self, header: Header, pieces: Sequence[Piece], objects: Any) -> Receipt:
        """Make this rank's shard and receipt durable.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        OSError
            If the filesystem refuses.
        """
        folder = self.folder(header.step)
        try:
            for path in (folder, folder / "shards", folder / "receipts"):
                try:
                    self._fs.mkdir(path)
                except FileExistsError:
                    continue  # another rank was first
            begun = self._clock()
            path = folder / "shards" / shard_file(self._rank, header.world_size)
            written = write_shard(path, pieces, threads=self._threads, fs=self._fs)
            created = self._clock()
            receipt = Receipt.of(
                header=header,
                rank=self._rank,
                node=self._node,
                created=created,
                pieces=pieces,
                written=written,
                objects=objects,
                write_s=created - begun,
            )
            self._fs.write_file(folder / "receipts" / f"{self._rank:05d}.json", receipt.to_bytes())
        except FileNotFoundError as error:
            raise self._fenced(header.step) from error
        return receipt

    def commit(self, step: int) -> str:
        """Commit a checkpoint whose receipts are all there.

        Returns
        -------
        str
            Its name.

        Raises
        ------
        FencedError
            If a later attempt owns the run; it finishes the commit in our stead.
        IntegrityError
            If the receipts do not belong together.
        """
        try:
            return finish_commit(self._run, self.folder(step), fs=self._fs)
        except FileNotFoundError as error:
            raise self._fenced(step) from error

    def _fenced(self, step: int) -> FencedError:
        later = [number for number in self._run.attempt_numbers() if number > self._attempt]
        owner = f"attempt {later[-1]} has begun" if later else "its staging folder is gone"
        return FencedError(
            f"{self._run.root}: attempt {self._attempt} can't commit step {step}: {owner}. "
            "Two jobs run in one run directory: cancel one, or give each its own run_dir"
        )


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
    shards = folder / "shards"
    receipts = _receipts(folder, fs)
    parents = [name for name in run.checkpoint_names() if int(name.split("-")[0]) < receipts[0].header.step]
    manifest = to_manifest(receipts, parents[-1] if parents else None)
    for shard in manifest.shards:
        size = (shards / shard.file).stat().st_size
        if size != shard.size_bytes:
            raise IntegrityError(
                f"{shards / shard.file}: {size} bytes, but its receipt says {shard.size_bytes}"
            )
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


def _receipts(folder: Path, fs: Filesystem) -> list[Receipt]:
    """All receipts of a staged checkpoint, by rank."""
    names = [name for name in fs.listdir(folder / "receipts") if name.endswith(".json") and name[0] != "."]
    if not names:
        raise IntegrityError(f"{folder}: no rank has written its receipt")
    receipts = [Receipt.read(folder / "receipts" / name) for name in names]
    receipts.sort(key=lambda receipt: receipt.rank)
    world_size = receipts[0].header.world_size
    missing = sorted(set(range(world_size)) - {receipt.rank for receipt in receipts})
    if missing:
        raise IntegrityError(
            f"{folder}: receipts of ranks {_some(missing)} of {world_size} are missing: they were killed while "
            "saving. The shards that are there are kept for inspection"
        )
    return receipts


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
