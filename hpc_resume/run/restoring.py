"""Restoring: all ranks take the newest checkpoint that is whole, and all take the same."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import (
    Declined,
    IntegrityError,
    MismatchError,
    ProbeError,
    RendezvousError,
    UsageError,
)
from hpc_resume.files import may_be_damage, obstacle
from hpc_resume.journal import Journal
from hpc_resume.run import generators
from hpc_resume.run.attempt import ranks_text
from hpc_resume.run.candidates import Candidates, what_to_check
from hpc_resume.run.peers import Peers
from hpc_resume.run.probing import SAME, Probing
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import ValidationSettings

#: One rank may need this long to read its part while the others wait for its word.
_RESTORE_S = 6 * 3600.0
#: What decides for all ranks comes first.
_GRAVITY = ("declined", "misfit", "damaged", "unreadable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored.

    Parameters
    ----------
    name
        Of the checkpoint.
    manifest
        Its manifest.
    notes
        What else has changed in the tracked objects, for people.
    anew
        Why this rank's random generators begin new streams; None if they go on.
    probed
        How what the probe gives compares with what it gave before the save; empty without one.
    """

    name: str
    manifest: Manifest
    notes: tuple[str, ...] = ()
    anew: str | None = None
    probed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What came of restoring this rank.

    Parameters
    ----------
    problem
        Kind and reason, if it could not be; of an unreadable file its name, too.
    error
        Of an unreadable file.
    manifest
        Of the checkpoint.
    anew
        Why this rank's random generators begin new streams.
    """

    problem: tuple[str, ...] | None = None
    error: IntegrityError | None = None
    manifest: Manifest | None = None
    anew: str | None = None


def restore_newest(
    run: RunDirectory,
    state: TrackedState,
    peers: Peers,
    *,
    rank: int,
    world_size: int,
    seed: int,
    journal: Journal | None,
    fits: Callable[[Manifest], str | None],
    validation: ValidationSettings,
    agrees: Callable[[Manifest], str | None] = lambda _: None,
    computes: Callable[[Manifest], None] = lambda _: None,
    probing: Probing | None = None,
) -> Restored | None:
    """Restore the newest valid checkpoint on all ranks, quarantining damaged ones.

    What one rank alone can't read is no damage: that rank's error ends the attempt, to be continued elsewhere.

    With a probe, one with which it gives something else than before the save is set aside, too, as soon as an older
    one shows that nothing but the checkpoint is to blame.

    Parameters
    ----------
    run
        The run directory.
    state
        What to restore into.
    peers
        The other ranks.
    rank, world_size
        This process's place.
    seed
        Of the run, for generators that can't be restored.
    journal
        On rank 0.
    fits
        Says why a checkpoint can't be continued on this rank, before anything of it is loaded.
    agrees
        Says why it must not be continued with these settings; one rank that does is enough.
    validation
        What is passed over.
    computes
        Has this process compute as when a checkpoint was taken; called before the probe runs on what was restored.
    probing
        The probe, if there is one.

    Returns
    -------
    Restored or None
        None if the run has no checkpoint yet.

    Raises
    ------
    Declined
        On every rank, if it can't be continued on one.
    MismatchError
        On every rank, if the checkpoint does not fit the tracked state.
    ProbeError
        If the probe gives something else with each one.
    IntegrityError
        If there were checkpoints but none is whole. Or, with the system's error as its cause, if this rank can't read
        one that may well be.
    RendezvousError
        If another rank can't.
    OSError
        If none can be read, and it is not known whether any is damaged.
    """
    candidates = Candidates(run, validation, journal)
    for turn in range(1_000_000):
        name = peers.share(f"restore/{turn}", candidates.newest() if rank == 0 else None)
        if name is None:
            break
        tried = _try(run, name, state, rank=rank, world_size=world_size, seed=seed, fits=fits, agrees=agrees)
        answers = peers.gather(f"restored/{turn}", tried.problem, patience_s=_RESTORE_S)
        worst = _worst(answers) if answers is not None else None
        worst = peers.share(f"verdict/{turn}", worst, patience_s=_RESTORE_S)
        if worst is None:
            manifest = tried.manifest
            assert manifest is not None
            computes(manifest)
            found, how = (SAME, "") if probing is None else probing.compare(manifest, turn)
            taken = candidates.judge(name, found, how) if rank == 0 else None
            if peers.share(f"restore/taken/{turn}", taken):
                notes = tuple(state.notes)
                return Restored(name=name, manifest=manifest, probed=how, notes=notes, anew=tried.anew)
            continue
        kind, reason, *file = worst
        if kind == "declined":
            raise Declined(reason)
        if kind == "misfit":
            raise MismatchError(reason)
        passed = candidates.pass_over(name, reason, *file) if rank == 0 else None
        if not peers.share(f"restore/passed/{turn}", passed, patience_s=_RESTORE_S):
            raise tried.error or RendezvousError(f"rank 0 can read what another rank can't: {reason}")
    _check_none_is_left(run, candidates, peers, rank)
    return None


def _check_none_is_left(run: RunDirectory, candidates: Candidates, peers: Peers, rank: int) -> None:
    """Begin anew only where there was no checkpoint; parameters and errors as of :func:`restore_newest`."""
    if suspects := peers.share("restore/suspects", candidates.suspects if rank == 0 else None):
        raise ProbeError(f"{run.root}: {what_to_check(suspects)}")
    if unread := peers.share("restore/unread", candidates.unread if rank == 0 else None):
        raise OSError(
            errno.EIO,
            f"none of its checkpoints can be read, and nothing was set aside ({'; '.join(unread.values())})",
            str(run.checkpoints),
        )
    if peers.share("restore/damaged", candidates.damaged if rank == 0 else None):
        raise IntegrityError(
            f"{run.root}: no checkpoint is whole any more; the damaged ones are kept, with reasons, in "
            f"{run.quarantine}. Put back an older copy, or begin again in another run_dir"
        )


def _worst(answers: list[Any]) -> Any:
    """Pick what decides for all ranks: declined, else a misfit, else damage, else nothing."""
    problems = [answer for answer in answers if answer is not None]
    return min(problems, key=lambda problem: _GRAVITY.index(problem[0]), default=None)


def _try(
    run: RunDirectory,
    name: str,
    state: TrackedState,
    *,
    rank: int,
    world_size: int,
    seed: int,
    fits: Callable[[Manifest], str | None],
    agrees: Callable[[Manifest], str | None],
) -> _Tried:
    """Restore this rank; what tells nothing of the checkpoint is raised, for it ends this rank."""
    folder = run.checkpoints / name
    try:
        manifest = read_manifest(folder)
        if (declined := fits(manifest)) is not None:
            return _Tried(problem=("declined", declined))
        if (refused := agrees(manifest)) is not None:
            return _Tried(problem=("misfit", refused))
        with CheckpointReader(folder, manifest) as reader:
            state.restore(reader)
            anew = generators.restore_all(state, reader, rank=rank, world_size=world_size, seed=seed)
            return _Tried(manifest=manifest, anew=anew)
    except IntegrityError as error:
        hindered = obstacle(error)
        if hindered is None:
            return _Tried(problem=("damaged", str(error)))
        if not may_be_damage(hindered):
            raise
        return _Tried(
            problem=("unreadable", str(error), getattr(hindered, "filename", None) or ""), error=error
        )
    except Declined as error:
        return _Tried(problem=("declined", str(error)))
    except UsageError as error:
        return _Tried(problem=("misfit", str(error)))


def tell(
    restored: Restored | None,
    place: str,
    run: RunDirectory,
    *,
    say: Callable[[str], None],
    note: Callable[..., None],
) -> None:
    """Say in the log and in the journal what an attempt goes on from.

    Parameters
    ----------
    restored
        The checkpoint; ``None`` for a new run.
    place
        The attempt and where it runs, in words.
    run
        The run directory.
    say, note
        Into the log; into the journal.
    """
    if restored is None:
        say(f"{place}: a new run in {run.root}")
        note("fresh", step=0)
        return
    manifest = restored.manifest
    saved_on = manifest.world_size
    say(f"{place}: restored step {manifest.step} ({restored.name}, saved on {ranks_text(saved_on)})")
    probed = {}
    if restored.probed:
        say(f"the probe, against its values before the save: {restored.probed}")
        probed = {"probed": restored.probed}
    note("restored", checkpoint=restored.name, step=manifest.step, saved_world_size=saved_on, **probed)
    for each in restored.notes:
        say(each)
        note("adjusted", why=each)
    anew = restored.anew
    if anew is None and manifest.missing_ranks:
        anew = f"rank {manifest.missing_ranks[0]} had died when the checkpoint was taken"
    if anew is not None:
        say(f"{anew}, so random generators begin new streams there, derived from (seed, step, rank, name)")
        note("generators_anew", why=anew, seeded_by="seed, step, rank, name")
