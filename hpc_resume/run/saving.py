"""Saving from inside the loop: every rank its shard, the last one the commit.

A periodic checkpoint stops training for one copy into the staging area; a thread writes it out while training
goes on. There is one staging area and one such thread: a checkpoint that is due while the one before is still
being written waits for it, so memory never grows.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint.manifest import FULL, MODEL, Manifest
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera, Captured, Snapshot
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.standin import substitute
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import HpcResumeError, RendezvousError, SaveError
from hpc_resume.files import Clock
from hpc_resume.journal import Journal
from hpc_resume.policy.saving import what_fits
from hpc_resume.provenance.environment import describe_environment
from hpc_resume.run import generators
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.environment import JobEnvironment

#: Other ranks may take this much longer over their shards.
_COMMIT_S = 3600.0
#: So often a rank that waits for a commit looks whether it can finish it itself.
_LOOK_S = 5.0
#: Ranks whose receipts have not come this long after ours count as dead, if others hold what they had.
_DEAD_AFTER_S = 30.0
#: So many failed saves in a row end the attempt.
_MAX_FAILURES = 3
#: Part of the memory that is free at the start that all staging areas of a node may take, unless it is set.
_HOST_MEMORY_PART = 0.25

#: Everything, but only what has changed is written.
CHANGED = "changed"


@dataclass(slots=True)
class _Pending:
    """A checkpoint that this rank has begun and that is not known to be committed."""

    details: dict[str, Any]
    began_s: float
    writing: Future[None] | None = None
    captured: Captured | None = None
    header: Header | None = None


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
    say
        Tells the person who reads the log.
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
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._facts = facts
        self._environment = environment
        self._peers = peers
        self._store = peers.connect()  # the writing thread's own: a store that waits is deaf to other threads
        self._config = config
        self._clock = clock
        self._journal = journal
        settings = config.checkpoint
        self._staging = Staging(
            run,
            facts.number,
            environment.rank,
            environment.node,
            threads=settings.threads,
            direct=settings.direct,
            longest_chain=settings.longest_chain,
            clock=clock,
        )
        self._camera = Camera(threads=settings.threads, limit_bytes=self._memory_limit())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="hpc-resume-save")
        self._described = describe_environment() if environment.rank == 0 else {}
        self._described = peers.share("environment", self._described)
        self._began = clock()
        self._pending: dict[int, _Pending] = {}
        self._failures = 0
        #: Step of the newest checkpoint that is committed or being written, and of the newest one that is
        #: committed, as far as this rank knows.
        self.saved_step = self.committed_step = 0

    def _memory_limit(self) -> int:
        """Bytes that the staging area of this rank may take."""
        if self._config.checkpoint.host_memory_gb is not None:
            return int(self._config.checkpoint.host_memory_gb * 1e9)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(free * _HOST_MEMORY_PART / self._environment.local_world_size)

    def restored(self, manifest: Manifest) -> None:
        """Take note of the checkpoint that this attempt goes on from, and of what saving it cost."""
        self.saved_step = self.committed_step = manifest.step
        costs = manifest.costs
        if costs.get("write_s") and costs.get("written_bytes"):
            written_bytes = costs["written_bytes"] // manifest.world_size
            self._staging.estimate.add(
                written_bytes=written_bytes, write_s=costs["write_s"], whole_s=costs["write_s"]
            )

    def due(self, every_s: float) -> bool:
        """Whether it is time for a periodic checkpoint; true once a period."""
        now = self._clock()
        if now - self._began < every_s:
            return False
        self._began = now
        return True

    def save(
        self,
        state: TrackedState,
        step: int,
        samples: int,
        reason: str,
        *,
        wait: bool = False,
        left_s: float | None = None,
    ) -> None:
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
        left_s
            On rank 0: seconds until the job is killed, if that is known; only looked at with ``wait``.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        SaveError
            If it, or one before it, could not be written.
        """
        concurrent.futures.wait([each.writing for each in self._pending.values() if each.writing is not None])
        if wait:
            for pending in sorted(self._pending):
                self._settle(pending)
        if step > self.saved_step:
            self._take(state, step, samples, reason, wait=wait, left_s=left_s)
        if wait:
            for pending in sorted(self._pending):
                self._settle(pending, last=True)

    def _take(
        self,
        state: TrackedState,
        step: int,
        samples: int,
        reason: str,
        *,
        wait: bool,
        left_s: float | None,
    ) -> None:
        began = self._clock()
        captured = state.capture(generators.capture())
        content, note = FULL, ""
        if wait:
            content, note = self._choose(captured, step, state.modules, left_s)
            if content == MODEL:
                captured = state.capture({}, state.modules)
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
            content=MODEL if content == MODEL else FULL,
            note=note,
        )
        stage = self._config.checkpoint.asynchronous and not wait and self._camera.may_stage(captured)
        snapshot = self._camera.take(captured, stage=stage)
        pending = _Pending(details={"reason": reason}, began_s=time.monotonic())
        if content == MODEL:
            pending.details.update(content=MODEL, note=note)
        self._pending[step] = pending
        self.saved_step = step
        if stage:
            pending.writing = self._background.submit(self._write, header, snapshot, False)
        else:
            pending.captured, pending.header = captured, header
            self._write(header, snapshot, content == CHANGED)
        self._began = self._clock()
        pending.details["blocked_s"] = round(self._began - began, 4)

    def _choose(
        self, captured: Captured, step: int, modules: tuple[str, ...], left_s: float | None
    ) -> tuple[str, str]:
        """Decide, all ranks alike, what of the state still fits; rank 0 knows."""
        choice = None
        if self._environment.rank == 0:
            prefixes = tuple(f"{key}/" for key in modules)
            sizes = {FULL: sum(piece.length for piece in captured.pieces)}
            if self._staging.last_changed_bytes is not None:
                sizes[CHANGED] = self._staging.last_changed_bytes
            sizes[MODEL] = sum(piece.length for piece in captured.pieces if piece.name.startswith(prefixes))
            choice = what_fits(left_s, sizes, self._staging.estimate)
        content, note = self._peers.share(f"content/{step}", choice)
        return content, note

    def poll(self) -> None:
        """Note checkpoints that have been committed meanwhile, or that have failed."""
        for step in sorted(self._pending):
            writing = self._pending[step].writing
            if writing is not None and not writing.done():
                return
            if not self._peers.store.check([f"committed/{step}"]):
                return
            self._settle(step)

    def drain(self, patience_s: float) -> None:
        """Give a checkpoint that is being written the time to be committed; for an attempt that is failing."""
        writing = [each.writing for each in self._pending.values() if each.writing is not None]
        concurrent.futures.wait(writing, patience_s)
        with contextlib.suppress(HpcResumeError, RuntimeError, OSError):  # something worse is on its way
            self.poll()

    def close(self) -> None:
        """End the threads."""
        self._background.shutdown(wait=False, cancel_futures=True)
        self._camera.close()

    def _write(self, header: Header, snapshot: Snapshot, only_changed: bool) -> None:
        """Write this rank's part, and commit if it is the last one; on the background thread or not."""
        try:
            self._staging.write(header, snapshot, only_changed=only_changed)
            if self._store.add(f"receipts/{header.step}", 1) == self._environment.world_size:
                self._commit(header.step)
        except (OSError, RuntimeError, HpcResumeError) as error:
            self._publish_failure(header.step, error)
            if isinstance(error, HpcResumeError) and not isinstance(error, SaveError | RendezvousError):
                raise  # fenced off: nothing that a later save could mend

    def _publish_failure(self, step: int, error: Exception) -> None:
        message = f"rank {self._environment.rank} on {self._environment.node}: {error}"
        try:
            self._store.set(f"committed/{step}", json.dumps({"error": message}))
        except RuntimeError:
            return  # the store is gone with rank 0; who waits for this key will notice

    def _commit(self, step: int) -> str:
        name = self._staging.commit(step)
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0; the folder says it, too
            self._store.set(f"committed/{step}", json.dumps({"name": name}))
        return name

    def _settle(self, step: int, *, last: bool = False) -> None:
        """Wait until a checkpoint is committed, and write it down."""
        pending = self._pending[step]
        if pending.writing is not None:
            pending.writing.result()
        outcome = self._outcome(step, pending)
        del self._pending[step]
        if "error" in outcome:
            self._failed(step, outcome["error"], last=last)
            return
        self._failures = 0
        self.committed_step = max(self.committed_step, step)
        self._staging.committed(step, outcome["name"])
        if self._journal is not None:
            self._journal.event(
                "saved", durable=True, checkpoint=outcome["name"], step=step, **pending.details
            )

    def _failed(self, step: int, why: str, *, last: bool) -> None:
        """Report a save that has failed; training goes on unless it was the last chance."""
        self._failures += 1
        self.saved_step = max([self.committed_step, *self._pending])
        if self._journal is not None:
            self._journal.event("save_failed", durable=True, step=step, why=why)
        if last or self._failures >= _MAX_FAILURES:
            times = "" if self._failures == 1 else f", {self._failures} saves in a row have failed"
            raise SaveError(f"the checkpoint of step {step} was not committed: {why}{times}")
        self._say(
            f"the checkpoint of step {step} FAILED and is not there: {why}; training goes on, and the last "
            f"checkpoint is of step {self.committed_step}"
        )

    def _outcome(self, step: int, pending: _Pending) -> dict[str, Any]:
        """Wait for what becomes of a checkpoint; finishes it in the place of ranks that have died."""
        while True:
            waited_s = time.monotonic() - pending.began_s
            try:
                outcome: dict[str, Any] = self._peers.get(f"committed/{step}", _LOOK_S)
            except RendezvousError:
                if waited_s > _COMMIT_S:
                    raise
            else:
                return outcome
            missing = self._staging.missing(step)
            if missing and waited_s > _DEAD_AFTER_S:
                self._stand_in(pending, missing)
                missing = self._staging.missing(step)
            if not missing:
                return {"name": self._commit(step)}

    def _stand_in(self, pending: _Pending, missing: list[int]) -> None:
        """Write the shards of dead ranks, as far as this rank holds what they had."""
        if pending.captured is None or pending.header is None:
            return  # the live state has moved on
        for rank in missing:
            part = substitute(pending.captured, rank, own_rank=self._environment.rank)
            if part is not None:
                snapshot = Camera(threads=self._config.checkpoint.threads).take(part, stage=False)
                self._staging.write(pending.header, snapshot, rank=rank)
