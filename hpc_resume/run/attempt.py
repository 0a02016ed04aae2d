"""The records of one attempt, kept by its rank 0: who we are, what happened, how it ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_resume import log
from hpc_resume.checkpoint.commit import claim_attempt, finish_earlier_commits
from hpc_resume.config import Config
from hpc_resume.files import DISK, Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.policy.retry import History
from hpc_resume.provenance.environment import describe_environment, essentials
from hpc_resume.provenance.running import describe_source, remark
from hpc_resume.run.configlog import ConfigLog, given_arguments, known_rollbacks
from hpc_resume.run.history import diagnoses, earlier_attempts, history
from hpc_resume.run.memory import OomKills
from hpc_resume.rundir import RunDirectory, checkpoint_step, sealed
from hpc_resume.scheduler.ancestors import deadly_signals
from hpc_resume.scheduler.base import Scheduler
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
    history
        What came before.
    described
        What checkpoints say of the environment and the source.
    newest_step
        Step of the newest checkpoint when it began; 0 without one.
    """

    number: int
    run_id: str
    node_type: str | None
    history: History
    described: JsonObject = field(default_factory=dict)
    newest_step: int = 0

    def to_json(self) -> JsonObject:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AttemptFacts:
        """Read :meth:`to_json`."""
        return cls(**{**record, "history": History.from_json(record["history"])})

    def place(self, world_size: int) -> str:
        """Say in words which attempt it is, and where."""
        nodes = f" ({self.node_type})" if self.node_type else ""
        return f"attempt {self.number} on {ranks_text(world_size)}{nodes}"


def _by_hand() -> bool:
    """Whether a person sits at it, in a notebook or a shell: nothing warns such a job."""
    return hasattr(sys, "ps1") or (sys.stdin is not None and sys.stdin.isatty())


def ranks_text(count: int) -> str:
    """Give a number of ranks in words."""
    return "1 rank" if count == 1 else f"{count} ranks"


def begin_attempt(
    run: RunDirectory,
    environment: JobEnvironment,
    scheduler: Scheduler,
    config: Config,
    *,
    nodes: list[str],
    clock: Clock,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[AttemptFacts, Journal]:
    """Claim the next attempt on rank 0, fence off earlier ones, and finish what they left ready to commit.

    What ended those that could not say so themselves is found out, and written down; and so is what a person has
    changed since: settings, the step to go on from.
    """
    identity = run.create(config.name, clock=clock)
    # Before the claim: it may take a second, and an attempt without a record looks like one that was killed.
    environment_record, source = describe_environment(), describe_source(run, os.environ)
    if told := remark(source):
        log.say(f"warning: {told}")
    if environment.kind == "slurm" and not _by_hand():
        for each in deadly_signals(os.getppid(), config.warning_signal, warning_lead_s=config.warning_lead_s):
            log.say(f"warning: {each}")
    number = claim_attempt(run)
    config.store(run)
    # The scheduler first: what the launcher says may be what was asked for before a requeue elsewhere.
    node_type = scheduler.node_type(environment.node) or environment.node_type
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
        **given_arguments(config),
        "environment": environment_record,
        "source": source,
    }
    DISK.write_file(run.attempt(number) / "attempt.json", sealed(record))
    journal = Journal(run.attempt(number) / "events.jsonl", clock=clock)
    journal.event("begun", oom_kills=OomKills.read().to_json())
    earlier = earlier_attempts(run, number)
    found = {}
    for which, verdict in diagnoses(run, earlier, environment, scheduler):
        found[which] = verdict
        journal.event(
            "diagnosed",
            attempt=which,
            cause=verdict.cause.value,
            evidence=verdict.evidence,
            nodes=list(verdict.nodes),
        )
    rollbacks = known_rollbacks(run, journal)
    ConfigLog(run=run, config=config).begin(earlier, rollbacks, record, journal, say)
    committed, refused = finish_earlier_commits(run)
    for name in committed:
        journal.event("finished_commit", checkpoint=name)
    for reason in refused:
        journal.event("unfinished_checkpoint", reason=reason)
    further_types = environment.node_type in [each.name for each in config.node_types[:-1]]
    facts = AttemptFacts(
        number=number,
        run_id=identity["run_id"],
        node_type=node_type,
        history=history(
            earlier,
            found,
            chain=environment.chain,
            further_types=further_types,
            rolled_back_after={each.after for each in rollbacks},
        ),
        described={
            **essentials(environment_record),
            **({"source": source["digest"]} if "digest" in source else {}),
        },
        newest_step=max(map(checkpoint_step, run.checkpoint_names()), default=0),
    )
    return facts, journal
