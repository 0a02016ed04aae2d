"""Our own clock against the end of the job: asks for a stop in time for one last save. On rank 0."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc_resume.files import Clock
from hpc_resume.policy.deadline import StepTimes, StopPlan, plan_stop
from hpc_resume.run.saving import Saver
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, Scheduler
from hpc_resume.scheduler.environment import JobEnvironment

#: Longest time between two looks: what is measured meanwhile changes the plan.
_LOOK_S = 1.0
#: The scheduler is not asked again for the end of the job sooner than this.
_ASK_S = 60.0


class Pace:
    """What steps and saves take in this attempt.

    Parameters
    ----------
    saver
        Knows its saves.
    warning_lead_s
        As configured.
    clock
        Unix time in seconds.
    """

    def __init__(self, saver: Saver, *, warning_lead_s: float, clock: Clock) -> None:
        self._saver = saver
        self._warning_lead_s = warning_lead_s
        self._clock = clock
        self._steps = StepTimes()
        self._began_s: float | None = None

    def step_begins(self) -> None:
        """Take note that a step begins."""
        self._began_s = self._clock()

    def step_ends(self, *, counts: bool = True) -> None:
        """Take note that a step has ended, if one was begun."""
        if self._began_s is not None:
            if counts:
                self._steps.add(self._clock() - self._began_s)
            self._began_s = None

    def saves_s(self) -> Sequence[float]:
        """Give what the newest saves took."""
        return self._saver.saves_s

    def plan_stop(self, ends_at_s: float) -> StopPlan:
        """Tell how long before an end a stop is to be asked for."""
        return plan_stop(
            work_s=ends_at_s - self._saver.held_at_s,
            begun=self._steps.added > 0,
            saves_s=self._saver.saves_s,
            step_s=self._steps.most_s(),
            warning_lead_s=self._warning_lead_s,
        )


class Deadline:
    """Watches the clock on a thread, so that it works whatever the training loop does.

    The scheduler is asked at the start when the job ends, and once more just before the stop: somebody may have
    given the job more time.

    Parameters
    ----------
    scheduler
        Of this job.
    pace
        Of this attempt.
    due
        Called once, with the numbers in words, when it is time.
    note
        Writes an event into the journal.
    clock
        Unix time in seconds.
    assumed_end_s
        The end of the job, Unix seconds, if the scheduler can't be asked.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pace: Pace,
        due: Callable[[str], None],
        note: Callable[..., Any],
        clock: Clock,
        assumed_end_s: float | None = None,
    ) -> None:
        self._scheduler = scheduler
        self.pace = pace
        self._due = due
        self._clock = clock
        self._assumed_end_s = assumed_end_s
        self._note = note
        self._asked_s: float | None = None
        self._answered = False
        self._closed = threading.Event()
        #: When the job ends, Unix seconds; None while that is not known.
        self.ends_at_s: float | None = None
        #: The stop is so near that a periodic save would be in its way.
        self.near = False

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, name="hpc-resume-deadline", daemon=True).start()

    def close(self) -> None:
        """End watching."""
        self._closed.set()

    def _watch(self) -> None:
        wait_s = self.look()
        while wait_s is not None and not self._closed.wait(wait_s):
            wait_s = self.look()

    def look(self) -> float | None:
        """Do what is due.

        Returns
        -------
        float or None
            Seconds until the next look; None if there is nothing more to look for.
        """
        now_s = self._clock()
        if self._asked_s is None or (not self._answered and now_s - self._asked_s >= _ASK_S):
            self._ask(now_s)
        if self.ends_at_s is None:
            return None if self._answered else _ASK_S
        plan = self.pace.plan_stop(self.ends_at_s)
        left_s = self.ends_at_s - now_s
        self.near = left_s <= plan.lead_s + plan.quiet_s
        if left_s > plan.lead_s:
            return min(left_s - plan.lead_s, _LOOK_S)
        if self._asked_s is not None and now_s - self._asked_s >= _ASK_S:
            self._ask(now_s)
            return 0.0
        self._due(f"{left_s:.1f} s before the end of the job; {plan.why}")
        return None

    def _ask(self, now_s: float) -> None:
        """Learn from the scheduler when the job ends; without an answer, what was known before holds."""
        self._asked_s = now_s
        facts = self._scheduler.facts()
        self._answered = facts.state != UNKNOWN
        ends_at_s, source = self.ends_at_s, facts.evidence
        if facts.state in ALIVE:  # one that is being ended shows the present as its end
            ends_at_s = facts.end_time_s
        elif not self._answered and ends_at_s is None:
            ends_at_s, source = self._assumed_end_s, f"assumed, because: {facts.evidence}"
        if ends_at_s != self.ends_at_s:
            self.ends_at_s = ends_at_s
            self._note("end_of_job", ends_at_s=ends_at_s, source=source)


def assumed_end_s(
    environment: JobEnvironment, environ: Mapping[str, str], now_s: float, time_limit_s: float | None
) -> float | None:
    """Tell when a job of Slurm ends where ``scontrol`` can't be asked, as in many containers.

    Parameters
    ----------
    environment
        This process's place.
    environ
        Its variables: ``SLURM_JOB_END_TIME`` is the end as of the job's start, on Slurm 23.02 and later.
    now_s
        Unix time, soon after the start.
    time_limit_s
        As configured, which ``HPC_RESUME_TIME_LIMIT_S`` tells the ranks. The job began earlier than this
        process, so an end that is reckoned from it comes too late by what starting took; the warning signal
        does not.
    """
    if environment.kind != "slurm":
        return None
    told = environ.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal():
        return float(told)
    return None if time_limit_s is None else now_s + time_limit_s
