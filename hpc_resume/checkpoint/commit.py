"""Commit and fencing: how a checkpoint comes to be, and who may make it so.

A checkpoint is written in its attempt's own staging folder::

    attempts/0003/staging/0000012000/shards/rank-00000-of-00004.h5 …
                                     receipts/00000.json …

When all receipts are there, anybody may commit. Who does takes the shards for itself first, by renaming
``shards`` to ``sealed-…``: from then on nobody else can add to them or commit them. It writes ``manifest.json``
among them and renames the folder to ``checkpoints/0000012000-3f9a1c2e``. That rename is the commit, so
``checkpoints/`` never holds anything unfinished, and one without a manifest is damaged. If it dies half-way,
another one takes the sealed folder over in the same manner; whoever has lost it finds its path gone.

The next attempt fences this one off by moving everything out of its staging folder and removing the folder:
from then on each path that this attempt could commit from is gone, on filesystems that address by handle
(NFS) too. Whatever it committed before is seen by the next attempt, because it looks after fencing.
"""

from __future__ import annotations

import contextlib
import errno
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.receipt import Receipt, to_manifest
from hpc_resume.errors import FencedError, IntegrityError, SaveError
from hpc_resume.files import DISK, Filesystem, obstacle
from hpc_resume.rollbacks import active_names
from hpc_resume.rundir import RunDirectory, checkpoint_step

STAGING = "staging"
UNFINISHED = "unfinished"
SHARDS = "shards"
RECEIPTS = "receipts"
_SEALED = "sealed-"
_REFUSED = "refused.txt"
_STAGED = re.compile(r"\d{10,20}")


def claim_attempt(run: RunDirectory, *, fs: Filesystem = DISK) -> int:
    """Begin a new attempt and fence off all earlier ones.

    The folder appears together with its staging folder, by one rename that fails if the number is taken.

    Returns
    -------
    int
        Its number, from 1.

    Raises
    ------
    FencedError
        If yet another attempt has begun meanwhile.
    """
    draft = run.attempts / f".claim-{uuid.uuid4().hex}"
    try:
        fs.mkdir(draft)
        fs.mkdir(draft / STAGING)
        fs.fsync_dir(draft)
        number = max(run.attempt_numbers(), default=0) + 1
        while True:
            try:
                fs.rename(draft, run.attempt(number))
                break
            except OSError:
                if not run.attempt(number).exists():
                    raise
                number += 1
    except OSError:
        fs.remove_tree(draft)
        raise
    fs.fsync_dir(run.attempts)
    for other in run.attempt_numbers():
        if other > number:  # it has fenced us off, or may not have seen us
            raise FencedError(f"{run.root}: attempt {other} has begun while attempt {number} was beginning")
        if other < number:
            _fence(run, other, fs)
    return number


def _fence(run: RunDirectory, attempt: int, fs: Filesystem) -> None:
    staging = run.attempt(attempt) / STAGING
    unfinished = run.attempt(attempt) / UNFINISHED
    if not staging.exists():
        return
    while staging.exists():
        # The old owner, or another attempt that fences it off too, may be at work in there.
        names = _names(staging, fs)
        if names:
            with contextlib.suppress(FileExistsError):
                fs.mkdir(unfinished)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fs.rename(staging / name, unfinished / f"{name}-{uuid.uuid4().hex[:4]}")
        try:
            fs.rmdir(staging)
        except FileNotFoundError:
            break
        except OSError:
            if not _names(staging, fs):
                raise  # not that the old owner has added something meanwhile
    fs.fsync_dir(run.attempt(attempt))


def _names(folder: Path, fs: Filesystem) -> list[str]:
    try:
        return fs.listdir(folder)
    except FileNotFoundError:
        return []


@paused_collector()
def finish_commit(
    run: RunDirectory, folder: Path, *, take_over: bool = False, fs: Filesystem = DISK
) -> Manifest:
    """Turn a staged checkpoint into a committed one.

    Parameters
    ----------
    run
        The run directory.
    folder
        The staged checkpoint, holding ``shards`` and ``receipts``.
    take_over
        Go on with what another process has begun to commit: it has died, or is too slow.

    Returns
    -------
    Manifest
        Of the committed checkpoint.

    Raises
    ------
    IntegrityError
        If a receipt or shard is missing or damaged; it stays as it was then.
    FileNotFoundError
        If the folder is gone, or somebody else is committing it.
    """
    receipts = _all_receipts(folder, fs)
    with _sealed(folder, fs, take_over=take_over) as sealed:
        chosen = [_present(sealed, candidates) for candidates in receipts]
        manifest = to_manifest(chosen, parent_of(run, chosen[0].header.step))
        _publish(run, folder, sealed, manifest, fs)
        return manifest


