"""Saving from inside the loop: every rank its shard, the last one the commit."""

from __future__ import annotations

import json

from hpc_resume.checkpoint.commit import Staging
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import HpcResumeError, SaveError
from hpc_resume.files import Clock
from hpc_resume.journal import Journal
from hpc_resume.provenance.environment import describe_environment
from hpc_resume.run import generators
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.environment import JobEnvironment

#: Other ranks may take this much longer over their shards.
_COMMIT_S = 3600.0


class Saver:
    """Takes checkpoints on one rank.

    No rank waits for another: each writes its shard and receipt and counts itself in, and the one that
    counts in last commits. Only a rank that is about to leave waits for the commit.

    Parameters
    ----------
    run
        The run directory.
    facts
        Of this attempt.
    environment
        This process's place.
    peers
        The other ranks.
    config
        Of the run.
    clock
        Unix time in seconds.
    journal
        On rank 0.
    """

    def __init__(
        self,
        run: RunDirectory,
        facts: AttemptFacts,
        environment: JobEnvironment,
        peers: Peers,
        config: Config,
        clock: Clock,
        journal: Journal | None,
    ) -> None:
        self._facts = facts
        self._environment = environment
        self._peers = peers
        self._config = config
        self._clock = clock
        self._journal = journal
        self._staging = Staging(
            run,
            facts.number,
            environment.rank,
            environment.node,
            threads=config.checkpoint.threads,
            clock=clock,
        )
        self._described = describe_environment() if environment.rank == 0 else {}
        self._described = peers.share("environment", self._described)
        self._began = clock()
        self._uncommitted: dict[int, dict[str, object]] = {}
        #: Step of the newest checkpoint that this rank has written its part of, or restored.
        self.saved_step = 0

    def due(self, every_s: float) -> bool:
        """Whether it is time for a periodic checkpoint; true once a period."""
        now = self._clock()
        if now - self._began < every_s:
            return False
        self._began = now
        return True

    def save(self, state: TrackedState, step: int, samples: int, reason: str, *, wait: bool = False) -> None:
        """Take a checkpoint, unless this step has one.

        Parameters
        ----------
        state
            What to save.
        step, samples
            Completed steps, samples consumed over all ranks.
        reason
            ``"cadence"``, ``"stop"`` or ``"done"``.
        wait
            Return only when it is committed.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        OSError
            If the filesystem refuses.
        """
        if step > self.saved_step:
            began = self._clock()
            try:
                self._write(state, step, samples, reason)
            except (OSError, HpcResumeError) as error:
                message = f"rank {self._environment.rank} on {self._environment.node}: {error}"
                self._peers.store.set(f"committed/{step}", json.dumps({"error": message}))
                raise
            self.saved_step = step
            self._began = self._clock()
            blocked_s = round(self._began - began, 4)
            self._uncommitted[step] = {"reason": reason, "blocked_s": blocked_s}
        if wait:
            for pending in sorted(self._uncommitted):
                self._settle(pending)

    def poll(self) -> None:
        """Note checkpoints that have been committed meanwhile."""
        for step in sorted(self._uncommitted):
            if not self._peers.store.check([f"committed/{step}"]):
                return
            self._settle(step)

    def _write(self, state: TrackedState, step: int, samples: int, reason: str) -> None:
        header = Header(
            run_id=self._facts.run_id,
            attempt=self._facts.number,
            step=step,
            samples=samples,
            reason=reason,
            world_size=self._environment.world_size,
            node_type=self._facts.node_type,
            config=self._config.digest(),
            environment=self._described,
        )
        captured = state.capture(generators.capture())
        self._staging.write(header, captured.pieces, captured.objects)
        if self._peers.store.add(f"receipts/{step}", 1) == self._environment.world_size:
            name = self._staging.commit(step)
            self._peers.store.set(f"committed/{step}", json.dumps({"name": name}))

    def _settle(self, step: int) -> None:
        outcome = self._peers.get(f"committed/{step}", _COMMIT_S)
        details = self._uncommitted.pop(step)
        if "error" in outcome:
            raise SaveError(f"the checkpoint of step {step} was not committed: {outcome['error']}")
        if self._journal is not None:
            self._journal.event("saved", durable=True, checkpoint=outcome["name"], step=step, **details)
