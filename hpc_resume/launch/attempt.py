"""One allocation of the embedded scheduler, from start to end: which signal is sent when."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hpc_resume.errors import EXIT_CONTINUE, EXIT_DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What one attempt is given; see :class:`hpc_resume.settings.NodeType`."""

    name: str
    ranks: int
    time_limit_s: float | None = None
    preempt_after_s: float | None = None
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How a job wants to be warned and ended; see :class:`hpc_resume.config.Config`."""

    warning_lead_s: float
    warning_signal: str
    kill_wait_s: float


class Process(Protocol):
    """A rank's process."""

    def poll(self) -> int | None:
        """Exit code, negative for a death by signal; ``None`` while it runs."""
        ...

    def send(self, number: int) -> None:
        """Send a signal; harmless when it has ended."""
        ...


class Attempt:
    """Watches the ranks of one attempt, and warns, ends and kills them as Slurm would.

    Parameters
    ----------
    processes
        The ranks, started.
    began_s
        Unix time at which the allocation was given.
    note
        Called with changed fields of the job's state, always before the signal that they explain.
    restarts
        Restart count of this attempt.
    """

    def __init__(
        self,
        allocation: Allocation,
        times: Times,
        processes: Sequence[Process],
        *,
        began_s: float,
        note: Callable[..., Any],
        restarts: int,
    ) -> None:
        self._times, self._processes, self._note, self._restarts = times, processes, note, restarts
        self._grace_s = allocation.grace_s
        self._limit_s = None if allocation.time_limit_s is None else began_s + allocation.time_limit_s
        self._preempt_at_s = (
            None if allocation.preempt_after_s is None else began_s + allocation.preempt_after_s
        )
        self._grace_ends_s: float | None = None
        self._kill_at_s: float | None = None
        self._warned = self._cancelled = self._killed = False
        self._codes: tuple[int | None, ...] = (None,) * len(processes)
        self._first_to_fall: dict[int, int] = {}
        self.ended_by: str | None = None
        """Why the scheduler ended it: ``"time limit"``, ``"preemption"``; ``None`` if it did not."""

    @property
    def left_alone(self) -> bool:
        """Whether nobody has warned it or asked for its end."""
        return self.ended_by is None and not self._warned and not self._cancelled

    @property
    def exit_codes(self) -> tuple[int, ...]:
        """Codes of the ranks that have ended."""
        return tuple(code for code in self._codes if code is not None)

    @property
    def telling_codes(self) -> dict[int, int]:
        """Codes by rank that tell how it went: those of ranks that were not ended because of another one."""
        return self._first_to_fall or self._ended

    @property
    def _ended(self) -> dict[int, int]:
        return {rank: code for rank, code in enumerate(self._codes) if code is not None}

    def step(self, now_s: float, *, cancel: bool, preempt: bool, expire: bool = False) -> bool:
        """Look after the ranks; called again and again.

        Parameters
        ----------
        now_s
            Unix time.
        cancel, preempt, expire
            Whether someone has asked for it so far; ``expire`` brings the time limit's warning at once.

        Returns
        -------
        bool
            Whether all ranks have ended.
        """
        self._codes = tuple(process.poll() for process in self._processes)
        if None not in self._codes:
            return True
        if cancel and not self._cancelled:
            self._cancelled = True
            self._note(state="COMPLETING", reason=None, end_time=now_s)
            self._end(now_s)
        elif self._kill_at_s is None:
            if expire and not self._warned:
                self._limit_s = now_s + self._times.warning_lead_s
                self._note(end_time=self._limit_s)
            self._watch(now_s, preempt=preempt)
        if self._kill_at_s is not None and now_s >= self._kill_at_s and not self._killed:
            self._killed = True
            self._send(signal.SIGKILL)
        return False

    def _watch(self, now_s: float, *, preempt: bool) -> None:
        due = self._preempt_at_s is not None and now_s >= self._preempt_at_s
        if any(code not in (EXIT_DONE, EXIT_CONTINUE) for code in self.exit_codes):
            # As srun -K does; the job is RUNNING still, so its ranks know that it is no cancel.
            self._first_to_fall = self._ended
            self._end(now_s)
        elif self._grace_ends_s is not None:
            if now_s >= self._grace_ends_s:
                self._end_preempted(now_s)
        elif preempt or due:
            self.ended_by = "preemption"
            self._grace_ends_s = now_s + self._grace_s
            if self._grace_s == 0:
                self._note(preempt_time=now_s)
                self._end_preempted(now_s)
            else:
                self._note(preempt_time=now_s, end_time=self._grace_ends_s)
                self._send(signal.SIGCONT, signal.SIGTERM)
        elif self._limit_s is not None and now_s >= self._limit_s:
            self.ended_by = "time limit"
            self._note(state="COMPLETING", reason="TimeLimit", end_time=now_s)
            self._end(now_s)
        elif (
            not self._warned
            and self._limit_s is not None
            and now_s >= self._limit_s - self._times.warning_lead_s
        ):
            self._warned = True
            if self._times.warning_lead_s > 0:
                self._send(getattr(signal, f"SIG{self._times.warning_signal}"), signal.SIGCONT)

    def _end_preempted(self, now_s: float) -> None:
        # Slurm has requeued the job by now, and shows it so: one restart more.
        self._note(state="COMPLETING", restarts=self._restarts + 1, end_time=now_s)
        self._end(now_s)

    def _end(self, now_s: float) -> None:
        if self._kill_at_s is None:
            self._kill_at_s = now_s + self._times.kill_wait_s
        self._send(signal.SIGCONT, signal.SIGTERM)

    def _send(self, *numbers: int) -> None:
        for number in numbers:
            for process, code in zip(self._processes, self._codes, strict=True):
                if code is None:
                    process.send(number)
