"""The embedded scheduler's controller: one detached process that gives a job its allocations, one by one.

It does on one machine what Slurm does to a job, in the same order and with the same signals (measured on
Slurm 22.05). Started by :class:`hpc_resume.launch.onemachine.OneMachineExecutor` as
``python -m hpc_resume.launch.controller PLAN``; ``SIGUSR1`` preempts the job, ``SIGUSR2`` brings the warning of its
time limit, ``SIGTERM`` cancels it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.errors import EXIT_CONTINUE, IntegrityError
from hpc_resume.files import DISK, Clock, JsonObject
from hpc_resume.journal import read_events
from hpc_resume.launch.attempt import Allocation, Attempt, Process, Times
from hpc_resume.policy.exits import Outcome, after_exit
from hpc_resume.policy.inplace import WORDS, starts_again
from hpc_resume.rollbacks import active_names
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.local import LocalState, cancel_path, process_ticks, state_path

_POLL_S = 1 / 16
#: An attempt that is over sooner is followed by a pause, so that a program that always asks to be continued
#: does not take the machine.
_SHORTEST_CYCLE_S = 1.0
_PR_SET_PDEATHSIG = 1  # Source: prctl(2), linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job for the controller; lies beside the job's logs.

    Parameters
    ----------
    folder
        Where the job's files are.
    command
        What every rank runs.
    allocations
        Given in turn; the last one again and again, unless the run declines it: then the next, from the first.
    variables
        Of the ranks, over those that the controller has.
    max_idle
        Allocations in a row that neither saved nor committed anything, after which the job fails.
    restarts_in_place
        How often in a row, without a new checkpoint, crashed ranks are started again in the same allocation.
    """

    job_id: str
    folder: str
    run_dir: str
    command: tuple[str, ...]
    allocations: tuple[Allocation, ...]
    times: Times
    variables: Mapping[str, str]
    max_idle: int
    restarts_in_place: int = 0

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan that :meth:`write` wrote."""
        values: dict[str, Any] = json.loads(path.read_bytes())
        return cls(
            **{
                **values,
                "command": tuple(values["command"]),
                "allocations": tuple(Allocation(**each) for each in values["allocations"]),
                "times": Times(**values["times"]),
            }
        )

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @property
    def path(self) -> Path:
        """Where the controller finds the plan."""
        return Path(self.folder) / f"{self.job_id}_plan.json"

    @property
    def cancelled(self) -> bool:
        """Whether the job was cancelled, perhaps before it had a controller."""
        return cancel_path(Path(self.folder), self.job_id).exists()

    @property
    def state_path(self) -> Path:
        """The job's state file."""
        return state_path(Path(self.folder), self.job_id)

    def log_path(self, rank: int) -> Path:
        """Where a rank's output goes; the name is submitit's."""
        return Path(self.folder) / f"{self.job_id}_{rank}_log.out"


#: Starts a rank: ``spawn(command, variables, log_path)``.
Spawn = Callable[[Sequence[str], Mapping[str, str], Path], Process]


