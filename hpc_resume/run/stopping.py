"""From a signal on any rank to a stop of all: who is told, why it is, and what if no step boundary comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hpc_resume.errors import RendezvousError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.run.agreement import Agreement, Appointment
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.base import ALIVE, Scheduler
from hpc_resume.scheduler.cause import Cause, Verdict, classify
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.signals import SignalWatch

#: Longest wait for the scheduler's answer about the cause, which was asked for when the signal came.
_VERDICT_S = 30.0
#: Longest wait for the time that is left, before a save: it must not eat up that time.
_FACTS_S = 1.0
#: A last save gets at least this long, whatever the scheduler says: its end of a job is not to the second.
_LEAST_SAVE_S = 10.0
#: Who leaves without the others waits so long for a signal that is just being passed on: it may have to give up by
#: itself, which takes the time that rank 0 needs for its last word.
_ABANDON_S = 1.0


class Stopping:
    """Watches for signals from the first moment, and has all ranks stop after the same step.

    A rank that gets a signal asks all to stop, at once and without finding out why: a thousand ranks that
    get it together must not ask the scheduler a thousand times. Rank 0 alone asks, while the others finish
    their step.

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
        How long after the request a step boundary may be in coming.
    clock
        Unix time in seconds.
    give_up
        Called on a thread, with the verdict and the reason, when a stop was asked for and can't be reached
        in order.
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
        self._journal: Journal | None = None
        self._verdict: Verdict | None = None
        self._verdict_ready = threading.Event()
        self._ends_at_s: float | None = None
        self._watchdog: threading.Timer | None = None
        self._started = False

    def watch(self) -> None:
        """Begin to record signals."""
        self._watch.start()

    def join(self, peers: Peers, journal: Journal | None) -> None:
        """Get to know the other ranks; a signal that came before is passed on at the first step boundary."""
        agreement = Agreement(
            peers.connect(),
            peers.store,
            rank=self._environment.rank,
            world_size=self._environment.world_size,
            patience_s=self._agreement_s,
            on_request=self._requested,
            on_failure=self._failed,
        )
        with self._lock:
            self._agreement = agreement
            self._journal = journal

    def start(self, completed: int) -> None:
        """Begin to take part in agreements; ``completed`` steps are done."""
        assert self._agreement is not None
        self._agreement.start(completed)
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._started = True
        for name in waiting:
            self._request(name)

    def boundary(self, completed: int) -> Appointment | None:
        """See :meth:`Agreement.boundary`."""
        assert self._agreement is not None
        return self._agreement.boundary(completed)

    def request_save(self) -> None:
        """Ask all ranks to save at an agreed step."""
        assert self._agreement is not None
        self._agreement.request("save")

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
        if self._watchdog is not None:
            self._watchdog.cancel()
        left_s = self.left_s()
        if left_s is not None:
            why = "the last checkpoint was not committed before the end of the job"
            self._watchdog = self._start_timer(max(left_s, _LEAST_SAVE_S), why)
        return left_s

    def close(self, *, last_word: bool) -> None:
        """End watching.

        Parameters
        ----------
        last_word
            This process is about to leave with an exit code that matters: further signals are ignored.
        """
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._agreement is not None and self._started:
            self._agreement.close()
        self._watch.stop(ignore=last_word)

    def abandon(self, *, last_word: bool = False) -> None:
        """End watching without the other ranks, which may be gone; ``last_word`` as for :meth:`close`."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watch.stop(ignore=last_word, patience_s=_ABANDON_S)

    # ------------------------------------------------- on the threads

    def _signalled(self, name: str) -> None:
        with self._lock:
            if not self._started:
                self._waiting.append(name)
                self._start_watchdog()
                return
        self._request(name)

    def _request(self, name: str) -> None:
        assert self._agreement is not None
        try:
            self._agreement.request("stop", signal=name, node=self._environment.node)
        except RendezvousError as error:
            self._failed("stop", str(error))

    def _requested(self, kind: str, details: JsonObject) -> None:
        if kind != "stop":
            return
        self._start_watchdog()
        if self._environment.rank == 0:
            threading.Thread(target=self._judge, args=(details,), daemon=True).start()

    def _start_watchdog(self) -> None:
        if self._watchdog is None:
            why = f"no step ended within {self._watchdog_s:g} s of the request to stop"
            self._watchdog = self._start_timer(self._watchdog_s, why)

    def _start_timer(self, seconds: float, why: str) -> threading.Timer:
        timer = threading.Timer(seconds, self._expire, (why,))
        timer.daemon = True
        timer.start()
        return timer

    def _judge(self, details: JsonObject) -> None:
        name: Any = details.get("signal", "SIGTERM")
        facts = self._scheduler.facts()
        # A job that is being ended shows the present as its end: how long it is left to live is not said.
        self._ends_at_s = facts.end_time_s if facts.state in ALIVE else None
        self._verdict = classify(
            name,
            facts,
            own_restarts=self._environment.restart_count,
            now_s=self._clock(),
            warning_lead_s=self._warning_lead_s,
        )
        if self._journal is not None:
            self._journal.event(
                "stop_requested",
                cause=self._verdict.cause.value,
                signal=name,
                rank=details.get("rank"),
                evidence=self._verdict.evidence,
            )
        self._verdict_ready.set()

    def _failed(self, kind: str, reason: str) -> None:
        if kind == "stop":
            self._expire(f"the ranks could not agree on a step to stop after: {reason}")

    def _expire(self, reason: str) -> None:
        if self._environment.rank == 0 and not self._verdict_ready.is_set() and self._waiting:
            self._judge({"signal": self._waiting[0], "rank": 0})  # before anybody could be asked to stop
        self._give_up(self.verdict(), reason)
