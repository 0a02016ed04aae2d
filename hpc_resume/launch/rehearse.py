"""Interrupts a run on the embedded scheduler: watches it from outside and strikes at drawn moments."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError
from hpc_resume.files import Clock
from hpc_resume.journal import read_events
from hpc_resume.launch.chain import OVER
from hpc_resume.launch.entry import Entry
from hpc_resume.launch.handle import JobHandle, jobs_folder
from hpc_resume.launch.submit import submit_entry
from hpc_resume.policy.rehearsal import Interruption, Moment, Pace, save_every
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.scheduler.local import LocalState, children_of, process_ticks, state_path
from hpc_resume.settings import BudgetSettings, NodeType

#: Between two looks at the run.
_POLL_S = 0.02
#: A job that is cancelled has its ranks killed at once, so it is over soon.
_CANCEL_S = 20.0
_PREEMPTIONS = {"preemption", "preemption without grace"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """An interruption that took place.

    Parameters
    ----------
    interruption
        What was drawn.
    allocation
        Which allocation of the job it hit, from 0.
    at
        Unix time in seconds.
    """

    interruption: Interruption
    allocation: int
    at: float


class TimeIsUp(Exception):  # noqa: N818 - reads as what happened
    """The rehearsal has taken as long as it may."""


def settings_for(
    config: Config, run_dir: Path, ranks: Sequence[int], plan: Sequence[Interruption], *, steps: int | None
) -> Config:
    """Give the settings under which a rehearsal runs the script.

    Parameters
    ----------
    config
        The user's.
    run_dir
        The rehearsal's own folder.
    ranks
        Of one allocation after the other, one more than there are interruptions.
    plan
        Interruptions to come.
    steps
        Of the whole run; None if that is not known yet.
    """
    base = config.node_types[0]
    graces = {place: 0.0 for place, each in enumerate(plan) if each.kind == "preemption without grace"}
    node_types = [
        NodeType(
            name=f"{place}-on-{count}",
            ranks=count,
            micro_batch=base.micro_batch,
            precision=base.precision,
            grace_s=graces.get(place, base.grace_s),
        )
        for place, count in enumerate(ranks)
    ]
    # By environment variable, so that they beat what a script reads from a file of its own.
    variables = {"HPC_RESUME_REHEARSAL": str(run_dir), "HPC_RESUME_BUDGET__MAX_IDLE": str(len(plan) + 3)}
    if plan and steps is not None:
        variables["HPC_RESUME_CHECKPOINT__EVERY_STEPS"] = str(save_every(steps, len(plan)))
    return config.replace(
        scheduler="local",
        continuation="requeue",
        time_limit_s=None,
        node_types=node_types,
        # Interruptions that bring nothing are meant here; only what fails for ever must end.
        budget=BudgetSettings(
            max_idle=len(plan) + 3,
            restarts_in_place=0,  # each interruption has an allocation of its own, with its ranks and its grace
            crashes=None,
            hangs=None,
            out_of_memory=None,
            node_failures=None,
            preemptions=None,
        ),
        environment={"variables": variables},
    )


class Rehearsed:
    """One job of a rehearsal, from submission to its end.

    Parameters
    ----------
    entry, kwargs
        What it runs.
    config
        See :func:`settings_for`.
    run_dir
        Its folder.
    until
        When the rehearsal has to be over, by ``clock``.
    clock, sleep
        Unix time in seconds, and waiting.
    """

    def __init__(
        self,
        entry: Entry,
        kwargs: Mapping[str, Any],
        config: Config,
        run_dir: Path,
        *,
        until: float,
        clock: Clock = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run_dir = run_dir
        self._run = RunDirectory(run_dir)
        self._until, self._clock, self._sleep = until, clock, sleep
        self.job: JobHandle = submit_entry(entry, config, run_dir=run_dir, kwargs=kwargs)
        self._state_path = state_path(jobs_folder(run_dir), self.job.job_id)

    def finish(self) -> str:
        """Wait for the end, and return the job's state.

        Raises
        ------
        TimeIsUp
            If it does not come in time; the job is gone then.
        """
        with self._gone_if_left():
            self._wait(lambda: self.job.state() in OVER)
        self.stop()
        return self.job.state()

    def interrupt(self, plan: Sequence[Interruption], pace: Pace) -> list[Strike]:
        """Strike one allocation after the other; returns the strikes that were not too late."""
        strikes = []
        with self._gone_if_left():
            for place, interruption in enumerate(plan):
                if not self._until_due(interruption, place, pace, others=len(plan) - place - 1):
                    continue
                strikes.append(Strike(interruption=interruption, allocation=place, at=self._clock()))
                self._strike(interruption)
                self._wait(lambda after=place: self._over(after))  # type: ignore[misc]
        return strikes

    def _until_due(self, interruption: Interruption, place: int, pace: Pace, *, others: int) -> bool:
        """Wait until an interruption is due in allocation ``place``; False if that is over before."""
        self._wait(lambda: self._in_its_moment(interruption.moment, place) or self._over(place))
        if interruption.moment in {"middle", "save"}:
            due_step = pace.due_step(interruption, step=self._first_step(place) or 0, others=others)
            saving = interruption.moment == "save"
            self._wait(
                lambda: self._step() >= due_step or (saving and self._saves(place)) or self._over(place)
            )
        due_s = self._clock() + pace.delay_s(interruption)
        self._wait(lambda: self._clock() >= due_s or self._over(place))
        return not self._over(place)

    def _strike(self, interruption: Interruption) -> None:
        if interruption.kind == "kill":
            ranks = children_of(self._state().controller_pid)
            if ranks:
                with contextlib.suppress(ProcessLookupError):  # it has just left
                    os.kill(ranks[min(int(interruption.victim * len(ranks)), len(ranks) - 1)], signal.SIGKILL)
        elif interruption.kind in _PREEMPTIONS:
            self.job.preempt()
        else:
            self.job.submitit_job().expire()

    # ------------------------------------------------- what can be seen of the run

    def _state(self) -> LocalState:
        return LocalState.read(self._state_path)

    def _over(self, place: int) -> bool:
        """Whether allocation ``place`` is over."""
        state = self._state()
        # While it is being ended by a preemption, the job shows one restart more already.
        gone = state.restarts > place and state.state != "COMPLETING"
        return gone or state.state in OVER or not state.alive()

    def _in_its_moment(self, moment: Moment, place: int) -> bool:
        """Whether the stretch of time has begun in which an interruption is to come."""
        if moment == "start":
            state = self._state()
            return state.restarts == place and state.state == "RUNNING"
        if moment == "first step":
            return self._attempt(place) is not None
        return self._first_step(place) is not None

    def _attempt(self, place: int) -> int | None:
        """Give the number of the attempt in allocation ``place``, if it has claimed one."""
        for number in reversed(self._run.attempt_numbers()):
            with contextlib.suppress(OSError, ValueError, LookupError):
                if restart_count(self._run, number) == place:
                    return number
        return None

    def _first_step(self, place: int) -> int | None:
        """Give the step at which the attempt in allocation ``place`` goes on, once it does."""
        number = self._attempt(place)
        return None if number is None else first_step(self._run, number)

    def _step(self) -> int:
        """Give the number of completed steps, as rank 0 tells it; see :mod:`hpc_resume.run.rehearsing`."""
        try:
            return int((self.run_dir / "step.txt").read_text())
        except (OSError, ValueError):
            return 0

    def _saves(self, place: int) -> bool:
        """Whether a checkpoint is being written."""
        number = self._attempt(place)
        if number is None:
            return False
        committed = max(map(checkpoint_step, self._run.checkpoint_names()), default=0)
        steps = [
            each.name for each in (self._run.attempt(number) / "staging").glob("*") if each.name.isdecimal()
        ]
        return any(int(step) > committed for step in steps)

    # ------------------------------------------------- waiting

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._clock() > self._until:
                raise TimeIsUp
            self._sleep(_POLL_S)

    @contextlib.contextmanager
    def _gone_if_left(self) -> Iterator[None]:
        """Leave no process behind, whatever happens."""
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the job now, if it is not over, and wait until its processes are gone."""
        with contextlib.suppress(OSError, IntegrityError):
            controller = self._state().controller_pid
            self.job.cancel()
            ends = time.monotonic() + _CANCEL_S
            while process_ticks(controller) == self._state().controller_ticks and time.monotonic() < ends:
                for rank in children_of(controller):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
                time.sleep(_POLL_S)


def restart_count(run: RunDirectory, number: int) -> int:
    """Give the restart count of an attempt, from its record."""
    return int(json.loads((run.attempt(number) / "attempt.json").read_bytes())["restart_count"])


def first_step(run: RunDirectory, number: int) -> int | None:
    """Give the step at which an attempt began to train; None if it did not."""
    events = read_events(run.attempt(number) / "events.jsonl")
    return next((int(each["step"]) for each in events if each.get("event") in {"fresh", "restored"}), None)


def measure(run_dir: Path, *, submitted: float) -> Pace:
    """Measure the pace of an uninterrupted run from its journal."""
    events = {each["event"]: each for each in read_events(RunDirectory(run_dir).attempt(1) / "events.jsonl")}
    begun, fresh, ended = (float(events[name]["t"]) for name in ("begun", "fresh", "ended"))
    return Pace(
        start_s=max(begun - submitted, 0.0),
        prepare_s=max(fresh - begun, 0.0),
        train_s=max(ended - fresh, 0.0),
        steps=int(events["ended"]["step"]),
    )