class Controller:
    """Runs a job to its end.

    Parameters
    ----------
    plan
        The job.
    inherited
        Variables that the ranks start from.
    clock, sleep, spawn
        Unix time, waiting, and starting a rank; arguments, so that a test waits for nothing.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        inherited: Mapping[str, str],
        clock: Clock,
        sleep: Callable[[float], None],
        spawn: Spawn,
    ) -> None:
        self.plan = plan
        self._inherited = inherited
        self._clock, self._sleep, self._spawn = clock, sleep, spawn
        self._run_directory = RunDirectory(Path(plan.run_dir))
        self._cancel = self._preempt = self._expire = False
        self.state = initial_state(plan, pid=os.getpid())

    def cancel(self) -> None:
        """Ask for the end of the job; safe in a signal handler."""
        self._cancel = True

    def preempt(self) -> None:
        """Ask for the end of the attempt; safe in a signal handler."""
        self._preempt = True

    def expire(self) -> None:
        """Bring the warning of the time limit; safe in a signal handler."""
        self._expire = True

    def run(self) -> LocalState:
        """Give allocations until the job is over, and return its last state."""
        self._write()  # from now on, this process is the one to signal
        self._cancel = self._cancel or self.plan.cancelled
        try:
            return self._run()
        except Exception as error:
            self._write(state="FAILED", why=f"embedded scheduler: {type(error).__name__}: {error}")
            raise

    def _run(self) -> LocalState:
        idle, committed, restarts, place = 0, self._committed(), 0, 0
        while not self._cancel:
            began_s, begun = self._clock(), self._begun()
            attempt = self._allocation(restarts, self.plan.allocations[place])
            if self._cancel:
                break
            outcome = _outcome(attempt)
            if outcome.decision == "continue":
                before, committed = committed, self._committed()
                idle = 0 if EXIT_CONTINUE in attempt.exit_codes or committed != before else idle + 1
                if idle >= self.plan.max_idle:
                    hint = (
                        "; the last ended before hr.Run began: was there time enough to start (time_limit_s)?"
                    )
                    outcome = Outcome(
                        decision="stop",
                        why=f"{outcome.why}; no new checkpoint in {idle} attempts (budget.max_idle)"
                        + (hint if self._begun() == begun else ""),
                    )
            if outcome.decision != "continue":
                return self._write(
                    state="COMPLETED" if outcome.decision == "done" else "FAILED", why=outcome.why
                )
            restarts += 1
            last = len(self.plan.allocations) - 1
            place = (place + 1) % (last + 1) if self._declined(since=begun) else min(place + 1, last)
            self._write(
                state="PENDING",
                reason=None,
                restarts=restarts,
                preempt_time=None,
                end_time=None,
                why=outcome.why,
            )
            self._pause(began_s)
        return self._write(state="CANCELLED", reason=None, why="cancelled")

    def _allocation(self, restarts: int, allocation: Allocation) -> Attempt:
        """Use up one allocation: an attempt, and after a crash another in its place; gives the last one."""
        began_s = self._clock()
        end_s = None if allocation.time_limit_s is None else began_s + allocation.time_limit_s
        self._preempt = self._expire = False
        self._write(
            state="RUNNING",
            reason=None,
            restarts=restarts,
            preempt_time=None,
            end_time=end_s,
            node_type=allocation.name,
            ranks=allocation.ranks,
            exit_codes=(),
            why="",
        )
        committed, in_place = self._committed(), 0
        for step in itertools.count():
            known, step_began_s = len(self._run_directory.attempt_numbers()), self._clock()
            attempt = self._attempt(allocation, restarts, step, began_s=began_s)
            before, committed = committed, self._committed()
            in_place = 0 if committed != before else in_place
            if self._cancel or self._preempt or not attempt.left_alone:
                break
            if not starts_again(
                tuple(attempt.telling_codes.values()),
                self._words(known),
                left_s=None if end_s is None else end_s - self._clock(),
                least_s=self.plan.times.warning_lead_s,
                restarts=in_place,
                most=self.plan.restarts_in_place,
            ):
                break
            in_place += 1
            self._write(why=f"started again in place after exit codes {attempt.exit_codes}")
            self._pause(step_began_s)
            if self._cancel:
                break
        return attempt

    def _words(self, known: int) -> list[JsonObject]:
        """Give what the newest attempt's journal says of its end, if it is none of the ``known`` ones."""
        numbers = self._run_directory.attempt_numbers()
        if len(numbers) <= known:
            return []
        return read_events(self._run_directory.attempt(numbers[-1]) / "events.jsonl", WORDS)

    def _attempt(self, allocation: Allocation, restarts: int, step: int, *, began_s: float) -> Attempt:
        """Run one attempt to its end."""
        for stale in Path(self.plan.folder).glob(f"{self.plan.job_id}_*_result.pkl*"):
            stale.unlink()  # submitit would take an earlier attempt's result for this one's
        processes: list[Process] = []
        try:
            for rank in range(allocation.ranks):
                variables = {**self._inherited, **self._variables(allocation, restarts, step, rank)}
                processes.append(self._spawn(self.plan.command, variables, self.plan.log_path(rank)))
            attempt = Attempt(
                allocation, self.plan.times, processes, began_s=began_s, note=self._write, restarts=restarts
            )
            while not attempt.step(
                self._clock(), cancel=self._cancel, preempt=self._preempt, expire=self._expire
            ):
                self._sleep(_POLL_S)
        except BaseException:
            for process in processes:
                process.send(signal.SIGKILL)
            raise
        self._write(exit_codes=attempt.exit_codes)
        self._leave_codes(attempt, restarts)
        return attempt

    def _leave_codes(self, attempt: Attempt, restarts: int) -> None:
        """Leave for the next attempt how the ranks ended: one that was killed could not say so itself."""
        path = self._run_directory.exit_codes_path(self.plan.job_id, restarts)
        if path.parent.is_dir():  # else no attempt has begun
            DISK.write_file(path, json.dumps(attempt.telling_codes).encode())

    def _pause(self, began_s: float) -> None:
        while not self._cancel and self._clock() < began_s + _SHORTEST_CYCLE_S:
            self._sleep(_POLL_S)

    def _variables(self, allocation: Allocation, restarts: int, step: int, rank: int) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // allocation.ranks)
        return {
            "OMP_NUM_THREADS": self._inherited.get("OMP_NUM_THREADS", str(threads)),
            **self.plan.variables,
            "HPC_RESUME_RUN_DIR": self.plan.run_dir,
            "HPC_RESUME_JOB_STATE": str(self.plan.state_path),
            "HPC_RESUME_RESTART_COUNT": str(restarts),
            "HPC_RESUME_STEP": str(step),
            "HPC_RESUME_NODE_TYPE": allocation.name,
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_PREEMPT_SIGNAL": self.plan.times.warning_signal,
            "SUBMITIT_LOCAL_JOB_ID": self.plan.job_id,
            "SUBMITIT_LOCAL_NTASKS": str(allocation.ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }

    def _committed(self) -> str | None:
        try:
            names = active_names(self._run_directory)
        except IntegrityError:
            return None  # the next attempt says so
        return names[-1] if names else None

    def _begun(self) -> int:
        """Give the number of the run's last attempt."""
        return max(self._run_directory.attempt_numbers(), default=0)

    def _declined(self, *, since: int) -> bool:
        """Whether an attempt after number ``since`` was not to go on on what it was given."""
        run = self._run_directory
        journals = [run.attempt(n) / "events.jsonl" for n in run.attempt_numbers() if n > since]
        return any(event.get("cause") == "declined" for path in journals for event in read_events(path))

    def _write(self, **changes: Any) -> LocalState:
        self.state = dataclasses.replace(self.state, **changes)
        self.state.write(self.plan.state_path)
        return self.state


def initial_state(plan: Plan, *, pid: int) -> LocalState:
    """State of a job that process ``pid`` is going to run."""
    return LocalState(
        job_id=plan.job_id,
        state="PENDING",
        run_dir=plan.run_dir,
        node_type=plan.allocations[0].name,
        ranks=plan.allocations[0].ranks,
        host=os.uname().nodename,
        controller_pid=pid,
        controller_ticks=process_ticks(pid) or 0,
    )


def _outcome(attempt: Attempt) -> Outcome:
    """Decide from the codes; one that was ended from outside is continued whatever a rank made of it."""
    outcome = after_exit(tuple(attempt.telling_codes.values()))
    if outcome.decision == "stop" and attempt.ended_by is not None:
        return Outcome(decision="continue", why=f"ended by {attempt.ended_by}; {outcome.why}")
    return outcome


class RankProcess:
    """A rank as the leader of its own session, so that what it started can be killed with it.

    Signals go to the rank alone, SIGKILL to its whole group; what is left of the group when the rank has
    ended is killed too. The group's number can't be another's by then, because the rank is not yet reaped.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log_path: Path) -> None:
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(variables),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has no threads
            )

    def poll(self) -> int | None:
        """Exit code, or ``None`` while it runs."""
        if self._process.returncode is None:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self._process.pid, flags) is None:
                return None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return self._process.returncode

    def send(self, number: int) -> None:
        """Send a signal."""
        if self._process.returncode is None:
            (os.killpg if number == signal.SIGKILL else os.kill)(self._process.pid, number)


def _die_with_parent() -> None:
    """Have the kernel kill a rank whose controller was killed: no rank outlives its job."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Run the plan whose path is given."""
    plan = Plan.read(Path(arguments[0]))
    controller = Controller(plan, inherited=os.environ, clock=time.time, sleep=time.sleep, spawn=RankProcess)
    signal.signal(signal.SIGTERM, lambda *_: controller.cancel())
    signal.signal(signal.SIGINT, lambda *_: controller.cancel())
    signal.signal(signal.SIGUSR1, lambda *_: controller.preempt())
    signal.signal(signal.SIGUSR2, lambda *_: controller.expire())
    return 0 if controller.run().state == "COMPLETED" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
