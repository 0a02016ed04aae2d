"""How one rank leaves an attempt: done, stopped, crashed, broken off at the keyboard, or given up on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from typing import Any, NoReturn

import torch.distributed as dist

from hpc_resume import log
from hpc_resume.errors import (
    EXIT_CONTINUE,
    Declined,
    HpcResumeError,
    Interrupted,
    RendezvousError,
    SaveError,
)
from hpc_resume.journal import Journal
from hpc_resume.run.ending import Ending, LastWord
from hpc_resume.run.fault import Faults, lost_a_peer, summary
from hpc_resume.run.metrics import Metrics
from hpc_resume.run.peers import Peers
from hpc_resume.run.saving import Saver
from hpc_resume.run.stopping import Stopping
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.settings import NodeType

#: Ranks that leave wait this long for rank 0's last word, which may take a few tries of the scheduler.
_LEAVE_S = 90.0
#: A crashed attempt lets a checkpoint that is being written be finished for so long.
_DRAIN_S = 60.0
#: A rank that gives up leaves rank 0 this long for its last word: once it exits, the launcher ends the rest.
_HEAD_START_S = 10.0


@dataclasses.dataclass(slots=True)
class Progress:
    """Where training stands on this rank.

    Parameters
    ----------
    step, first_step
        Completed steps, now and when this attempt began.
    """

    step: int = 0
    first_step: int = 0


class Leaving:
    """Takes one rank out of an attempt, once, by whichever way comes first.

    Parameters
    ----------
    environment
        Job and rank.
    progress
        Where training stands.

    Attributes
    ----------
    journal, last_word
        Known once the attempt is claimed; the journal on rank 0 only.
    peers, faults
        Known once the ranks have met.
    metrics, saver
        Known once the attempt has begun.
    own_group
        Whether the process group is ours to destroy.
    reached
        Whether this rank has come to the agreed step.
    """

    stopping: Stopping
    peers: Peers
    metrics: Metrics

    def __init__(self, environment: JobEnvironment, progress: Progress) -> None:
        self._environment = environment
        self._progress = progress
        self.journal: Journal | None = None
        self.last_word: LastWord | None = None
        self.faults: Faults | None = None
        self.saver: Saver | None = None
        self.own_group = False
        self.reached = False
        #: Held, for good, by who has the last word: the loop, a crash, or the watchdog. A loop that fails while it
        #: ends comes here again as a crash.
        self._ending = threading.RLock()

    def say(self, text: str) -> None:
        """Talk to the person who reads the log; rank 0 only."""
        if self._environment.rank == 0:
            log.say(text)

    def note(self, event: str, **fields: Any) -> None:
        """Write into the journal; rank 0 only."""
        if self.journal is not None:
            self.journal.event(event, **fields)

    def alone(self) -> None:
        """Take note that this rank leaves without a state, while the others may wait for it in vain."""
        self.stopping.leave()
        self.own_group = False  # not to be destroyed without them

    def stop(self, *, together: bool) -> NoReturn:
        """Leave after the agreed step; what is to be saved is saved."""
        assert self.last_word is not None
        self.peers.failed = None  # whatever has failed: how it ends is rank 0's word
        if self._environment.rank == 0:
            self._ending.acquire()
            ending = self.peers.share("ending", self._end(self.stopping.verdict()).to_json())
        else:
            ending = self.peers.get("ending", _LEAVE_S)
            self._ending.acquire()  # not before: without an answer it ends as a crash does
        self.say(f"attempt {self.last_word.attempt} ends after step {self._progress.step}: {ending['why']}")
        self.part() if together or self.faults is None else self.faults.leave()
        self.stopping.close(last_word=True)
        if ending["exit_code"] == EXIT_CONTINUE:
            raise Interrupted(ending["why"])
        raise SystemExit(ending["exit_code"])

    def before_the_start(self, why: str, verdict: Verdict) -> NoReturn:
        """Leave an attempt whose job, not whose script, is at fault, before anything was trained."""
        log.say(why)
        log.settle()
        if self._environment.rank == 0 and self.last_word is not None:
            ending = self._end(verdict)
            if ending.decision == "stop":
                raise SystemExit(ending.exit_code) from None
        raise Interrupted(why) from None  # another allocation may have better luck

    def done(self) -> None:
        """Leave: all steps are done."""
        assert self.last_word is not None
        step = self._progress.step
        self._ending.acquire()  # the watchdog may be about to act: no other ending is written after this one
        self.last_word.note(Cause.DONE, "done", "all steps are done", step=step, exit_code=0)
        self.say(f"done: step {step}")
        self.part()
        self.stopping.close(last_word=False)
        self.shut_down(destroy=True)

    def part(self) -> None:
        """Read nothing more from the control store; rank 0, which keeps it, stays until all have come here."""
        with contextlib.suppress(RuntimeError):  # rank 0 has waited long enough, and left
            self.peers.store.add("left", 1)
            if self._environment.rank == 0:
                self.peers.wait_for_count("left", self._environment.world_size, _HEAD_START_S)

    def crash(self, error: Exception, node_type: NodeType | None) -> None:
        """End an attempt that an exception has left: leave, or return if the exception shall go on its way."""
        with contextlib.suppress(Exception):  # reading a tensor of a GPU that has failed fails, too
            self.metrics.flush()
        assert self.faults is not None
        assert self.last_word is not None
        assert self.saver is not None
        step, first_step = self._progress.step, self._progress.first_step
        if isinstance(error, Declined) and self._environment.job_id is not None:
            self._ending.acquire()  # all ranks come here together
            code, why = self.last_word.decline(str(error), node_type, self.peers, step=step)
            self.say(why)
            self.part()
            self.stopping.abandon(last_word=True)
            self.shut_down(destroy=False)
            raise (Interrupted(why) if code == EXIT_CONTINUE else SystemExit(code)) from None
        fault = self.faults.of(error, begun=step > first_step)
        self.saver.drain(_DRAIN_S)
        self._ending.acquire()
        if self.stopping.leaving and lost_a_peer(error):  # one that has left, as this one was to
            fault = dataclasses.replace(fault, cause=self.stopping.verdict().cause, nodes=())
        code = self.last_word.fail(fault, first_step=first_step, step=step, progressed=self._progressed)
        self.faults.leave()
        self.stopping.abandon(last_word=True)
        self.shut_down(destroy=False)
        if code == EXIT_CONTINUE:
            log.show(error)
            raise Interrupted(f"crashed and is continued: {summary(error)}") from None
        told = isinstance(error, HpcResumeError) and not isinstance(error, RendezvousError | SaveError)
        if told or (fault.exit_code is not None and lost_a_peer(error)):  # it is all there is to say of it
            log.say(str(error) if told else fault.evidence)
            raise SystemExit(code) from None

    def cancel(self) -> None:
        """Leave in a hurry: somebody broke the attempt off at the keyboard."""
        assert self.last_word is not None
        why = "interrupted from the keyboard"
        self.last_word.note(Cause.CANCEL, "stop", why, step=self._progress.step, exit_code=130)
        self.stopping.abandon()
        self.shut_down(destroy=False)

    def give_up(self, verdict: Verdict, reason: str) -> None:
        """Leave without a step boundary, on a thread: the last committed checkpoint is what remains."""
        if not self._ending.acquire(blocking=False):
            return  # it ends by another way
        code = EXIT_CONTINUE
        try:
            self.say(f"{reason}; leaving, and what was saved before remains")
            if self._environment.rank != 0:
                self._tell_leaving()
                threading.Event().wait(_HEAD_START_S)
            elif self.last_word is not None:
                if self.faults is not None:
                    no_hang = self.reached or self.stopping.leaving or self.stopping.life.saving
                    verdict = self.faults.behind(verdict, reason, no_hang=no_hang)
                code = self._end(verdict).exit_code
        except Exception as error:  # noqa: BLE001 - nobody else can end this process any more
            log.show(error)
        finally:
            log.settle()
            os._exit(code)

    def _tell_leaving(self) -> None:
        """Say, on another thread's connection, that this rank leaves by itself: else one beside it finds it dead."""
        if self.faults is not None:  # the ranks have met
            with contextlib.suppress(RuntimeError):
                self.peers.apart().store.set(f"leaving/{self._environment.rank}", "1")

    def shut_down(self, *, destroy: bool) -> None:
        """Close what is open; ``destroy`` only where all ranks come here together."""
        if destroy and self.own_group and dist.is_initialized():
            dist.destroy_process_group()
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        log.settle()

    @property
    def _progressed(self) -> bool:
        return self.saver is not None and self.saver.committed_step > self._progress.first_step

    def _end(self, verdict: Verdict) -> Ending:
        assert self.last_word is not None
        progress = self._progress
        return self.last_word.end(
            verdict, first_step=progress.first_step, step=progress.step, progressed=self._progressed
        )
