"""The embedded scheduler as a submitit executor: jobs on this machine that are warned, preempted and continued.

Pickling, the rank's ``submitit.core._submit`` process and ``Job.result()`` are submitit's own.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit.local.local import LocalExecutor, LocalJob

from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError, SchedulerError
from hpc_resume.launch.attempt import Allocation, Times
from hpc_resume.launch.controller import Plan, initial_state
from hpc_resume.launch.software import software_lines
from hpc_resume.scheduler.ancestors import torchrun_variables
from hpc_resume.scheduler.local import LocalState, cancel_path, state_path

#: Starting an interpreter on a cold file system takes seconds.
START_S = 60.0
#: What another launcher left in the environment would be taken for ours.
_FOREIGN = ("SLURM_", "SLURMD_", "SRUN_", "TORCHELASTIC_", "SUBMITIT_", "HPC_RESUME_")
_FOREIGN_NAMES = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
#: Where Slurm's commands find the cluster: belongs to the machine, not to a job.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER"})


class OneMachineJob(LocalJob[Any]):
    """A job of the embedded scheduler; any process of this machine can hold one."""

    _results_timeout_s = 1  # the state says when a result is there

    def state_record(self) -> LocalState:
        """Read the job's state file."""
        return LocalState.read(state_path(self.paths.folder, self.job_id))

    @property
    def state(self) -> str:
        """Slurm's word for how the job is; ``LOST`` if its controller was killed."""
        try:
            record = self.state_record()
        except (OSError, IntegrityError):
            return "UNKNOWN"
        return record.state if record.alive() or record.state in _OVER else "LOST"

    def get_info(self, mode: str = "force") -> dict[str, str]:  # noqa: ARG002 - submitit's signature
        """Give the state as submitit asks for it."""
        return {"jobState": self.state}

    def done(self, force_check: bool = False) -> bool:  # noqa: ARG002 - submitit's signature
        """Whether the job is over."""
        return self.state in {*_OVER, "LOST"}

    def cancel(self, check: bool = True) -> None:  # noqa: ARG002 - submitit's signature
        """End the job for good; its ranks may save."""
        if self._reachable().alive():
            # One that still waits has no process of its own to tell, or gets it just now.
            cancel_path(self.paths.folder, self.job_id).touch()
            self._signal(signal.SIGTERM)

    def preempt(self) -> None:
        """Take the allocation away, as a more important job would; the next one follows."""
        self._signal(signal.SIGUSR1)

    def expire(self) -> None:
        """Bring the time limit: the ranks are warned at once, and ended when the warning lead has passed."""
        self._signal(signal.SIGUSR2)

    def _interrupt(self) -> None:
        self.preempt()

    def _signal(self, number: int) -> None:
        record = self._reachable()
        if record.alive():
            try:
                os.kill(record.controller_pid, number)
            except PermissionError:
                raise SchedulerError(
                    f"job {self.job_id}: belongs to someone else (process {record.controller_pid}); ask them to do this"
                ) from None

    def _reachable(self) -> LocalState:
        record = self.state_record()
        if record.host != os.uname().nodename:
            raise SchedulerError(
                f"job {self.job_id} runs on {record.host} and can only be reached from there; this is "
                f"{os.uname().nodename}"
            )
        return record


_OVER = frozenset({"COMPLETED", "FAILED", "CANCELLED"})