def parent_of(run: RunDirectory, step: int) -> str | None:
    """Name of the newest committed checkpoint before a step, those aside that a rollback has set aside."""
    parents = [name for name in active_names(run) if checkpoint_step(name) < step]
    return parents[-1] if parents else None


def publish(run: RunDirectory, folder: Path, manifest: Manifest, *, fs: Filesystem = DISK) -> str:
    """Commit the shards in a staged checkpoint's folder under a manifest; see :func:`finish_commit`.

    Returns
    -------
    str
        Name of the committed checkpoint.
    """
    with _sealed(folder, fs, take_over=False) as sealed:
        return _publish(run, folder, sealed, manifest, fs)


@contextlib.contextmanager
def _sealed(folder: Path, fs: Filesystem, *, take_over: bool) -> Iterator[Path]:
    """Take the shards for this process alone; they are put back if they can't be committed, else all goes."""
    begun = [name for name in fs.listdir(folder) if name.startswith(_SEALED)]
    if begun and not take_over:
        raise FileNotFoundError(errno.ENOENT, "somebody else is committing it", str(folder / SHARDS))
    sealed = folder / f"{_SEALED}{uuid.uuid4().hex[:8]}"
    fs.rename(folder / (begun[0] if begun else SHARDS), sealed)
    try:
        yield sealed
    except (OSError, IntegrityError):
        with contextlib.suppress(OSError):
            fs.rename(sealed, folder / SHARDS)
        raise
    fs.remove_tree(folder)


def _publish(run: RunDirectory, folder: Path, sealed: Path, manifest: Manifest, fs: Filesystem) -> str:
    """Put the manifest to the shards, and move them to the checkpoints."""
    for name in manifest.refers:
        if not (run.checkpoints / name).is_dir():
            raise IntegrityError(f"{folder}: it refers to bytes of {name}, which is not there any more")
    for name in set(fs.listdir(sealed)) - {shard.file for shard in manifest.shards} - {MANIFEST}:
        # Half-written files of ranks that have died, and shards that were written in their stead in vain.
        fs.rename(sealed / name, folder / f"left-{name}")
    # The manifest comes in by a rename from outside: the folder never holds half a manifest.
    draft = folder / f"manifest-{uuid.uuid4().hex[:8]}.json"
    fs.write_file(draft, manifest.to_bytes())
    fs.rename(draft, sealed / MANIFEST)
    fs.fsync_dir(sealed)
    target = run.checkpoints / manifest.name
    try:
        fs.rename(sealed, target)
    except OSError:
        if not target.exists():
            raise
        # It has been renamed after all; its name holds no more than a part of the content id.
        if read_manifest(target).content_id != manifest.content_id:
            raise IntegrityError(f"{target}: is there already, with another content") from None
    make_durable(run, manifest.name, fs)
    return manifest.name


def make_durable(run: RunDirectory, name: str, fs: Filesystem) -> None:
    """Wait until a commit survives a power cut.

    Raises
    ------
    SaveError
        If it may not.
    """
    try:
        fs.fsync_dir(run.checkpoints)
    except OSError as error:
        raise SaveError(
            f"{run.checkpoints / name}: is there, but may not survive a power cut ({error})"
        ) from error


def _present(sealed: Path, candidates: Sequence[Receipt]) -> Receipt:
    """Pick the first receipt whose shard is there: whoever began this commit may have sorted out the others."""
    problem = ""
    for receipt in candidates:
        path = sealed / receipt.shard.file
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            problem = problem or f"{path}: is gone, but its receipt is there"
            continue
        if size_bytes == receipt.shard.size_bytes:
            return receipt
        problem = f"{path}: {size_bytes} bytes, but its receipt says {receipt.shard.size_bytes}"
    raise IntegrityError(problem)


def ranks_with_receipts(folder: Path, fs: Filesystem) -> dict[int, str]:
    """File name of one receipt of each rank of a staged checkpoint, a rank's own rather than one in its stead."""
    found: dict[int, str] = {}
    for name in sorted(_receipt_names(folder, fs), key=lambda name: ".by-" in name):
        found.setdefault(int(name.split(".")[0]), name)
    return found


def _receipt_names(folder: Path, fs: Filesystem) -> Iterator[str]:
    for name in fs.listdir(folder / RECEIPTS):
        if name.endswith(".json") and name.split(".")[0].isdecimal():
            yield name


