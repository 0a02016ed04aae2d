"""How an attempt ends: by its cause and the budget, on to the next attempt or not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch.distributed import DistError

from hpc_resume.config import Config
from hpc_resume.errors import (
    EXIT_CONTINUE,
    EXIT_FAILED,
    HpcResumeError,
    RendezvousError,
    SaveError,
    SchedulerError,
)
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.policy.decision import Decision
from hpc_resume.run.continuation import Continuation
from hpc_resume.scheduler.base import Scheduler
from hpc_resume.scheduler.cause import Cause, Verdict, classify
from hpc_resume.scheduler.environment import JobEnvironment


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The last word of an attempt.

    Parameters
    ----------
    cause
        Why it ended.
    decision
        ``"continue"``, ``"stop"`` or ``"done"``.
    why
        In words.
    exit_code
        What every rank leaves with.
    """

    cause: Cause
    decision: str
    why: str
    exit_code: int

    def to_json(self) -> JsonObject:
        """JSON form; the journal's fields."""
        return {
            "cause": self.cause.value,
            "decision": self.decision,
            "why": self.why,
            "exit_code": self.exit_code,
        }


#: How collectives complain when a peer is gone; gloo raises a plain RuntimeError.
_PEER_IS_GONE = re.compile(r"gloo|NCCL|Connection (closed|reset)")


def after_crash(error: Exception, *, restartable: bool, under_way: bool) -> int:
    """Tell what an exception means for the run, as an exit code.

    Parameters
    ----------
    error
        What was raised out of the run.
    restartable
        Whether anybody is there to start it again.
    under_way
        Whether this attempt had completed a step. An exception before that is taken for a mistake in the
        script, which every further attempt would repeat.
    """
    if isinstance(error, HpcResumeError) and not isinstance(error, RendezvousError | SaveError):
        return error.exit_code
    if not restartable:
        return EXIT_FAILED
    return EXIT_CONTINUE if lost_a_peer(error) or under_way else EXIT_FAILED


def lost_a_peer(error: Exception) -> bool:
    """Whether an exception says that another rank is gone."""
    if isinstance(error, HpcResumeError):
        return isinstance(error, RendezvousError)
    return isinstance(error, DistError) or _PEER_IS_GONE.search(str(error)) is not None


class LastWord:
    """Ends an attempt on its rank 0: decides, has the run continued or not, writes the journal.

    Parameters
    ----------
    environment, scheduler, config
        Of the attempt.
    continuation
        How the run goes on; on rank 0.
    clock
        Unix time in seconds.
    journal
        On rank 0; elsewhere nothing is written.
    """

    def __init__(
        self,
        environment: JobEnvironment,
        scheduler: Scheduler,
        config: Config,
        continuation: Continuation,
        *,
        clock: Clock,
        journal: Journal | None,
    ) -> None:
        self._environment = environment
        self._scheduler = scheduler
        self._config = config
        self._continuation = continuation
        self._clock = clock
        self._journal = journal
        #: Attempts in a row, up to the one before this, that made no progress.
        self.idle_before = 0

    def end(self, verdict: Verdict, *, step: int, progressed: bool, lost: str | None = None) -> Ending:
        """Decide, tell the scheduler, and write it down.

        Parameters
        ----------
        verdict
            Why the attempt ends.
        step
            Completed steps.
        progressed
            Whether this attempt has saved anything new.
        lost
            Why it could not be ended in order, if it could not.
        """
        ending = end_attempt(
            verdict,
            self._scheduler,
            self._continuation,
            own_restarts=self._environment.restart_count,
            warning_lead_s=self._config.warning_lead_s,
            now_s=self._clock(),
            idle=self._idle(progressed),
            max_idle=self._config.budget.max_idle,
            exit_code_suffices=verdict.cause is Cause.CRASH and self._environment.launcher_requeues,
        )
        if lost is not None:
            ending = replace(ending, why=f"{lost}; {ending.why}")
        self.write(ending, step=step)
        return ending

    def spent(self, progressed: bool) -> bool:
        """Whether the run will not be continued, because attempts without progress have used up its budget."""
        return self._idle(progressed) >= self._config.budget.max_idle

    def _idle(self, progressed: bool) -> int:
        return 0 if progressed or self._environment.job_id is None else self.idle_before + 1

    def write(self, ending: Ending, *, step: int) -> None:
        """Write an ending that was decided elsewhere; on rank 0 nothing comes after one that is none to go on."""
        if self._journal is not None:
            if ending.decision != "continue":
                self._continuation.end(ending.why)
            self._journal.event("ended", durable=True, step=step, **ending.to_json())


def end_attempt(
    verdict: Verdict,
    scheduler: Scheduler,
    continuation: Continuation,
    *,
    own_restarts: int,
    warning_lead_s: float,
    now_s: float,
    idle: int,
    max_idle: int,
    exit_code_suffices: bool,
) -> Ending:
    """Decide whether the run goes on, and tell the scheduler.

    Parameters
    ----------
    verdict
        Why the attempt ends, as judged when the signal came.
    scheduler
        Of this job.
    continuation
        How the run goes on.
    own_restarts, warning_lead_s, now_s
        For judging anew if the scheduler refuses.
    idle
        Attempts in a row without progress, this one included.
    max_idle
        How many there may be.
    exit_code_suffices
        The launcher acts on exit code 75, and this process need not call the scheduler itself.
    """
    if verdict.cause is Cause.CANCEL:
        return _stop(Cause.CANCEL, f"a person cancelled it ({verdict.evidence})")
    if idle >= max_idle:
        return _stop(
            Cause.NO_PROGRESS,
            f"no progress in {idle} attempts in a row (the last one ended by {verdict.cause.value}): "
            "something fails every time; read the log of the last attempt, and submit again when it is mended",
        )
    why = f"{verdict.cause.value} ({verdict.evidence})"
    decision = Decision(action="continue", why=why)
    if exit_code_suffices:
        return _continue(verdict.cause, f"{why}; {continuation.leave(decision)}")
    try:
        how = continuation.go_on(decision, already=verdict.already_requeued)
    except SchedulerError as error:
        # Saving took its time: somebody may have cancelled the job meanwhile.
        again = classify(
            "SIGTERM",
            scheduler.facts(),
            own_restarts=own_restarts,
            now_s=now_s,
            warning_lead_s=warning_lead_s,
        )
        if again.cause is Cause.CANCEL:
            return _stop(Cause.CANCEL, f"a person cancelled it while it was saving ({again.evidence})")
        return _continue(
            verdict.cause, f"{why}; not requeued from here ({error}), left to exit code {EXIT_CONTINUE}"
        )
    return _continue(verdict.cause, f"{why}; {how}")


def _stop(cause: Cause, why: str) -> Ending:
    return Ending(cause=cause, decision="stop", why=why, exit_code=EXIT_FAILED)


def _continue(cause: Cause, why: str) -> Ending:
    return Ending(cause=cause, decision="continue", why=why, exit_code=EXIT_CONTINUE)