class OneMachineExecutor(LocalExecutor):
    """Submits functions to the embedded scheduler.

    Parameters
    ----------
    folder
        Where the jobs' files go: ``RUN_DIR/jobs``.
    config
        Node types, times and environment.
    run_dir
        The run's folder.
    variables
        More variables for the ranks.
    job_id
        Of the job that is submitted; by default a new one.
    start
        Has the job run; by default at once.
    """

    job_class = OneMachineJob

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        run_dir: Path,
        variables: dict[str, str] | None = None,
        job_id: str | None = None,
        start: Callable[[Plan], None] | None = None,
    ) -> None:
        python = config.environment.interpreter
        super().__init__(folder, python=None if python is None else shlex.quote(python))
        self._config = config
        self._run_dir = run_dir
        self._variables = variables or {}
        self._job_id = job_id
        self._start = start or start_controller

    @classmethod
    def affinity(cls) -> int:
        """Available, but only used when asked for."""
        return 0

    def _submit_command(self, command: str) -> OneMachineJob:
        config, job_id = self._config, self._job_id or new_job_id()
        plan = Plan(
            job_id=job_id,
            folder=str(self.folder),
            run_dir=str(self._run_dir),
            command=_with_setup(shlex.split(command), software_lines(config.environment)),
            allocations=tuple(
                Allocation(
                    name=node_type.name,
                    ranks=node_type.ranks,
                    time_limit_s=node_type.time_limit_s or config.time_limit_s,
                    preempt_after_s=node_type.preempt_after_s,
                    grace_s=node_type.grace_s,
                )
                for node_type in config.node_types
            ),
            times=Times(
                warning_lead_s=config.warning_lead_s,
                warning_signal=config.warning_signal,
                kill_wait_s=config.stop.kill_wait_s,
            ),
            variables={
                **torchrun_variables(config.warning_lead_s),
                **config.environment.variables,
                **self._variables,
            },
            max_idle=config.budget.max_idle,
            restarts_in_place=config.budget.restarts_in_place,
        )
        self._start(plan)
        return OneMachineJob(folder=self.folder, job_id=job_id, tasks=(0,))


def new_job_id() -> str:
    """Make an id that is never given out again: the time, and four random digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def start_controller(
    plan: Plan, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Start the controller of a job, and wait until it can be cancelled.

    Raises
    ------
    SchedulerError
        If it does not come up; with what it said.
    """
    hold(plan)
    log_path = Path(plan.folder) / f"{plan.job_id}_controller.log"
    hand_over("hpc_resume.launch.controller", plan.path, log_path, [plan], clock=clock, sleep=sleep)


def hand_over(
    module: str,
    argument: Path,
    log_path: Path,
    plans: Sequence[Plan],
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Have jobs that this process holds looked after by one that outlives it.

    Parameters
    ----------
    module, argument
        What the process runs, and its one argument.
    log_path
        Where it writes.
    plans
        The jobs, in the order in which it takes them over.
    clock, sleep
        Seconds.

    Raises
    ------
    SchedulerError
        If it does not take them; with what it said. The jobs are then written down as they were before.
    """
    process = spawn_detached(module, argument, log_path)
    deadline = clock() + START_S
    while LocalState.read(plans[-1].state_path).controller_pid == os.getpid():
        if process.poll() is not None or clock() > deadline:
            process.kill()
            process.wait()
            for plan in plans:
                initial_state(plan, pid=process.pid).write(plan.state_path)
            raise SchedulerError(
                f"job {', '.join(plan.job_id for plan in plans)}: the embedded scheduler did not start "
                f"(exit code {process.returncode}); its log, {log_path}, ends:\n{log_path.read_text()[-2000:]}"
            )
        sleep(0.01)
    process.returncode = 0  # it outlives us: no warning that a child still runs


def hold(plan: Plan) -> None:
    """Write a job down as one that waits, and that this process looks after."""
    plan.write(plan.path)
    initial_state(plan, pid=os.getpid()).write(plan.state_path)


def spawn_detached(module: str, argument: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Run a module with one argument in a process that outlives this one, and holds nothing of it."""
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(argument)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=clean_environment(os.environ),
            start_new_session=True,
        )


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Copy the environment without what launchers, this one included, leave for their processes.

    Settings in ``HPC_RESUME_*`` variables are already in the resolved configuration, under any flags.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not (name.startswith(_FOREIGN) or name in _FOREIGN_NAMES)
    }


def _with_setup(command: Sequence[str], setup: Sequence[str]) -> tuple[str, ...]:
    """Run shell lines before a command, in the shell that then becomes the command."""
    if not setup:
        return tuple(command)
    script = "\n".join(["set -e", *setup, 'exec "$@"'])
    return ("bash", "-c", script, "setup", *command)
