"""A new run that begins at a checkpoint of another one, and shares its bytes.

Files are linked, so they take no space, and neither run can take them from the other: deleting them in one leaves
them in the other. Where links can't be made, on another filesystem or of somebody else's files, they are copied.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.rollback import who_am_i
from hpc_resume.checkpoint.store import all_newest_first
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, IntegrityError, SaveError, UsageError
from hpc_resume.files import DISK, Clock, Filesystem, JsonObject
from hpc_resume.lineage import Ancestor, Lineage, lineage_path, read_lineage
from hpc_resume.provenance.sources import Sources
from hpc_resume.records import batch_path, configuration_path, has_batch, has_configuration, named_data
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.untrusted import open_regular

#: Errors of a link that a copy may not have.
_COPY = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
)
_PIECE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkPlan:
    """What a fork is made of.

    Parameters
    ----------
    parent
        The run to fork.
    checkpoint, manifest
        Where it goes its own way.
    shared
        The manifests of it, and of all that it refers to, by name.
    """

    parent: RunDirectory
    checkpoint: str
    manifest: Manifest
    shared: Mapping[str, Manifest]

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards that are shared."""
        return sum(manifest.size_bytes for manifest in self.shared.values())


def plan_fork(parent: RunDirectory, step: int | None, *, verify: bool = False, threads: int = 2) -> ForkPlan:
    """Find what a fork needs of its parent; only reads.

    Parameters
    ----------
    parent
        The run to fork.
    step
        Completed steps of the checkpoint; the newest full one if it is None. What a rollback has set aside can be
        forked, too.
    verify
        Read every byte; else manifests, and that all files are there in their sizes. Whatever is restored is
        verified before it is used, in any case.
    threads
        That read.

    Raises
    ------
    CheckpointNotFound
        If there is no full checkpoint of this step.
    IntegrityError
        If it, or what it refers to, is damaged.
    """
    parent.identity()
    name, manifest = _find(parent, step)
    shared: dict[str, Manifest] = {}
    wanted = [name]
    for each in wanted:  # grows while it is gone through
        if each not in shared:
            shared[each] = read_manifest(parent.checkpoints / each)
            wanted += shared[each].refers
    for each, found in shared.items():
        folder = parent.checkpoints / each
        for shard in found.shards:
            _check_file(folder / shard.file, shard.size_bytes)
        if verify and (problems := verify_checkpoint(folder, found, threads=threads)):
            raise IntegrityError(f"{problems[0].path}: {problems[0].problem}; fork at an older step")
    return ForkPlan(parent=parent, checkpoint=name, manifest=manifest, shared=shared)


def _find(parent: RunDirectory, step: int | None) -> tuple[str, Manifest]:
    damaged = None
    for name, manifest in all_newest_first(parent):
        if step is not None and checkpoint_step(name) != step:
            continue
        if isinstance(manifest, IntegrityError):
            damaged = damaged or manifest
        elif manifest.resumable:
            return name, manifest
    if damaged is not None:
        raise damaged
    there = ", ".join(str(checkpoint_step(name)) for name in parent.checkpoint_names()) or "none at all"
    what = "no full checkpoint" if step is None else f"no full checkpoint of step {step}"
    raise CheckpointNotFound(f"{parent.root}: {what}; there are: {there}")


def _check_file(path: Path, size_bytes: int) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != size_bytes:
        raise IntegrityError(f"{path}: is no file of {size_bytes} bytes any more")


