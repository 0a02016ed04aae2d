"""One rank's side of an attempt, from meeting the others to the last word."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import (
    EXIT_CONTINUE,
    BudgetSpent,
    Declined,
    HpcResumeError,
    Interrupted,
    RendezvousError,
    SaveError,
)
from hpc_resume.files import Clock
from hpc_resume.journal import Journal
from hpc_resume.run import generators
from hpc_resume.run.agreement import NOT_BEGUN
from hpc_resume.run.attempt import AttemptFacts, begin_attempt
from hpc_resume.run.continuation import choose
from hpc_resume.run.deadline import Deadline, Pace, assumed_end_s
from hpc_resume.run.ending import Ending, LastWord
from hpc_resume.run.fault import Faults, before_the_start, lost_a_peer, summary
from hpc_resume.run.fitness import Fitness, describe_device
from hpc_resume.run.memory import OomKills
from hpc_resume.run.metrics import Metrics
from hpc_resume.run.microbatches import Share
from hpc_resume.run.peers import join
from hpc_resume.run.restoring import restore_newest, tell
from hpc_resume.run.saving import Saver
from hpc_resume.run.stopping import Stopping
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.connect import connect
from hpc_resume.scheduler.environment import JobEnvironment

#: Rank 0 notes its step in the journal at most this often.
_PROGRESS_S = 5.0
#: Ranks that leave wait this long for rank 0's last word, which may take a few tries of the scheduler.
_LEAVE_S = 90.0
#: A crashed attempt lets a checkpoint that is being written be finished for so long.
_DRAIN_S = 60.0
#: A rank that gives up leaves rank 0 this long for its last word: once it exits, the launcher ends the rest.
_HEAD_START_S = 10.0


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
    step, first_step
        Completed steps, now and when this attempt began.
    """

    def __init__(self, config: Config, *, clock: Clock) -> None:
        self.config = config
        self.directory = RunDirectory(config.run_directory())
        self.environment = JobEnvironment.detect(
            os.environ, hostname=socket.gethostname(), pid=os.getpid(), parent_pid=os.getppid()
        )
        self.rank = self.environment.rank
        self.world_size = self.environment.world_size
        self.step = 0
        self.first_step = 0
        self._clock = clock
        self._scheduler = connect(self.environment, os.environ)
        self.stopping = Stopping(
            self.environment,
            self._scheduler,
            warning_lead_s=config.warning_lead_s,
            agreement_s=config.stop.agreement_s,
            watchdog_s=config.stop.watchdog_s,
            clock=clock,
            give_up=self._give_up,
        )
        self._journal: Journal | None = None
        self._last_word: LastWord | None = None
        self._oom_kills = OomKills.read()
        self._faults: Faults | None = None
        self._reached = False
        #: Held, for good, by who has the last word: the loop, a crash, or the watchdog.
        self._ending = threading.Lock()
        self._own_group = False
        self._noted = 0.0

    # ---------------------------------------------------------------- beginning

    def begin(self, device: torch.device) -> None:
        """Meet the other ranks, claim an attempt, start the process group."""
        self.stopping.watch()
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            generators.seed_all(self.config.seed)
            self.peers, facts = join(self.environment, self.directory.root, self._claim)
            self._know(AttemptFacts.from_json(facts))
            folder = self.directory.attempt(self.facts.number)
            self._faults = Faults(self.environment, self.peers, folder, self._oom_kills)
            ranks = self._faults.meet()
            self._note("met", ranks=ranks)
            assert self._last_word is not None
            if (why := self._last_word.leave_bad_nodes(ranks, self.peers)) is not None:
                self._part()
                raise Interrupted(why)
            if self._journal is not None and (how := self._continuation.prepare()):
                self._note("provided", how=how)
            self.fitness = Fitness(
                self.config, self.environment, describe_device(device), self.facts.node_type
            )
            self._own_group = self.peers.start_process_group()
            self.stopping.join(self.peers, self._journal)
            self.metrics = Metrics(folder / f"metrics-rank-{self.rank:05d}.jsonl", clock=self._clock)
            about = self.directory, self.facts, self.environment, self.peers, self.config
            self.saver = Saver(*about, self._clock, self._journal, self.say)
            self._pace = Pace(self.saver, warning_lead_s=self.config.warning_lead_s, clock=self._clock)
            if self.rank == 0:
                due, note = self.stopping.due, self._note
                end_s = assumed_end_s(self.environment, os.environ, self._clock(), self.config.time_limit_s)
                self.stopping.heed(Deadline(self._scheduler, self._pace, due, note, self._clock, end_s))
        except BaseException as error:
            self.stopping.abandon()
            verdict = before_the_start(error)
            if verdict is not None and self.environment.job_id is not None:
                sys.stderr.write(f"hpc_resume: {error}\n")
                if self.rank == 0 and self._last_word is not None:
                    ending = self._end(verdict)
                    if ending.decision == "stop":
                        raise SystemExit(ending.exit_code) from None
                raise Interrupted(str(error)) from None  # another allocation may have better luck
            raise

    def _claim(self) -> dict[str, Any]:
        """On rank 0: claim the attempt, before the others hear of it."""
        facts, self._journal = begin_attempt(
            self.directory,
            self.environment,
            self._scheduler,
            self.config,
            nodes=[self.environment.node],
            clock=self._clock,
        )
        self._know(facts)
        return facts.to_json()

    def _know(self, facts: AttemptFacts) -> None:
        self.facts = facts
        self._continuation = choose(self.config, self.environment, self._scheduler, self.directory)
        self._last_word = LastWord(
            self.environment,
            self._scheduler,
            self.config,
            self._continuation,
            clock=self._clock,
            journal=self._journal,
            facts=facts,
        )

    def restore(self, state: TrackedState, share: Share | None) -> None:
        """Restore the newest checkpoint that is whole."""
        self.breathe(None, 0, NOT_BEGUN)
        self.fitness.look_at(state, share, self.peers)
        self.saver.recorded = self.fitness.recorded()
        restored = restore_newest(
            self.directory,
            state,
            self.peers,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.config.seed,
            journal=self._journal,
            fits=self.fitness.problem,
        )
        tell(restored, self.facts.place(self.world_size), self.directory, say=self.say, note=self._note)
        if restored is None:
            generators.seed_all(self.config.seed, 0, self.rank)
        else:
            self.step = self.first_step = restored.manifest.step
            self.saver.restored(restored.manifest)
            for event, why in self.fitness.notes(restored.manifest):
                self.say(why)
                self._note(event, why=why)
        assert self._last_word is not None
        if (spent := self._last_word.why_spent(self.step)) is not None:
            raise BudgetSpent(
                f"{self.directory.root}: {spent}, all of which began at step {self.step}, so this attempt is not tried; read "
                "the log of the last attempt, and submit again when it is mended"
            )
        self.stopping.rest(self.step)

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
            self._note("progress", step=self.step)
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
        self.saver.save(state, self.step, samples, reason, wait=wait, left_s=left_s)

    # ---------------------------------------------------------------- ending

    def _stop(self, state: TrackedState | None, samples: int) -> NoReturn:
        """Save at the agreed step, or leave without a state; have the run continued."""
        self._reached = True
        self._note("stop_agreed", step=self.step)
        left_s = self.stopping.reached()
        if state is None:
            self.stopping.leave()  # the others wait for this rank in vain
            self._own_group = False  # not to be destroyed without them
        elif self.step > self.first_step:
            self.save(state, samples, "stop", wait=True, left_s=left_s)
        if self.rank == 0:
            self._ending.acquire()
            ending = self.peers.share("ending", self._end(self.stopping.verdict()).to_json())
        else:
            ending = self.peers.get("ending", _LEAVE_S)
            self._ending.acquire()  # not before: without an answer it ends as a crash does
        self.say(f"attempt {self.facts.number} ends after step {self.step}: {ending['why']}")
        self._part() if state is not None or self._faults is None else self._faults.leave()
        self.stopping.close(last_word=True)
        if ending["exit_code"] == EXIT_CONTINUE:
            raise Interrupted(ending["why"])
        raise SystemExit(ending["exit_code"])

    def finish(self) -> None:
        """Write that the run is done."""
        self.metrics.flush()
        self.saver.poll()
        assert self._last_word is not None
        self._last_word.note(Cause.DONE, "done", "all steps are done", step=self.step, exit_code=0)
        self.say(f"done: step {self.step}")
        self._part()
        self.stopping.close(last_word=False)
        self.shut_down(destroy=True)

    def _part(self) -> None:
        """Read nothing more from the control store; rank 0, which keeps it, stays until all have come here."""
        with contextlib.suppress(RuntimeError):  # rank 0 has waited long enough, and left
            self.peers.store.add("left", 1)
            if self.rank == 0:
                self.peers.wait_for_count("left", self.world_size, _HEAD_START_S)

    def crash(self, error: Exception) -> None:
        """End an attempt that an exception has left: leave, or return if the exception shall go on its way."""
        with contextlib.suppress(Exception):  # reading a tensor of a GPU that has failed fails, too
            self.metrics.flush()
        assert self._faults is not None
        assert self._last_word is not None
        if isinstance(error, Declined) and self.environment.job_id is not None:
            self._ending.acquire()  # all ranks come here together
            about = self.fitness.node_type, self.peers
            code, why = self._last_word.decline(str(error), *about, step=self.step)
            self.say(why)
            self._part()
            self.stopping.abandon(last_word=True)
            self.shut_down(destroy=False)
            raise (Interrupted(why) if code == EXIT_CONTINUE else SystemExit(code)) from None
        fault = self._faults.of(error, begun=self.step > self.first_step)
        self.saver.drain(_DRAIN_S)
        self._ending.acquire()
        if self.stopping.leaving and lost_a_peer(error):  # one that has left, as this one was to
            fault = dataclasses.replace(fault, cause=self.stopping.verdict().cause, nodes=())
        code = self._last_word.fail(
            fault, first_step=self.first_step, step=self.step, progressed=self._progressed
        )
        self._faults.leave()
        self.stopping.abandon(last_word=True)
        self.shut_down(destroy=False)
        if code == EXIT_CONTINUE:
            traceback.print_exception(error)
            raise Interrupted(f"crashed and is continued: {summary(error)}") from None
        if isinstance(error, HpcResumeError) and not isinstance(error, RendezvousError | SaveError):
            sys.stderr.write(f"hpc_resume: {error}\n")
            raise SystemExit(code) from None

    def cancel(self) -> None:
        """End an attempt that somebody broke off at the keyboard, in a hurry."""
        assert self._last_word is not None
        why = "interrupted from the keyboard"
        self._last_word.note(Cause.CANCEL, "stop", why, step=self.step, exit_code=130)
        self.stopping.abandon()
        self.shut_down(destroy=False)

    def shut_down(self, *, destroy: bool) -> None:
        """Close what is open; ``destroy`` only where all ranks come here together."""
        if destroy and self._own_group and dist.is_initialized():
            dist.destroy_process_group()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @property
    def _progressed(self) -> bool:
        return hasattr(self, "saver") and self.saver.committed_step > self.first_step

    def _end(self, verdict: Verdict) -> Ending:
        assert self._last_word is not None
        return self._last_word.end(
            verdict, first_step=self.first_step, step=self.step, progressed=self._progressed
        )

    def _give_up(self, verdict: Verdict, reason: str) -> None:
        """Leave without a step boundary, on a thread: the last committed checkpoint is what remains."""
        if not self._ending.acquire(blocking=False):
            return  # it ends by another way
        code = EXIT_CONTINUE
        self.say(f"{reason}; leaving, and what was saved before remains")
        if self.rank != 0:
            threading.Event().wait(_HEAD_START_S)
        elif self._last_word is not None:
            if self._faults is not None:
                no_hang = self._reached or self.stopping.leaving
                verdict = self._faults.behind(verdict, reason, no_hang=no_hang)
            code = self._end(verdict).exit_code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _note(self, event: str, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.event(event, **fields)

    def say(self, text: str) -> None:
        """Talk to the person who reads the log; rank 0 only."""
        if self.rank == 0:
            sys.stderr.write(f"hpc_resume: {text}\n")
            sys.stderr.flush()
