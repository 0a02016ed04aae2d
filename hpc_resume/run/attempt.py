"""The records of one attempt, kept by its rank 0: who we are, what happened, how it ended."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint.commit import claim_attempt, finish_earlier_commits
from hpc_resume.config import Config
from hpc_resume.files import DISK, Clock, JsonObject
from hpc_resume.journal import Journal, read_events
from hpc_resume.policy.budget import idle_attempts
from hpc_resume.provenance.environment import describe_environment
from hpc_resume.rundir import RunDirectory, sealed
from hpc_resume.scheduler.environment import JobEnvironment

#: Since 2, the record has a digest, and each line of the journal and of the metrics a checksum.
SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFacts:
    """What rank 0 knows of the attempt and tells every rank.

    Parameters
    ----------
    number
        From 1.
    run_id
        Of the run.
    node_type
        What kind of node it runs on, if that is known.
    """

    number: int
    run_id: str
    node_type: str | None


def begin_attempt(
    run: RunDirectory,
    environment: JobEnvironment,
    node_type: str | None,
    config: Config,
    *,
    nodes: list[str],
    clock: Clock,
) -> tuple[AttemptFacts, Journal]:
    """Claim the next attempt on rank 0, fence off earlier ones, and finish what they left ready to commit."""
    identity = run.create(config.name, clock=clock)
    number = claim_attempt(run)
    config.store(run)
    record = {
        "schema": SCHEMA,
        "attempt": number,
        "job_id": environment.job_id,
        "chain": environment.chain,
        "restart_count": environment.restart_count,
        "kind": environment.kind,
        "rendezvous": environment.rendezvous,
        "nodes": nodes,
        "node_type": node_type,
        "world_size": environment.world_size,
        "started": clock(),
        "config": config.digest(),
        "environment": describe_environment(),
    }
    DISK.write_file(run.attempt(number) / "attempt.json", sealed(record))
    journal = Journal(run.attempt(number) / "events.jsonl", clock=clock)
    journal.event("begun")
    committed, refused = finish_earlier_commits(run)
    for name in committed:
        journal.event("finished_commit", checkpoint=name)
    for reason in refused:
        journal.event("unfinished_checkpoint", reason=reason)
    return AttemptFacts(number=number, run_id=identity["run_id"], node_type=node_type), journal


def idle_before(run: RunDirectory, number: int, chain: str | None, first_step: int) -> int:
    """Count the attempts of this chain, up to the one before ``number``, that brought the run nowhere in a row.

    Parameters
    ----------
    run
        The run directory.
    number
        The attempt that is beginning.
    chain
        Its jobs that go on from each other; attempts of others do not count, because a person submitted this
        one anew.
    first_step
        Step that it begins at.
    """
    if chain is None:
        return 0
    first_steps = [first_step]
    for earlier in reversed([n for n in run.attempt_numbers() if n < number]):
        record = _record(run, earlier)
        if record.get("chain", record.get("job_id")) != chain:
            break
        # An attempt that died before it restored anything began, for all we know, where the next one does.
        first_steps.insert(0, _first_step(run, earlier, default=first_steps[0]))
    return idle_attempts(first_steps)


def _record(run: RunDirectory, number: int) -> JsonObject:
    try:
        record: Any = json.loads((run.attempt(number) / "attempt.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _first_step(run: RunDirectory, number: int, default: int) -> int:
    for event in read_events(run.attempt(number) / "events.jsonl"):
        if event.get("event") in {"restored", "fresh"}:
            return int(event.get("step", 0))
    return default