def _all_receipts(folder: Path, fs: Filesystem) -> list[list[Receipt]]:
    """Receipts of a staged checkpoint for each rank, ascending; its own first, then those in its stead."""
    found: dict[int, list[Receipt]] = {}
    for name in _receipt_names(folder, fs):
        receipt = Receipt.read(folder / RECEIPTS / name)
        found.setdefault(receipt.shard.rank, []).append(receipt)
    if not found:
        raise IntegrityError(f"{folder}: no rank has written its receipt")
    world_size = next(iter(found.values()))[0].header.world_size
    missing = sorted(set(range(world_size)) - found.keys())
    if missing:
        raise IntegrityError(
            f"{folder}: receipts of ranks {_some(missing)} of {world_size} are missing: they were killed while "
            "saving. The shards that are there are kept for inspection"
        )
    for rank, candidates in found.items():
        candidates.sort(key=lambda receipt, rank=rank: (receipt.by != rank, receipt.by))  # type: ignore[misc]
    return [found[rank] for rank in range(world_size)]


def _some(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text} and {len(ranks) - 8} more"


def committed_by(run: RunDirectory, attempt: int, step: int) -> str | None:
    """Name of the checkpoint that an attempt of this run, not of one that it was forked from, has committed."""
    for name in run.checkpoint_names():
        if checkpoint_step(name) == step:
            try:
                manifest = read_manifest(run.checkpoints / name)
            except IntegrityError:
                continue
            if manifest.attempt == attempt and manifest.run_id == run.identity()["run_id"]:
                return name
    return None


def finish_earlier_commits(run: RunDirectory, *, fs: Filesystem = DISK) -> tuple[list[str], list[str]]:
    """Commit what fenced attempts had written completely but not committed.

    Returns
    -------
    (list of str, list of str)
        Names that are committed now, and for each one that can't be the reason; its files stay. Where the
        filesystem has refused, the attempt after this one tries again.
    """
    committed, refused = [], []
    for attempt, folder in _unfinished(run, fs):
        if (folder / _REFUSED).exists():
            continue
        shards = [name for name in _names(folder, fs) if name == SHARDS or name.startswith(_SEALED)]
        try:
            name = committed_by(run, attempt, staged_step(folder.name))
            if name is not None:
                make_durable(run, name, fs)
            if name is not None or not shards:
                fs.remove_tree(folder)  # what a commit, or a rank that came too late for one, has left
                continue
            committed.append(finish_commit(run, folder, take_over=True, fs=fs).name)
        except (IntegrityError, FileNotFoundError) as error:
            refused.append(str(error))
            if obstacle(error) is not None:
                continue  # the next attempt may be able to read it
            with contextlib.suppress(OSError):
                fs.write_file(folder / _REFUSED, f"{error}\n".encode())
        except OSError as error:
            refused.append(f"{folder}: can't be committed now ({error})")
    for attempt in run.attempt_numbers():
        with contextlib.suppress(OSError):  # it is not empty, or not there
            if not fs.listdir(run.attempt(attempt) / UNFINISHED):
                fs.rmdir(run.attempt(attempt) / UNFINISHED)
    return committed, refused


def unsettled(run: RunDirectory, *, fs: Filesystem = DISK) -> list[Path]:
    """Folders of staged checkpoints of fenced attempts of which it is not known yet whether they are committed."""
    return [folder for _, folder in _unfinished(run, fs) if not (folder / _REFUSED).exists()]


def staged_step(name: str) -> int:
    """Step of a staged checkpoint, from its folder's name."""
    match = _STAGED.match(name)
    assert match is not None
    return int(match[0])


def awaited_by_unfinished(run: RunDirectory, *, fs: Filesystem = DISK) -> set[str]:
    """Names of the checkpoints in which bytes of staged ones lie: those may still be committed.

    Raises
    ------
    IntegrityError
        If a receipt can't be read for a reason that is not its own.
    """
    names: set[str] = set()
    folders = [folder for _, folder in _unfinished(run, fs)]
    for attempt in run.attempt_numbers():
        staging = run.attempt(attempt) / STAGING
        folders += [staging / name for name in _names(staging, fs)]
    for folder in folders:
        with contextlib.suppress(OSError):
            for name in _receipt_names(folder, fs):
                try:
                    names.update(Receipt.read(folder / RECEIPTS / name).refers)
                except IntegrityError as error:
                    if obstacle(error) is not None:
                        raise
    return names


def _unfinished(run: RunDirectory, fs: Filesystem) -> Iterator[tuple[int, Path]]:
    """Go through what fenced attempts have left: number of the attempt, folder."""
    for attempt in run.attempt_numbers():
        unfinished = run.attempt(attempt) / UNFINISHED
        for name in _names(unfinished, fs):
            if _STAGED.match(name):
                yield attempt, unfinished / name
