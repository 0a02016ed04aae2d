"""Jobs of the embedded scheduler that take turns: one detached process starts so many of them at once.

Started by :func:`start_waitlist` as ``python -m hpc_resume.launch.waitlist LIST``. A job that waits is cancelled by
a file beside its state (:func:`hpc_resume.scheduler.local.cancel_path`); once it has begun it has a controller of
its own, and this process only waits for that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hpc_resume.launch.controller import Plan, initial_state
from hpc_resume.launch.onemachine import hand_over, spawn_detached
from hpc_resume.scheduler.local import UNFINISHED, LocalState

_POLL_S = 1 / 8


class Controlling(Protocol):
    """A controller's process."""

    def poll(self) -> int | None:
        """Exit code; ``None`` while it runs."""
        ...


class Waitlist:
    """Starts jobs one after the other, so many at once.

    Parameters
    ----------
    plans
        The jobs, in turn.
    at_once
        How many have a controller at the same time at most.
    start
        Starts the controller of a job.
    sleep
        Waits so many seconds; an argument, so that a test waits for nothing.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        at_once: int,
        start: Callable[[Plan], Controlling],
        sleep: Callable[[float], None],
    ) -> None:
        self._waiting = deque(plans)
        self._running: list[tuple[Plan, Controlling]] = []
        self._at_once = at_once
        self._start, self._sleep = start, sleep
        for plan in plans:
            initial_state(plan, pid=os.getpid()).write(plan.state_path)

    def run(self) -> None:
        """Start jobs until none waits, and wait until the last one is over."""
        while self._waiting or self._running:
            for plan in [plan for plan in self._waiting if plan.cancelled]:
                self._waiting.remove(plan)
                self._end(plan, "CANCELLED", "cancelled before it began")
            over = [(plan, process) for plan, process in self._running if process.poll() is not None]
            for plan, process in over:
                self._running.remove((plan, process))
                self._check(plan, process)
            while self._waiting and len(self._running) < self._at_once:
                plan = self._waiting.popleft()
                self._running.append((plan, self._start(plan)))
            self._sleep(_POLL_S)

    def _check(self, plan: Plan, process: Controlling) -> None:
        """See to it that a job whose controller never began does not wait for ever."""
        state = LocalState.read(plan.state_path)
        if state.controller_pid == os.getpid() and state.state in UNFINISHED:
            self._end(plan, "FAILED", f"embedded scheduler: it did not start (exit code {process.poll()})")

    @staticmethod
    def _end(plan: Plan, state: str, why: str) -> None:
        last = initial_state(plan, pid=os.getpid())
        dataclasses.replace(last, state=state, why=why).write(plan.state_path)


def start_waitlist(
    plans: Sequence[Plan],
    path: Path,
    *,
    at_once: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Have jobs that are held run, so many at once, by a process that outlives this one.

    Parameters
    ----------
    plans
        The jobs, each written down by :func:`~hpc_resume.launch.onemachine.hold`.
    path
        Where the list goes.
    at_once
        How many of them run at the same time at most.

    Raises
    ------
    SchedulerError
        If the process does not come up; with what it said.
    """
    path.write_text(json.dumps({"plans": [str(plan.path) for plan in plans], "at_once": at_once}, indent=1))
    log_path = path.with_suffix(".log")
    hand_over("hpc_resume.launch.waitlist", path, log_path, plans, clock=clock, sleep=sleep)


def _start_controller(plan: Plan) -> Controlling:
    log_path = Path(plan.folder) / f"{plan.job_id}_controller.log"
    return spawn_detached("hpc_resume.launch.controller", plan.path, log_path)


def main(arguments: Sequence[str]) -> int:
    """Run the list whose path is given."""
    # Whom a signal is meant for stands in a file; the process itself ends with its last job.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    record = json.loads(Path(arguments[0]).read_bytes())
    plans = [Plan.read(Path(path)) for path in record["plans"]]
    Waitlist(plans, at_once=record["at_once"], start=_start_controller, sleep=time.sleep).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