def apply_fork(
    plan: ForkPlan,
    target: Path,
    *,
    name: str,
    settings: JsonObject | None = None,
    config: Config | None = None,
    why: str = "",
    copy: bool = False,
    fs: Filesystem = DISK,
    clock: Clock = time.time,
) -> Lineage:
    """Make the folder of the new run; it appears whole, or not at all.

    Parameters
    ----------
    plan
        From :func:`plan_fork`.
    target
        The new run's folder; it must not exist, or be empty.
    name
        What the new run is called.
    settings
        What is set otherwise, for the record.
    config
        The new run's, to be put beside those of the parent, if there is one.
    why
        The reason, for the record.
    copy
        Copy files even where they could be linked.
    fs, clock
        Filesystem and Unix time in seconds.

    Returns
    -------
    Lineage
        As it was written down; ``how`` says whether files are linked.

    Raises
    ------
    UsageError
        If the folder is there already, or can't be made.
    SaveError
        If files can be neither linked nor copied.
    """
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UsageError(f"{target}: is there already; a fork makes a new folder: give another one with --to")
    draft = target.parent / f".{target.name}.fork-{uuid.uuid4().hex[:8]}"
    try:
        fs.make_dirs(target.parent)
        run = RunDirectory(draft)
        run_id = run.create(name, fs=fs, clock=clock)["run_id"]
        linked = {
            each: _share(plan.parent, run, each, found, copy=copy, fs=fs)
            for each, found in plan.shared.items()
        }
        for each in [each for each, by_link in linked.items() if not by_link]:
            if problems := verify_checkpoint(run.checkpoints / each, plan.shared[each]):
                where = problems[0].path.relative_to(run.root)
                raise IntegrityError(
                    f"{plan.parent.root / where}: its copy is not right: {problems[0].problem}"
                )
        _copy_records(plan, run, fs)
        if config is not None:
            config.store(run, fs=fs)
        lineage = _lineage(
            plan, run_id, "links" if all(linked.values()) else "copies", settings or {}, why, clock
        )
        fs.write_file(lineage_path(run), lineage.to_bytes())
        os.rename(draft, target)  # noqa: PTH104 - fails if something is there by now, which replace() would not
        fs.fsync_dir(target.parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise SaveError(f"{target}: can't be made ({error}); nothing is left of it") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return lineage


def _lineage(plan: ForkPlan, run_id: str, how: str, settings: JsonObject, why: str, clock: Clock) -> Lineage:
    identity = plan.parent.identity()
    before = read_lineage(plan.parent)
    parent = Ancestor(
        run_id=identity["run_id"],
        name=str(identity.get("name", plan.parent.root.name)),
        path=str(plan.parent.root.absolute()),
        checkpoint=plan.checkpoint,
    )
    return Lineage(
        run_id=run_id,
        ancestors=(parent, *(before.ancestors if before is not None else ())),
        shared={name: manifest.content_id for name, manifest in plan.shared.items()},
        attempt=plan.manifest.attempt,
        config=plan.manifest.config,
        settings=settings,
        how=how,
        why=why,
        who=who_am_i(),
        when=clock(),
    )


def _share(
    parent: RunDirectory, run: RunDirectory, name: str, manifest: Manifest, *, copy: bool, fs: Filesystem
) -> bool:
    """Give a run a checkpoint of another one; returns whether all of its files are links."""
    source, target = parent.checkpoints / name, run.checkpoints / name
    fs.mkdir(target)
    linked = True
    for file in (MANIFEST, *(shard.file for shard in manifest.shards)):
        if copy or not _linked(source / file, target / file, fs):
            linked = False
            _copy(source / file, target / file, fs)
    fs.fsync_dir(target)
    fs.fsync_dir(run.checkpoints)
    if read_manifest(target).content_id != manifest.content_id:
        raise IntegrityError(f"{source / MANIFEST}: has changed meanwhile")
    for shard in manifest.shards:
        _check_file(target / shard.file, shard.size_bytes)
    return linked


def _linked(source: Path, target: Path, fs: Filesystem) -> bool:
    try:
        fs.link(source, target)
    except OSError as error:
        if error.errno not in _COPY:
            raise
        return False
    return True


def _copy(source: Path, target: Path, fs: Filesystem) -> None:
    """Copy a file; a filesystem that can share blocks between files does so."""
    read = open_regular(source)
    try:
        write = fs.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            place, size_bytes = 0, os.fstat(read).st_size
            while place < size_bytes:
                place += _copy_piece(read, write, place, size_bytes - place, fs)
            fs.fsync(write)
        finally:
            fs.close(write)
    finally:
        os.close(read)


def _copy_piece(read: int, write: int, place: int, left_bytes: int, fs: Filesystem) -> int:
    """Copy some bytes, in the kernel if it can; returns how many."""
    try:
        copied = os.copy_file_range(read, write, left_bytes, place, place)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}:
            raise
        copied = 0
    if copied == 0:
        piece = os.pread(read, min(left_bytes, _PIECE_BYTES), place)
        if not piece:
            raise OSError(errno.EIO, "it has become shorter meanwhile")
        fs.write_all(write, piece, place)
        copied = len(piece)
    return copied


def _copy_records(plan: ForkPlan, run: RunDirectory, fs: Filesystem) -> None:
    """Copy the records that the shared checkpoints name, as far as they are there: ``verify`` misses them else."""
    for source in {
        path for manifest in plan.shared.values() for path in _named_records(plan.parent, manifest)
    }:
        target = run.root / source.relative_to(plan.parent.root)
        fs.make_dirs(target.parent)
        _copy(source, target, fs)


def _named_records(run: RunDirectory, manifest: Manifest) -> Iterator[Path]:
    """Files of a run, beside its checkpoints, that one of them names."""
    if manifest.config is not None and has_configuration(run, manifest.config):
        yield configuration_path(run, manifest.config)
    yield from (path for path in named_data(run, manifest.environment) if path.is_file())
    yield from Sources.of(run).files_of(manifest.environment.get("source"))
    probe = manifest.health.probe
    if probe is not None and probe.batch is not None and has_batch(run, probe.batch):
        yield batch_path(run, probe.batch)  # without it, what the probe gave could not be compared
