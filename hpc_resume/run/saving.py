"""Saving from inside the loop: every rank its shard, the last one the commit.

A periodic checkpoint stops training for one copy into the staging area; a thread writes it out while training
goes on. There is one staging area and one such thread: a checkpoint that is due while the one before is still
being written waits for it, so memory never grows.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hpc_resume.checkpoint.health import Known
from hpc_resume.checkpoint.manifest import FULL, MODEL, Manifest
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera, Captured, Snapshot
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import FencedError, HpcResumeError, RendezvousError, SaveError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.policy.saving import told_s, what_fits
from hpc_resume.run import generators
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.outcome import Outcomes, Part
from hpc_resume.run.peers import Peers
from hpc_resume.run.probing import Probing
from hpc_resume.run.soundness import Soundness
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.environment import JobEnvironment

#: So many failed saves in a row end the attempt.
_MAX_FAILURES = 3
#: So many of the newest saves tell how long one takes.
_TELLING_SAVES = 20
#: Part of the memory that is free at the start that all staging areas of a node may take, unless it is set.
_HOST_MEMORY_PART = 0.25

#: Everything, but only what has changed is written.
CHANGED = "changed"


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
    failed
        Whether a rank is known to have failed.
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
        failed: Callable[[], bool],
    ) -> None:
        self._say = say
        self._facts = facts
        self._environment = environment
        self._peers = peers
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
        self._began = clock()
        self._outcomes = Outcomes(
            peers,
            peers.apart(),
            self._staging,
            environment,
            dead_after_s=settings.dead_after_s,
            threads=settings.threads,
            failed=failed,
        )
        #: What checkpoints say of this attempt besides; the same on all ranks.
        self.recorded: JsonObject = {}
        #: The probe that runs before saves, if there is one.
        self.probing: Probing | None = None
        self._soundness = Soundness(config.validation, say=say, journal=journal)
        self._pending: dict[int, Part] = {}
        self._taken = self._failures = 0
        self._last_failure = 0, ""
        #: Step of the newest checkpoint that is committed or being written, and of the newest one that is
        #: committed, as far as this rank knows.
        self.saved_step = self.committed_step = 0
        #: What saves took until they were committed, and the Unix time of the state that the newest one holds.
        self.saves_s: tuple[float, ...] = ()
        self.held_at_s = clock()

    def _memory_limit(self) -> int:
        """Bytes that the staging area of this rank may take."""
        if self._config.checkpoint.host_memory_gb is not None:
            return int(self._config.checkpoint.host_memory_gb * 1e9)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(free * _HOST_MEMORY_PART / self._environment.local_world_size)

    def restored(self, manifest: Manifest) -> None:
        """Take note of the checkpoint that this attempt goes on from, and of what saving it cost."""
        self.saved_step = self.committed_step = manifest.step
        self._soundness.restored(manifest.health)
        costs = manifest.costs
        self.held_at_s = self._clock()
        self.saves_s = told_s(costs)
        if costs.get("write_s") and costs.get("written_bytes"):
            self._staging.estimate.add(
                written_bytes=costs["written_bytes"] // manifest.world_size,
                state_bytes=costs.get("state_bytes", 0) // manifest.world_size,
                write_s=costs["write_s"],
                whole_s=costs["write_s"],
            )

    @property
    def exhausted(self) -> bool:
        """Whether so many saves in a row have failed, or are of no use, that the next :meth:`save` ends the attempt."""
        return self._failures >= _MAX_FAILURES or self._soundness.lost

    @property
    def pending(self) -> bool:
        """Whether it is not known yet what has become of a checkpoint."""
        return bool(self._pending)

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
        NonFiniteError
            If what is trained is lost.
        """
        began = self._clock()
        began_s = time.monotonic()
        concurrent.futures.wait([each.writing for each in self._pending.values() if each.writing is not None])
        deadline_s = None if left_s is None else time.monotonic() + left_s
        for pending in sorted(self._pending):
            self._settle(pending, leaving=wait, left_s=left_s)
        self._soundness.check()
        if self.exhausted:  # told by what all ranks have settled: all end here
            raise SaveError(
                f"{self._failures} checkpoints in a row were not committed, the last one of step "
                f"{self._last_failure[0]}: {self._last_failure[1]}"
            )
        if step > self.saved_step:
            if deadline_s is not None:
                left_s = max(deadline_s - time.monotonic(), 0.0)
            part = Part(number=self._taken, began_s=began_s, at_s=began, details={"reason": reason})
            part.known = Known(usual=self._soundness.usual, factor=self._config.validation.norm_factor)
            left_s = self._take(part, state, step, samples, wait=wait, left_s=left_s)
        if wait:
            for pending in sorted(self._pending):
                self._settle(pending, leaving=True, left_s=left_s, last=True)
            self._soundness.check()

    def _take(
        self,
        part: Part,
        state: TrackedState,
        step: int,
        samples: int,
        *,
        wait: bool,
        left_s: float | None,
    ) -> float | None:
        """Capture the state and write it or have it written; returns the seconds left, as rank 0 knows them."""
        if self.probing is not None:
            left_s = self.probing.before_save(part, last=wait, left_s=left_s, saves_s=self.saves_s)
        captured = state.capture(generators.capture())
        content, note = FULL, ""
        if wait:
            content, note, left_s = self._choose(captured, state.modules, left_s)
            if content == MODEL:
                captured = state.capture({}, state.modules)
        header = Header(
            run_id=self._facts.run_id,
            attempt=self._facts.number,
            step=step,
            samples=samples,
            reason=part.details["reason"],
            world_size=self._environment.world_size,
            node_type=self._facts.node_type,
            config=self._config.digest(),
            environment={**self._facts.described, **self.recorded},
            content=MODEL if content == MODEL else FULL,
            note=note,
        )
        stage = self._config.checkpoint.asynchronous and not wait and self._camera.may_stage(captured)
        snapshot = self._camera.take(captured, stage=stage)
        self._taken += 1  # all ranks take the same ones, in the same order
        if content == MODEL:
            part.details.update(content=MODEL, note=note)
        self._pending[step] = part
        self.saved_step = step
        if stage:
            part.writing = self._background.submit(self._write, header, snapshot, part, False)
        else:
            if wait:  # else the live state moves on
                part.captured, part.header = captured, header
            self._write(header, snapshot, part, content == CHANGED)
        self._began = self._clock()
        part.details["blocked_s"] = round(self._began - part.at_s, 4)
        return left_s

    def _choose(
        self, captured: Captured, modules: tuple[str, ...], left_s: float | None
    ) -> tuple[str, str, float | None]:
        """Decide, all ranks alike, what of the state still fits, and in how many seconds; rank 0 knows."""
        key = f"content/{self._taken}"
        choice: list[Any] = [FULL, "", left_s]
        if self._environment.rank == 0:
            prefixes = tuple(f"{key}/" for key in modules)
            size_bytes = sum(piece.length for piece in captured.pieces)
            model_bytes = sum(piece.length for piece in captured.pieces if piece.name.startswith(prefixes))
            estimate = self._staging.estimate
            needs_s = {FULL: estimate.seconds(size_bytes)}
            changed_bytes = self._staging.last_changed_bytes
            if changed_bytes is not None:
                needs_s[CHANGED] = estimate.seconds(changed_bytes, looked_at_bytes=size_bytes)
            needs_s[MODEL] = estimate.seconds(model_bytes)
            content, note = what_fits(left_s, needs_s)
            choice = [content, note if content == MODEL else "", left_s]
        else:
            with contextlib.suppress(RendezvousError):
                choice = self._peers.get(key, self._config.checkpoint.dead_after_s)
        with contextlib.suppress(RendezvousError):
            choice = self._peers.settle(key, choice)
        # Without a word from rank 0 it is gone, and others may hold what it had.
        content, note, left_s = choice
        return content, note, left_s

    def poll(self) -> None:
        """Note checkpoints that have been committed meanwhile, or that have failed."""
        for step in sorted(self._pending):
            part = self._pending[step]
            if part.writing is not None and not part.writing.done():
                return
            if not self._outcomes.known(part):
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

    def _write(self, header: Header, snapshot: Snapshot, part: Part, only_changed: bool) -> None:
        """Write this rank's part, and commit if it is the last one; on the background thread or not."""
        began = time.monotonic()
        try:
            receipt = self._staging.write(header, snapshot, only_changed=only_changed, known=part.known)
            part.own_s = time.monotonic() - began
            if receipt is not None:
                self._outcomes.count_in(header.step, part)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self._outcomes.fail(part, error)
            if isinstance(error, FencedError):
                raise  # nothing that a later save could mend
        finally:
            part.done_s = time.monotonic()

    def _settle(
        self, step: int, *, leaving: bool = False, left_s: float | None = None, last: bool = False
    ) -> None:
        """Wait until a checkpoint is committed, and write it down."""
        part = self._pending[step]
        if part.writing is not None:
            part.writing.result()
        outcome = self._outcomes.wait(step, part, left_s=left_s, last=leaving)
        del self._pending[step]
        if "error" in outcome:
            self._failed(step, outcome["error"], last=last)
            return
        self._failures = 0
        sound = self._soundness.take_note(step, outcome.get("health") or {})
        if sound:
            self.committed_step = max(self.committed_step, step)
            self.held_at_s = part.at_s
        if "took_s" in outcome:
            part.details["took_s"] = outcome["took_s"]
            self.saves_s = (*self.saves_s, outcome["took_s"])[-_TELLING_SAVES:]
        self._staging.committed(step, outcome["name"])
        if self._journal is not None:
            self._journal.event("saved", durable=True, checkpoint=outcome["name"], step=step, **part.details)

    def _failed(self, step: int, why: str, *, last: bool) -> None:
        """Report a save that has failed; training goes on unless it was the last chance."""
        self._failures += 1
        self._last_failure = step, why
        self.saved_step = max([self.committed_step, *self._pending])
        if self._journal is not None:
            self._journal.event("save_failed", durable=True, step=step, why=why)
        if last:
            times = "" if self._failures == 1 else f"; {self._failures} saves in a row have failed"
            raise SaveError(f"the checkpoint of step {step} was not committed: {why}{times}")
        self._staging.discard(step)  # a full disk gets no emptier by what nobody will ever read
        self._say(
            f"the checkpoint of step {step} FAILED and is not there: {why}; training goes on, and the last "
            f"checkpoint is of step {self.committed_step}"
        )
