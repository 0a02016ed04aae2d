"""One rank's side of an attempt, from meeting the others to the last word."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import BudgetSpent, Interrupted
from hpc_resume.files import Clock, JsonObject
from hpc_resume.run import bucketorder, generators, numerics, openfiles
from hpc_resume.run.agreement import NOT_BEGUN
from hpc_resume.run.attempt import AttemptFacts, begin_attempt
from hpc_resume.run.configlog import ConfigLog, hyperparameters, read_changed
from hpc_resume.run.continuation import choose
from hpc_resume.run.datacheck import Hosting, RunData
from hpc_resume.run.deadline import Deadline, Pace, assumed_end_s
from hpc_resume.run.drifting import check_drift
from hpc_resume.run.ending import LastWord
from hpc_resume.run.fault import Faults, before_the_start
from hpc_resume.run.fitness import Fitness, describe_device
from hpc_resume.run.fixedbatch import fixed_batch
from hpc_resume.run.leaving import Leaving, Progress
from hpc_resume.run.memory import OomKills
from hpc_resume.run.metrics import Metrics
from hpc_resume.run.microbatches import Share
from hpc_resume.run.peers import join
from hpc_resume.run.probing import Function, Probing
from hpc_resume.run.restoring import Restored, restore_newest, tell
from hpc_resume.run.saving import Saver
from hpc_resume.run.stopping import Stopping
from hpc_resume.run.tracking.trackers import Trackers
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.connect import connect
from hpc_resume.scheduler.environment import JobEnvironment

#: Rank 0 notes its step in the journal at most this often.
_PROGRESS_S = 5.0


class Session:
    """What this process does for the run besides training.

    Parameters
    ----------
    config
        Settings.
    clock
        Unix time in seconds.

    Attributes
    ----------
    environment
        Job and rank.
    directory
        The run directory.
    facts
        Of the attempt, once :meth:`begin` has returned.
    leaving
        How this rank leaves; it also talks to people and to the journal.
    data
        What the run trains on.
    """

    def __init__(self, config: Config, *, clock: Clock) -> None:
        self.config = config
        self.directory = RunDirectory(config.run_directory())
        self.environment = JobEnvironment.detect(
            os.environ, hostname=socket.gethostname(), pid=os.getpid(), parent_pid=os.getppid()
        )
        self.rank = self.environment.rank
        self.world_size = self.environment.world_size
        self._progress = Progress()
        self.leaving = Leaving(self.environment, self._progress)
        self._clock = clock
        self._scheduler = connect(self.environment, os.environ)
        self.stopping = Stopping(
            self.environment,
            self._scheduler,
            warning_lead_s=config.warning_lead_s,
            agreement_s=config.stop.agreement_s,
            watchdog_s=config.stop.watchdog_s,
            clock=clock,
            give_up=self.leaving.give_up,
        )
        self.leaving.stopping = self.stopping
        self._oom_kills = OomKills.read()
        self._noted = 0.0
        #: What is set otherwise than when the restored checkpoint was taken: old and new value, by name.
        self.changed: dict[str, tuple[Any, Any]] = {}
        self.data = RunData(config)
        self.trackers = Trackers(self.leaving.say)
        self._probe: tuple[Function, tuple[Any, ...], str | None] | None = None

    @property
    def step(self) -> int:
        """Completed steps."""
        return self._progress.step

    @step.setter
    def step(self, step: int) -> None:
        self._progress.step = step

    @property
    def first_step(self) -> int:
        """Completed steps when this attempt began."""
        return self._progress.first_step

    # ---------------------------------------------------------------- beginning

    def begin(self, device: torch.device) -> None:
        """Meet the other ranks, claim an attempt, start the process group."""
        self.stopping.watch()
        openfiles.raise_limit()
        try:
            generators.seed_all(self.config.seed)
            self.peers, facts = join(self.environment, self.directory.root, self._claim)
            self.leaving.peers = self.peers
            self._know(AttemptFacts.from_json(facts))
            folder = self.directory.attempt(self.facts.number)
            faults = self.leaving.faults = Faults(self.environment, self.peers, folder, self._oom_kills)
            ranks = faults.meet()
            self.peers.failed = faults.any_known
            metrics = folder / f"metrics-rank-{self.rank:05d}.jsonl"
            self.metrics = Metrics(metrics, clock=self._clock, trackers=self.trackers)
            about = self.directory, self.facts, self.environment, self.peers, self.config
            self.saver = Saver(*about, self._clock, self.leaving.journal, self.leaving.say, faults.any_known)
            # What fails from here on ends the attempt as a crash does: the others are told.
            self.leaving.metrics, self.leaving.saver = self.metrics, self.saver
            self.leaving.note("met", ranks=ranks)
            assert self.leaving.last_word is not None
            if (why := self.leaving.last_word.leave_bad_nodes(ranks, self.peers)) is not None:
                self.leaving.part()
                raise Interrupted(why)
            if self.leaving.journal is not None and (how := self._continuation.prepare()):
                self.leaving.note("provided", how=how)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self.fitness = Fitness(
                self.config, self.environment, describe_device(device), self.facts.node_type
            )
            self.leaving.own_group = self.peers.start_process_group()
            self.stopping.join(self.peers, self.leaving.journal)
            self._pace = Pace(self.saver, warning_lead_s=self.config.warning_lead_s, clock=self._clock)
            if self.rank == 0:
                due, note = self.stopping.due, self.leaving.note
                end_s = assumed_end_s(self.environment, os.environ, self._clock(), self.config.time_limit_s)
                self.stopping.heed(Deadline(self._scheduler, self._pace, due, note, self._clock, end_s))
        except BaseException as error:
            if isinstance(error, Exception) and self.leaving.saver is not None:
                self.leaving.crash(error, None)
                raise
            self.stopping.abandon()
            verdict = before_the_start(error, self.environment.node)
            if verdict is not None and self.environment.job_id is not None:
                self.leaving.before_the_start(str(error), verdict)
            raise

    def _claim(self) -> dict[str, Any]:
        """On rank 0: claim the attempt, before the others hear of it."""
        facts, self.leaving.journal = begin_attempt(
            self.directory,
            self.environment,
            self._scheduler,
            self.config,
            nodes=[self.environment.node],
            clock=self._clock,
            say=self.leaving.say,
        )
        self._know(facts)
        return facts.to_json()

    def _know(self, facts: AttemptFacts) -> None:
        self.facts = facts
        # Should it end before it has restored anything: what the attempts before it have saved was not in vain.
        self._progress.first_step = facts.newest_step
        self._continuation = choose(self.config, self.environment, self._scheduler, self.directory)
        self.leaving.last_word = LastWord(
            self.environment,
            self._scheduler,
            self.config,
            self._continuation,
            clock=self._clock,
            journal=self.leaving.journal,
            facts=facts,
        )

    def probe(self, function: Function, batch: Any, device: torch.device) -> None:
        """Have a probe run before saves and after the restore; see ``Run.probe``."""
        digest: str | None = None
        arguments: tuple[Any, ...] = ()
        if batch is not None:
            about = self.directory, batch, self.peers
            digest, batch = fixed_batch(*about, rank=self.rank, device=device, say=self.leaving.say)
            arguments = (batch,)
        self._probe = function, arguments, digest

    def _probing(self, state: TrackedState) -> Probing | None:
        """Give the probe what it needs to know; None without one."""
        if self._probe is None or self.config.validation.probe == "never":
            return None
        return Probing(
            *self._probe,
            settings=self.config.validation,
            state=state,
            peers=self.peers,
            rank=self.rank,
            world_size=self.world_size,
            node_type=self.facts.node_type,
            precision=self.fitness.precision,
            say=self.leaving.say,
            note=self.leaving.note,
        )

    def restore(self, state: TrackedState, share: Share | None) -> None:
        """Restore the newest checkpoint that is whole."""
        self.breathe(None, 0, NOT_BEGUN)
        self.fitness.look_at(state, share, self.peers)
        self.saver.recorded = self.fitness.recorded()
        log = ConfigLog(run=self.directory, config=self.config)
        given = hyperparameters(state.items)
        probing = self.saver.probing = self._probing(state)
        computing: list[tuple[str, str]] = []
        restored = restore_newest(
            self.directory,
            state,
            self.peers,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            journal=self.leaving.journal,
            fits=self.fitness.problem,
            agrees=log.problem if self.rank == 0 else lambda _: None,
            validation=self.config.validation,
            computes=lambda manifest: computing.extend(self._compute_as(manifest)),
            probing=probing,
        )
        say, note = self.leaving.say, self.leaving.note
        tell(restored, self.facts.place(self.world_size), self.directory, say=say, note=note)
        for event, why in computing:
            say(why)
            note(event, why=why)
        self._record_numerics(state)
        if restored is None:
            self._progress.first_step = 0
            generators.seed_all(self.config.seed, 0, self.rank)
            if probing is not None:
                probing.try_out()
        else:
            self.step = self._progress.first_step = restored.manifest.step
            self.saver.restored(restored.manifest)
            about = self.directory, restored.manifest, self.facts, self.config, self.peers
            check_drift(*about, rank=self.rank, say=say, note=note)
            changed = log.settle(restored.manifest, state.items, given, say, note) if self.rank == 0 else None
            self.changed = read_changed(self.peers.share("changed", changed))
            for event, why in self.fitness.notes(restored.manifest):
                say(why)
                note(event, why=why)
        assert self.leaving.last_word is not None
        if (spent := self.leaving.last_word.why_spent(self.step)) is not None:
            raise BudgetSpent(
                f"{self.directory.root}: {spent}, all of which began at step {self.step}, so this attempt is not tried; read "
                "the log of the last attempt, and submit again when it is mended"
            )
        self.saver.recorded |= self._check_data(restored)
        self.peers.failed = None
        self.stopping.rest(self.step)

    def _check_data(self, restored: Restored | None) -> JsonObject:
        """Compare the data with that of the restored checkpoint; gives what checkpoints are to say of it."""
        hosting = Hosting(
            run=self.directory,
            attempt=self.facts.number,
            peers=self.peers,
            rank=self.rank,
            say=self.leaving.say,
            note=self.leaving.note,
            breathe=lambda: self.breathe(None, 0, NOT_BEGUN),
            clock=self._clock,
        )
        if restored is None:
            return self.data.check(None, "", hosting)
        place = f"checkpoint {restored.name}"
        return self.data.check(restored.manifest.environment, place, hosting)

    def _compute_as(self, manifest: Manifest) -> Iterator[tuple[str, str]]:
        """Compute as when a checkpoint was taken; gives what to tell of it."""
        return numerics.go_on(
            manifest.environment.get("numerics"), allowed=self.config.allow_precision_change
        )

    def _record_numerics(self, state: TrackedState) -> None:
        """Have DDP sum in one order, where bits matter, and checkpoints say how this attempt computes."""
        if torch.are_deterministic_algorithms_enabled():
            modules = (item for item in state.items.values() if isinstance(item, torch.nn.Module))
            for name in bucketorder.keep_order(modules):
                self.leaving.say(
                    f"deterministic: {name} has a communication hook of its own, so the first step of an attempt may "
                    "round otherwise than the same step of a run that was not interrupted"
                )
        mine = numerics.current() if self.rank == 0 else None
        self.saver.recorded["numerics"] = self.peers.share("numerics", mine)

    # ---------------------------------------------------------------- between steps

    def boundary(self, state: TrackedState, samples: int, until: int) -> None:
        """Do what is due after ``step`` steps: leave, saved, or return, and the next one has begun."""
        self._pace.step_ends()
        self.metrics.maybe_flush()
        self.saver.poll()
        every_steps = self.config.checkpoint.every_steps
        if every_steps and self.step % every_steps == 0 and self.first_step < self.step < until:
            self.save(state, samples, "cadence")
        if self.rank == 0:
            self._look_at_the_clock(until)
        if self.step >= until:
            return  # the last step is done: there is nothing left to continue
        while (appointment := self.stopping.boundary(self.step)) is not None:
            if appointment.kind == "save":
                self.save(state, samples, "cadence")
            else:
                self._stop(state, samples)
        self._pace.step_begins()

    def rest(self) -> None:
        """Take note that the step that was begun is not done: there are no more batches."""
        self._pace.step_ends(counts=False)
        self.stopping.rest(self.step)

    def breathe(self, state: TrackedState | None, samples: int, completed: int | None) -> None:
        """Stop, if that was asked for and can be done here: after so many steps, or inside of one (None)."""
        if self.stopping.breathe(completed):
            self.step = max(self.step, completed or 0)
            self._stop(state, samples)
        elif self.stopping.leaving:
            self._stop(None, samples)

    def _look_at_the_clock(self, until: int) -> None:
        now = self._clock()
        if now - self._noted >= _PROGRESS_S:
            self._noted = now
            self.leaving.note("progress", step=self.step)
        every_s = None if self.stopping.near else self.config.checkpoint.every_s
        if self.step < until and (self.saver.exhausted or (every_s is not None and self.saver.due(every_s))):
            self.stopping.request_save()

    def save(
        self,
        state: TrackedState,
        samples: int,
        reason: str,
        *,
        wait: bool = False,
        left_s: float | None = None,
    ) -> None:
        """Take a checkpoint of the completed steps, unless there is one; see :meth:`Saver.save`."""
        self.metrics.flush()
        self.trackers.flush()
        with self.stopping.life.while_saving():
            self.saver.save(state, self.step, samples, reason, wait=wait, left_s=left_s)

    # ---------------------------------------------------------------- ending

    def _stop(self, state: TrackedState | None, samples: int) -> NoReturn:
        """Save at the agreed step, or leave without a state; have the run continued."""
        self.leaving.note("stop_agreed", step=self.step)
        self.leaving.reached = True
        left_s = self.stopping.reached()
        if state is None:
            self.leaving.alone()
        elif self.step > self.first_step:
            self.save(state, samples, "stop", wait=True, left_s=left_s)
        self.leaving.stop(together=state is not None)

    def settle(self) -> None:
        """Write out what is still to be written."""
        self.metrics.flush()
        self.saver.poll()

    def finish(self) -> None:
        """Write that the run is done."""
        self.leaving.done()

    def exits(self, error: SystemExit) -> None:
        """Leave because of a ``sys.exit``: ours, or the script's, of which the other ranks are told."""
        faults = self.leaving.faults
        if faults is not None and not (self.leaving.reached or isinstance(error, Interrupted)):
            faults.exits(error.code, begun=self.step > self.first_step)
        self.leaving.shut_down(destroy=isinstance(error, Interrupted))

    def crash(self, error: Exception) -> None:
        """End an attempt that an exception has left: leave, or return if the exception shall go on its way."""
        self.leaving.crash(error, self.fitness.node_type)
