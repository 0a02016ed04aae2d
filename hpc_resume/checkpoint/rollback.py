"""Rolling a run back: it goes on from an earlier checkpoint; the later ones stay, and are set aside.

Who rolls back owns the run for a moment, as an attempt does: by the next attempt's number, which fences off all
before it. So no attempt that still runs can commit anything after it, and what one had ready is committed before,
and set aside with the rest. The record is written in that attempt's staging folder, and linked from there to its
place: an attempt that begins meanwhile takes the path away, and nothing is rolled back then. Otherwise it looks
what the newest checkpoint is only after that, and sees the record.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hpc_resume.checkpoint.commit import STAGING, claim_attempt, finish_earlier_commits, unsettled
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.store import newest_first
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.errors import CheckpointNotFound, FencedError, IntegrityError, SaveError, UsageError
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.rollbacks import Rollback, active_names, folder, path_of, read_rollbacks, standing
from hpc_resume.rundir import RunDirectory, checkpoint_step

_DRAFT = "rollback.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackPlan:
    """What a rollback is going to do.

    Parameters
    ----------
    to
        Name of the checkpoint to go on from.
    set_aside
        Names of the later ones, newest first.
    """

    to: str
    set_aside: tuple[str, ...]

    @property
    def step(self) -> int:
        """Completed steps to go on from."""
        return checkpoint_step(self.to)


def plan_rollback(run: RunDirectory, step: int, *, threads: int = 2) -> RollbackPlan:
    """Find what to go on from, and verify every byte of it; only reads.

    Parameters
    ----------
    run
        The run directory.
    step
        Completed steps to go on from; of several checkpoints of it, the one that was created last and is whole.
    threads
        That read.

    Raises
    ------
    CheckpointNotFound
        If there is no full checkpoint of this step to go on from.
    IntegrityError
        If it is damaged.
    UsageError
        If it is the newest one anyway.
    """
    run.identity()
    later: list[str] = []
    steps: list[int] = []
    damaged = ""
    for name, manifest in newest_first(run):
        found = checkpoint_step(name)
        steps.append(found)
        if found == step and isinstance(manifest, Manifest) and manifest.resumable:
            problems = verify_checkpoint(run.checkpoints / name, manifest, threads=threads)
            if not problems:
                if not later:
                    raise UsageError(f"{run.root}: step {step} ({name}) is what it goes on from anyway")
                return RollbackPlan(to=name, set_aside=tuple(later))
            damaged = f"{problems[0].path}: {problems[0].problem}"
        elif found == step and isinstance(manifest, IntegrityError):
            damaged = str(manifest)
        if found < step:
            break
        later.append(name)
    if damaged:
        raise IntegrityError(f"{damaged}; roll back to an older step: hpc-resume ls {run.root}")
    there = (
        ", ".join(map(str, sorted({checkpoint_step(name) for name in active_names(run)}))) or "none at all"
    )
    raise CheckpointNotFound(
        f"{run.root}: no full checkpoint of step {step} to go on from; there are: {there}"
    )


def apply_rollback(
    run: RunDirectory, plan: RollbackPlan, *, why: str, fs: Filesystem = DISK, clock: Clock = time.time
) -> Rollback:
    """Set aside what comes after a checkpoint.

    Parameters
    ----------
    run
        The run directory.
    plan
        From :func:`plan_rollback`; what has been committed since is set aside, too.
    why
        The reason, for the record.
    fs, clock
        Filesystem and Unix time in seconds.

    Returns
    -------
    Rollback
        As it was written down.

    Raises
    ------
    UsageError
        If no reason is given.
    FencedError
        If an attempt has begun meanwhile; nothing has changed then.
    SaveError
        If it can't be told what earlier attempts have committed.
    CheckpointNotFound
        If the checkpoint is gone by now.
    """
    with _owner(run, why, fs) as (number, after):
        names = [name for name, _ in newest_first(run)]
        if plan.to not in names:
            raise CheckpointNotFound(f"{run.root}: {plan.to} is gone, or set aside; nothing was rolled back")
        place = names.index(plan.to)
        record = Rollback(
            number=len(read_rollbacks(run)) + 1,
            to=plan.to,
            set_aside=tuple(names[:place]),
            kept=tuple(names[place:]),
            after=after,
            why=why,
            who=who_am_i(),
            when=clock(),
        )
        _write(run, record, number, fs)
    return record


def undo_rollback(
    run: RunDirectory, *, why: str, fs: Filesystem = DISK, clock: Clock = time.time
) -> Rollback:
    """Take the last rollback back, as long as nothing has been committed since.

    Parameters are those of :func:`apply_rollback`.

    Raises
    ------
    UsageError
        If there is none, or something has been committed since.
    FencedError, SaveError
        As :func:`apply_rollback`.
    """
    _undoable(run)  # before an attempt is fenced off in vain
    with _owner(run, why, fs) as (number, after):
        last = _undoable(run)
        record = Rollback(
            number=len(read_rollbacks(run)) + 1,
            to=last.to,
            set_aside=(),
            kept=tuple(run.checkpoint_names()),
            after=after,
            why=why,
            who=who_am_i(),
            when=clock(),
            undoes=last.number,
        )
        _write(run, record, number, fs)
    return record


def _undoable(run: RunDirectory) -> Rollback:
    """Give the last rollback that holds, if nothing was committed after it."""
    found = standing(read_rollbacks(run))
    if not found:
        raise UsageError(f"{run.root}: there is no rollback to undo")
    last = found[-1]
    if since := [name for name in active_names(run) if name not in last.kept]:
        raise UsageError(
            f"{run.root}: {since[-1]} was committed since the rollback to step {last.step}, and the run has one newest "
            f"checkpoint; to go on from what was set aside as well: hpc-resume fork {run.root} --at {last.newest_step}"
        )
    return last


@contextlib.contextmanager
def _owner(run: RunDirectory, why: str, fs: Filesystem) -> Iterator[tuple[int, int]]:
    """Own the run for a moment; gives the attempt's number that is taken for it, and the one before."""
    if not why.strip():
        raise UsageError(
            f"{run.root}: give the reason: --why TEXT; whoever looks at the run later will need it"
        )
    after = max(run.attempt_numbers(), default=0)
    number = claim_attempt(run, fs=fs)
    try:
        after = max((each for each in run.attempt_numbers() if each < number), default=0)
        finish_earlier_commits(run, fs=fs)
        if left := unsettled(run, fs=fs):
            raise SaveError(
                f"{left[0]}: can't be committed now, and might be later; nothing was rolled back: try again"
            )
        yield number, after
    finally:
        _give_back(run, number, fs)


