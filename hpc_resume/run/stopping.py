"""From a request on any rank to a stop of all: who is told, why it is, and what if no step boundary comes."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from hpc_resume.errors import RendezvousError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.policy.deadline import LAST_WORD_S, patience
from hpc_resume.run.agreement import Agreement, Appointment
from hpc_resume.run.deadline import Deadline
from hpc_resume.run.peers import Peers
from hpc_resume.run.watchdog import LEAST_SAVE_S, SignsOfLife, Watchdog, tell_patience, told_patience_s
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, Scheduler
from hpc_resume.scheduler.cause import DEADLINE, Cause, Verdict, classify
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.signals import WARNINGS, WATCHED, SignalWatch

#: Longest wait for the scheduler's answer about the cause, which was asked for when the signal came.
_VERDICT_S = 30.0
#: Longest wait for the time that is left, before a save: it must not eat up that time.
_FACTS_S = 1.0
#: Who leaves without the others waits so long for a signal that is just being passed on: it may have to give up by
#: itself, which takes the time that rank 0 needs for its last word.
_ABANDON_S = 1.0
#: Once a rank has left without saving, the others can do nothing any more, and have this long to leave, too.
_LEAVE_S = 10.0
#: While a save is under way that would be the last one to fit, this is how often its end is looked for.
_LOOK_S = 1.0
#: Causes that announce the end of the job.
_ENDING = frozenset({Cause.TIME_LIMIT, Cause.PREEMPTION})


class Stopping:
    """Watches for signals from the first moment, and has all ranks stop after the same step.

    A rank that gets a signal asks all to stop, at once and without finding out why: a thousand ranks that
    get it together must not ask the scheduler a thousand times. Rank 0 alone asks, while the others finish
    their step. Its clock asks for a stop, too, when the end of the job is near.

    Parameters
    ----------
    environment
        This process's place.
    scheduler
        Of this job.
    warning_lead_s
        How long before the time limit the warning comes.
    agreement_s
        How long agreeing may take.
    watchdog_s
        How long after the request a step boundary may be in coming, where no end of the job is known.
    clock
        Unix time in seconds.
    give_up
        Called on a thread, with the verdict and the reason, when a stop was asked for and can't be reached
        in order.

    Attributes
    ----------
    pending
        A stop has been asked for.
    leaving
        No save can be had any more: whoever can leaves as it is.
    life
        What keeps the watchdog of a step from giving up.
    """

    def __init__(
        self,
        environment: JobEnvironment,
        scheduler: Scheduler,
        *,
        warning_lead_s: float,
        agreement_s: float,
        watchdog_s: float,
        clock: Clock,
        give_up: Callable[[Verdict, str], None],
    ) -> None:
        self._environment = environment
        self._scheduler = scheduler
        self._warning_lead_s = warning_lead_s
        self._agreement_s = agreement_s
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._give_up = give_up
        self._watch = SignalWatch(self._signalled)
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._agreement: Agreement | None = None
        self._peers: Peers | None = None
        self._journal: Journal | None = None
        self._deadline: Deadline | None = None
        self._verdict: Verdict | None = None
        self._verdict_ready = threading.Event()
        self._ends_at_s: float | None = None
        self._step_watchdog, self._end_watchdog = Watchdog(), Watchdog()
        self._heard_s = 0.0
        self.life = SignsOfLife()
        self.pending = self.leaving = False

    def watch(self) -> None:
        """Begin to record signals."""
        self._watch.start()

    def join(self, peers: Peers, journal: Journal | None) -> None:
        """Begin to take part in agreements; signals that came before are passed on."""
        agreement = Agreement(
            peers.connect(),
            peers.apart().store,
            rank=self._environment.rank,
            world_size=self._environment.world_size,
            patience_s=self._agreement_s,
            on_request=self._requested,
            on_failure=self._failed,
        )
        with self._lock:
            self._peers = peers
            self._agreement = agreement
            self._journal = journal
            waiting, self._waiting = self._waiting, []
        agreement.start()
        for name in waiting:
            self._request(name)

    def heed(self, deadline: Deadline) -> None:
        """Watch the clock, too. Rank 0 only."""
        self._deadline = deadline
        deadline.start()

    def due(self, why: str) -> None:
        """Ask all ranks to stop because the job is about to end; ``why`` are the numbers."""
        if not self.pending:
            self._request(DEADLINE, why=why)

    def rest(self, completed: int) -> None:
        """See :meth:`Agreement.rest`."""
        assert self._agreement is not None
        self._agreement.rest(completed)

    def boundary(self, completed: int) -> Appointment | None:
        """See :meth:`Agreement.boundary`."""
        assert self._agreement is not None
        return self._agreement.boundary(completed)

    def breathe(self, completed: int | None) -> bool:
        """Tell whether all ranks have agreed to stop here; a sign of life for the watchdog.

        Parameters
        ----------
        completed
            Number of completed steps, ``NOT_BEGUN``, or None in the middle of a step.
        """
        self.life.breathe()
        assert self._agreement is not None
        return completed is not None and self._agreement.due(completed)

    @property
    def near(self) -> bool:
        """Whether a stop is so near that a periodic save would be in its way; known on rank 0 only."""
        return self.pending or (self._deadline is not None and self._deadline.near)

    def request_save(self) -> None:
        """Ask all ranks to save at an agreed step."""
        assert self._agreement is not None
        self._agreement.request("save")

    def leave(self) -> None:
        """Have all ranks leave as they are, without saving: at once where they breathe, else by force."""
        assert self._agreement is not None
        if not self.leaving:
            with contextlib.suppress(RendezvousError):  # rank 0 has left already
                self._agreement.request("leave")

    def verdict(self) -> Verdict:
        """Tell why the run is being stopped; waits for the scheduler's answer. Rank 0 only."""
        if self._environment.rank == 0:
            self._verdict_ready.wait(_VERDICT_S)
        return self._verdict or Verdict(
            cause=Cause.UNKNOWN, evidence="the scheduler did not say in time why the job is being stopped"
        )

    def left_s(self) -> float | None:
        """Seconds until the job is killed, if the scheduler has said so by now; known on rank 0 only."""
        if self._environment.rank != 0 or not self._verdict_ready.wait(_FACTS_S) or self._ends_at_s is None:
            return None
        return max(self._ends_at_s - self._clock(), 0.0)

    def reached(self) -> float | None:
        """Note that the step to stop after has been completed; see :meth:`left_s` for what it returns.

        From now on the watchdog waits for the end of the job instead: a save that takes its time is not cut
        short, and one that hangs does not keep the run from being continued.
        """
        self._unguard_step()
        left_s = self.left_s()
        if left_s is not None:
            why = "the last checkpoint was not committed before the end of the job"
            self._end_watchdog.set(max(left_s, LEAST_SAVE_S), self._expire, why)
        return left_s

    def close(self, *, last_word: bool) -> None:
        """End watching.

        Parameters
        ----------
        last_word
            This process is about to leave with an exit code that matters: no signal may kill it before. Without
            it, warnings alone must not: they would have a run continued that is done.
        """
        self._unguard_step()
        self._end_watchdog.close()
        self.pending = False
        if self._agreement is not None:
            self._agreement.close()
        self._watch.stop(ignored=self._ignored(last_word))

    def abandon(self, *, last_word: bool = False) -> None:
        """End watching without the other ranks, which may be gone; ``last_word`` as for :meth:`close`."""
        self._unguard_step()
        self._end_watchdog.close()
        self.pending = False
        self._watch.stop(ignored=self._ignored(last_word), patience_s=_ABANDON_S)

    def _ignored(self, last_word: bool) -> Collection[signal.Signals]:
        if self._environment.job_id is None or hasattr(sys, "ps1"):
            return ()  # no exit code is waited for, or a person goes on in this process: Ctrl-C has to work
        return WATCHED if last_word else WARNINGS

    # ------------------------------------------------- on the threads

    def _signalled(self, name: str) -> None:
        with self._lock:
            joined = self._agreement is not None
            if not joined:
                self._waiting.append(name)
        self._request(name) if joined else self._heard()

    def _request(self, name: str, **details: Any) -> None:
        assert self._agreement is not None
        try:
            self._agreement.request("stop", signal=name, node=self._environment.node, **details)
        except RendezvousError as error:
            self._failed("stop", str(error))

    def _requested(self, kind: str, details: JsonObject) -> None:
        if kind == "stop":
            self._heard()
            if self._environment.rank == 0:
                threading.Thread(target=self._look_into, args=(details,), daemon=True).start()
        elif kind == "leave":
            self.pending = self.leaving = True
            self._step_watchdog.set(
                self._until_end(_LEAVE_S),
                self._overdue,
                "ranks are leaving without a save, and this one did not",
            )

    def _heard(self) -> None:
        """Take note that a stop was asked for."""
        with self._lock:
            first, self.pending = not self.pending, True
        if first:
            self._heard_s = time.monotonic()
            why = f"no step ended within {self._watchdog_s:g} s of the request to stop"
            self._step_watchdog.set(self._until_end(self._watchdog_s), self._overdue, why)

    def _look_into(self, details: JsonObject) -> None:
        self._be_patient(self._judge(details))

    def _judge(self, details: JsonObject) -> Verdict:
        name: Any = details.get("signal", "SIGTERM")
        facts = self._scheduler.facts()
        # A job that is being ended shows the present as its end: how long it is left to live is not said.
        self._ends_at_s = facts.end_time_s if facts.state in ALIVE else None
        if facts.state == UNKNOWN and self._deadline is not None:
            self._ends_at_s = self._deadline.ends_at_s
        verdict = classify(
            name,
            facts,
            own_restarts=self._environment.restart_count,
            now_s=self._clock(),
            warning_lead_s=self._warning_lead_s,
        )
        if "why" in details:
            verdict = dataclasses.replace(verdict, evidence=f"{verdict.evidence} ({details['why']})")
        self._verdict = verdict
        if self._journal is not None:
            self._journal.event(
                "stop_requested",
                cause=verdict.cause.value,
                signal=name,
                rank=details.get("rank"),
                evidence=verdict.evidence,
            )
        self._verdict_ready.set()
        return verdict

    # ------------------------------------------------- the watchdog

    def _be_patient(self, verdict: Verdict) -> None:
        """Wait for a step boundary as long as the end of the job allows."""
        ends_in_s = None if self._ends_at_s is None else self._ends_at_s - self._clock()
        ending = verdict.cause in _ENDING
        saves_s = () if self._deadline is None else self._deadline.pace.saves_s()
        waits = patience(ends_in_s=ends_in_s, ending=ending, saves_s=saves_s, watchdog_s=self._watchdog_s)
        self._tell_patience(waits.give_up_s)
        if waits.leave_s is None:
            why = f"no step ended within {waits.give_up_s:.3g} s of the request to stop"
            self._step_watchdog.set(waits.give_up_s, self._overdue, why)
        else:
            self._step_watchdog.set(waits.leave_s, self._no_save_fits)

    def _no_save_fits(self) -> None:
        if self._step_watchdog.closed:
            return  # it was cancelled too late
        if (save_left_s := self._save_left_s()) > 0:  # the one that is under way may fit
            self._step_watchdog.set(min(save_left_s, _LOOK_S), self._no_save_fits)
            return
        self.leave()
        why = "no step ended in time for a save before the end of the job"
        self._step_watchdog.set(self._until_end(_LEAVE_S), self._overdue, why)

    def _tell_patience(self, seconds: float) -> None:
        """Tell the other ranks when this one gives up: it knows the end of the job, and they follow."""
        if self._peers is not None:
            tell_patience(self._peers, time.monotonic() - self._heard_s + seconds)

    def _overdue(self, why: str) -> None:
        """Give up, unless it may wait longer."""
        if self._step_watchdog.closed:
            return  # it was cancelled too late
        later_s = 0.0 if self.leaving else self._later_s()
        if later_s > 0:
            self._step_watchdog.set(later_s, self._overdue, why)
        else:
            self._expire("the save that was under way did not end in time" if self.life.saving else why)

    def _later_s(self) -> float:
        """Seconds by which this rank waits longer than it was to."""
        now_s = time.monotonic()
        if self.life.saving:
            later_s = min(self._save_left_s(), self._watchdog_s)
        else:  # no step has hung while it was saving, nor has what comes after it
            later_s = self._until_end(self.life.saved_s + self._watchdog_s - now_s)
        if self._environment.rank != 0:
            patience_s = told_patience_s(self._peers, self._watchdog_s)
            return max(patience_s - (now_s - self._heard_s), later_s)
        if self._verdict is not None and self._verdict.cause is Cause.SIGNAL:
            # The job goes on, and so does whatever breathes.
            later_s = max(later_s, self._until_end(self.life.breathed_s + self._watchdog_s - now_s))
        if later_s > 0:
            self._tell_patience(later_s)
        return later_s

    def _save_left_s(self) -> float:
        """Seconds that the save which is under way may still take; 0 without one."""
        saves_s = () if self._deadline is None else self._deadline.pace.saves_s()
        return self.life.save_left_s(saves_s, self._ends_in_s())

    def _ends_in_s(self) -> float | None:
        """Seconds until the job ends, as far as this rank knows by now."""
        ends_at_s = self._ends_at_s
        if ends_at_s is None and self._deadline is not None and not self._verdict_ready.is_set():
            ends_at_s = self._deadline.ends_at_s
        return None if ends_at_s is None else ends_at_s - self._clock()

    def _until_end(self, seconds: float) -> float:
        """Shorten a wait such that there is time for the last word before the job ends."""
        ends_in_s = self._ends_in_s()
        return seconds if ends_in_s is None else min(seconds, max(ends_in_s - LAST_WORD_S, 0.0))

    def _unguard_step(self) -> None:
        if self._deadline is not None:
            self._deadline.close()
        self._step_watchdog.close()

    def _failed(self, kind: str, reason: str) -> None:
        if kind != "save":
            self._expire(f"the ranks could not agree on a step to stop after: {reason}")

    def _expire(self, reason: str) -> None:
        if self._environment.rank == 0 and not self._verdict_ready.is_set() and self._waiting:
            self._judge({"signal": self._waiting[0], "rank": 0})  # before anybody could be asked to stop
        self._give_up(self.verdict(), reason)
