"""Restoring: all ranks take the newest checkpoint that is whole, and all take the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.manifest import FULL, Manifest, read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import Declined, IntegrityError, MismatchError, UsageError
from hpc_resume.journal import Journal
from hpc_resume.run import generators
from hpc_resume.run.attempt import ranks_text
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory

#: One rank may need this long to read its part while the others wait for its word.
_RESTORE_S = 6 * 3600.0
#: What decides for all ranks comes first.
_GRAVITY = ("declined", "misfit", "damaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What was restored.

    Parameters
    ----------
    name
        Of the checkpoint.
    manifest
        Its manifest.
    """

    name: str
    manifest: Manifest


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
) -> Restored | None:
    """Restore the newest valid checkpoint on all ranks, quarantining damaged ones.

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
    IntegrityError
        If there were checkpoints but none is whole.
    """
    damaged: list[str] = []
    for turn in range(1_000_000):
        name = peers.share(f"restore/{turn}", _newest(run, damaged, journal) if rank == 0 else None)
        if name is None:
            break
        problem = _try(run, name, state, rank=rank, world_size=world_size, seed=seed, fits=fits)
        answers = peers.gather(f"restored/{turn}", problem, patience_s=_RESTORE_S)
        worst = _worst(answers) if answers is not None else None
        worst = peers.share(f"verdict/{turn}", worst, patience_s=_RESTORE_S)
        if worst is None:
            return Restored(name=name, manifest=read_manifest(run.checkpoints / name))
        kind, reason = worst
        if kind == "declined":
            raise Declined(reason)
        if kind == "misfit":
            raise MismatchError(reason)
        if rank == 0:
            _set_aside(run, name, reason, damaged, journal)
    if peers.share("restore/damaged", damaged if rank == 0 else None):
        raise IntegrityError(
            f"{run.root}: no checkpoint is whole any more; the damaged ones are kept, with reasons, in "
            f"{run.quarantine}. Put back an older copy, or begin again in another run_dir"
        )
    return None


def _worst(answers: list[Any]) -> Any:
    """Pick what decides for all ranks: declined, else a misfit, else damage, else nothing."""
    problems = [answer for answer in answers if answer is not None]
    return min(problems, key=lambda problem: _GRAVITY.index(problem[0]), default=None)


def _newest(run: RunDirectory, damaged: list[str], journal: Journal | None) -> str | None:
    """Name the newest checkpoint whose manifest is whole; others go to quarantine."""
    for name, manifest in store.newest_first(run):
        if isinstance(manifest, IntegrityError):
            _set_aside(run, name, str(manifest), damaged, journal)
        elif manifest.content == FULL:
            return name
        elif journal is not None:
            journal.event("passed_over", checkpoint=name, step=manifest.step, why=manifest.note)
    return None


def _set_aside(
    run: RunDirectory, name: str, reason: str, damaged: list[str], journal: Journal | None
) -> None:
    store.quarantine(run, name, reason)
    damaged.append(name)
    if journal is not None:
        journal.event("quarantined", durable=True, checkpoint=name, reason=reason)


def _try(
    run: RunDirectory,
    name: str,
    state: TrackedState,
    *,
    rank: int,
    world_size: int,
    seed: int,
    fits: Callable[[Manifest], str | None],
) -> tuple[str, str] | None:
    """Restore this rank; returns what is wrong, if anything is."""
    folder = run.checkpoints / name
    try:
        manifest = read_manifest(folder)
        if (declined := fits(manifest)) is not None:
            return "declined", declined
        with CheckpointReader(folder, manifest) as reader:
            state.restore(reader)
            same = manifest.world_size == world_size and rank not in manifest.missing_ranks
            own = state.private(reader, rank) if same else {}
            if "rng/torch" in own:  # what other tools wrote, or was imported, has none
                generators.restore(own)
            else:
                generators.seed_all(seed, manifest.step, rank)
    except IntegrityError as error:
        return "damaged", str(error)
    except UsageError as error:
        return "misfit", str(error)
    return None


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
    note("restored", checkpoint=restored.name, step=manifest.step, saved_world_size=saved_on)