def _write(run: RunDirectory, record: Rollback, number: int, fs: Filesystem) -> None:
    """Write a record, unless an attempt has begun meanwhile and taken the place away."""
    draft = run.attempt(number) / STAGING / _DRAFT
    try:
        fs.make_dirs(folder(run))
        fs.write_file(draft, record.to_bytes())
        fs.link(draft, path_of(run, record.number))
        fs.fsync_dir(folder(run))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESTALE, errno.EEXIST}:
            raise FencedError(
                f"{run.root}: an attempt, or another rollback, has begun meanwhile, so nothing was rolled back; see how "
                f"it is: hpc-resume status {run.root}"
            ) from error
        raise SaveError(
            f"{folder(run)}: can't be written ({error}); see whether it was: hpc-resume ls"
        ) from error


def _give_back(run: RunDirectory, number: int, fs: Filesystem) -> None:
    """Remove the folder that stood for an attempt: none has trained. A gap between attempts would be damage."""
    own = run.attempt(number)
    with contextlib.suppress(OSError):
        fs.unlink(own / STAGING / _DRAFT)
    for path in (own / STAGING, own):
        with contextlib.suppress(OSError):
            if number == max(run.attempt_numbers(), default=0):
                fs.rmdir(path)
    if number < max(run.attempt_numbers(), default=0):
        with contextlib.suppress(OSError):  # it is there
            fs.mkdir(own)


def who_am_i() -> str:
    """Name of the person at the keyboard, and of the machine."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return f"{name} on {os.uname().nodename}"
