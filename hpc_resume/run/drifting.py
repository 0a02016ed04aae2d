"""On resume: what this attempt runs on against what its checkpoint was taken on, told, and sometimes refused."""

from __future__ import annotations

from collections.abc import Callable

from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.config import Config
from hpc_resume.errors import DriftError
from hpc_resume.provenance.drift import Drift
from hpc_resume.provenance.remembered import drift_between
from hpc_resume.records import attempt_record
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory

#: So many differences are told in the log; the journal and ``hpc-resume diff`` tell all.
_TOLD = 4


def check_drift(
    run: RunDirectory,
    manifest: Manifest,
    facts: AttemptFacts,
    config: Config,
    peers: Peers,
    *,
    rank: int,
    say: Callable[[str], None],
    note: Callable[..., None],
) -> None:
    """Tell what is not as it was when the checkpoint was taken.

    Parameters
    ----------
    run
        The run directory.
    manifest
        Of the checkpoint that was restored.
    facts
        Of this attempt.
    config
        Settings; ``allow_drift`` says why the run may go on.
    peers
        The other ranks; all of them come here.
    rank
        Of this process; rank 0 looks.
    say, note
        Into the log; into the journal.

    Raises
    ------
    DriftError
        On every rank, if the run must not go on so.
    """
    refusal = None
    if rank == 0:
        now = attempt_record(run, facts.number)
        before = attempt_record(run, manifest.attempt) if manifest.run_id == facts.run_id else {}
        before.setdefault("environment", manifest.environment)
        before.setdefault("source", {"digest": manifest.environment.get("source")})
        found = drift_between(run, before, now)
        _tell(found, manifest, facts, run, say=say, note=note)
        stops = [each for each in found if each.grade == "stop"]
        if stops and config.allow_drift:
            say(f"goes on all the same: {config.allow_drift}")
            note("drift_allowed", why=config.allow_drift, stop=[str(each) for each in stops])
        elif stops:
            refusal = (
                f"{run.root}: {'; '.join(map(str, stops))} since attempt {manifest.attempt} took the checkpoint of step "
                f"{manifest.step}, so what comes out would be another training; go back to what it was, or say why it "
                'may go on: allow_drift: "REASON"'
            )
    refusal = peers.share("drift", refusal)
    if refusal is not None:
        raise DriftError(refusal)


def _tell(
    found: list[Drift],
    manifest: Manifest,
    facts: AttemptFacts,
    run: RunDirectory,
    *,
    say: Callable[[str], None],
    note: Callable[..., None],
) -> None:
    if not found:
        return
    serious = [each for each in found if each.grade != "harmless"]
    note(
        "drift",
        since=manifest.attempt,
        stop=[str(each) for each in found if each.grade == "stop"],
        look=[str(each) for each in found if each.grade == "look"],
        harmless=[each.what for each in found if each.grade == "harmless"],
    )
    for each in serious[:_TOLD]:
        say(f"not as when step {manifest.step} was saved ({each.grade}): {each}")
    if len(serious) > _TOLD:
        sides = f"{run.root}#{manifest.attempt} {run.root}#{facts.number}"
        say(f"and {len(serious) - _TOLD} more differences: hpc-resume diff {sides}")
