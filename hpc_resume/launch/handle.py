"""A submitted job: how it is, and how it is ended. Found again from the run directory alone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpc_resume.errors import CheckpointNotFound, IntegrityError, SchedulerError, UsageError
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.launch.chain import OVER, Chain
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import UNKNOWN

if TYPE_CHECKING:
    from hpc_resume.scheduler.arrays import SlurmArrays

SCHEMA = 1
#: Seconds between two looks at a job that is waited for. The embedded scheduler's is a file; Slurm's is a question
#: to slurmctld, and sites block who asks several times a second.
LOCAL_POLL_S = 0.2
SLURM_POLL_S = 10.0


def jobs_folder(run_dir: Path) -> Path:
    """Where the files of a run's jobs are: submission records, pickles, logs."""
    return run_dir / "jobs"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHandle:
    """One submitted job of a run.

    Parameters
    ----------
    scheduler
        ``"local"`` or ``"slurm"``.
    what
        What it runs, as text for people.
    config
        Digest of its configuration.
    submitted
        Unix seconds.
    returns
        Whether it runs a function, which has a result.
    """

    job_id: str
    scheduler: Literal["local", "slurm"]
    run_dir: Path
    what: str
    config: str
    submitted: float
    returns: bool = False

    def record(self, *, fs: Filesystem = DISK) -> None:
        """Write the record from which :func:`find_jobs` finds the job again."""
        values = {
            "schema": SCHEMA,
            "job_id": self.job_id,
            "scheduler": self.scheduler,
            "what": self.what,
            "config": self.config,
            "submitted": self.submitted,
            "returns": self.returns,
        }
        fs.write_file(self.record_path, json.dumps(values, indent=1).encode())

    @property
    def record_path(self) -> Path:
        """Where the record is."""
        return jobs_folder(self.run_dir) / f"{self.job_id}_job.json"

    def submitit_job(self) -> Any:
        """Give the job as submitit knows it, for its results: of those that go on from each other, the last."""
        folder = jobs_folder(self.run_dir)
        if self.scheduler == "local":
            from hpc_resume.launch.onemachine import OneMachineJob

            return OneMachineJob(folder=folder, job_id=self.job_id, tasks=(0,))
        from submitit.slurm.slurm import SlurmJob

        return SlurmJob(folder=folder, job_id=self.chain().latest(), tasks=(0,))

    def state(self) -> str:
        """Slurm's word for how the job is.

        Besides, ``LOST``: its controller was killed; ``GONE``: Slurm has forgotten it, minutes after its end;
        ``UNKNOWN``: this can't be found out from here.
        """
        if self.scheduler == "local":
            from hpc_resume.scheduler.local import LocalState, state_path

            try:
                record = LocalState.read(state_path(jobs_folder(self.run_dir), self.job_id))
            except (OSError, IntegrityError):
                return "UNKNOWN"
            return record.state if record.state in OVER or record.alive() else "LOST"
        chain = self.chain()
        _, facts = chain.current()
        if facts.state in OVER and chain.over().startswith("a person cancelled"):
            return "CANCELLED"  # a person has ended what was to go on from the last job
        return "GONE" if chain.queue.forgotten(facts) else facts.state

    @property
    def poll_s(self) -> float:
        """Seconds between two looks at it, if somebody waits for it."""
        return LOCAL_POLL_S if self.scheduler == "local" else SLURM_POLL_S

    def chain(self) -> Chain:
        """Give the job with those that go on from it; under Slurm only."""
        from hpc_resume.scheduler.queue import SlurmQueue

        return Chain(self.run_dir, self.job_id, SlurmQueue())

    def cancel(self) -> None:
        """End the job for good, and all that go on from it; its ranks may save first. Harmless when it is over.

        Raises
        ------
        SchedulerError
            If it can't be reached from here.
        """
        if self.scheduler == "local":
            self.submitit_job().cancel()
        else:
            self.chain().cancel("a person cancelled it by hpc-resume cancel")

    def preempt(self) -> None:
        """Take the allocation away, as a more important job would; embedded scheduler only.

        Raises
        ------
        UsageError
            Under Slurm, where only others can preempt a job.
        """
        if self.scheduler != "local":
            raise UsageError(
                f"job {self.job_id}: Slurm preempts jobs for other jobs, not on request; "
                f"to rehearse it: scancel --signal=USR2 {self.job_id}"
            )
        self.submitit_job().preempt()

    def log_path(self, rank: int = 0) -> Path:
        """Where a rank's output is; of jobs that go on from each other, the last one's."""
        job_id = self.job_id if self.scheduler == "local" else self.chain().latest()
        return jobs_folder(self.run_dir) / f"{job_id}_{rank}_log.out"

    def wait(self, *, timeout_s: float | None = None, clock: Clock = time.monotonic) -> str:
        """Wait until the job is over, however often it is continued, and return its state.

        Raises
        ------
        TimeoutError
            If it is not over after ``timeout_s``; the job goes on.
        """
        deadline = None if timeout_s is None else clock() + timeout_s
        while (state := self.state()) not in OVER:
            if deadline is not None and clock() > deadline:
                raise TimeoutError(
                    f"job {self.job_id} is {state} after {timeout_s:g} s; it goes on: hpc-resume status {self.run_dir}"
                )
            time.sleep(self.poll_s)
        return state


def find_jobs(run_dir: Path) -> list[JobHandle]:
    """Find all jobs of a run in the order of submission: ours, and those that a person gave to ``sbatch``.

    Raises
    ------
    IntegrityError
        If a record is damaged.
    """
    jobs = {}
    for path in jobs_folder(run_dir).glob("*_job.json"):
        try:
            values = json.loads(path.read_bytes())
            fields = {
                key: values[key] for key in ("job_id", "scheduler", "what", "config", "submitted", "returns")
            }
            jobs[values["job_id"]] = JobHandle(run_dir=run_dir, **fields)
        except (ValueError, LookupError, TypeError) as error:
            raise IntegrityError(f"{path}: damaged ({error})") from error
    run = RunDirectory(run_dir)
    for number in run.attempt_numbers():
        job = job_of_attempt(run, number)
        if job is not None:
            jobs.setdefault(job.job_id, job)
    return sorted(jobs.values(), key=lambda job: (job.submitted, job.job_id))


def job_of_attempt(run: RunDirectory, number: int) -> JobHandle | None:
    """Give the job of an attempt under Slurm: of those that go on from each other, the first."""
    try:
        record = json.loads((run.attempt(number) / "attempt.json").read_bytes())
        if record["kind"] != "slurm" or not record["job_id"]:
            return None
        return JobHandle(
            job_id=str(record.get("chain") or record["job_id"]),
            scheduler="slurm",
            run_dir=run.root,
            what="",
            config=str(record["config"]),
            submitted=float(record["started"]),
        )
    except (OSError, ValueError, LookupError, TypeError):
        return None  # an attempt that has only just been claimed, or is damaged: status says so


def latest_job(run_dir: Path) -> JobHandle:
    """Find the job that was submitted last.

    Raises
    ------
    CheckpointNotFound
        If there is none.
    """
    jobs = find_jobs(run_dir)
    if not jobs:
        RunDirectory(run_dir).identity()  # says so if it is none
        raise CheckpointNotFound(
            f"{run_dir}: no job of this run is known, so it was started by hand; look at it where it runs, and "
            "end it there (Ctrl-C)"
        )
    return jobs[-1]


def states_of(jobs: Sequence[JobHandle], *, slurm: SlurmArrays | None = None) -> list[str]:
    """Tell how many jobs are, as :meth:`JobHandle.state` does one; Slurm is asked once for all.

    Raises
    ------
    SchedulerError
        If Slurm does not answer.
    """
    remembered: dict[str, str] = {}
    # A group may share its runs: whoever has submitted a job has written its record.
    users = {job.record_path.stat().st_uid for job in jobs if job.scheduler == "slurm"}
    if users:
        from hpc_resume.scheduler.arrays import SlurmArrays

        remembered = (slurm or SlurmArrays()).job_states(users)
    return [remembered.get(job.job_id, "GONE") if job.scheduler == "slurm" else job.state() for job in jobs]


def cancel_elements(array: str, elements: Sequence[str]) -> None:
    """End elements of one of Slurm's job arrays for good, all in one command.

    Raises
    ------
    SchedulerError
        If Slurm refuses.
    """
    from hpc_resume.scheduler.slurm import SlurmScheduler

    SlurmScheduler(f"{array}_[{','.join(elements)}]").cancel()


def live_job(run_dir: Path) -> JobHandle | None:
    """Find a job of the run that is not over, if there is one.

    Raises
    ------
    SchedulerError
        If Slurm does not say of a job whether it is over. Where there is no Slurm, nothing is known of its jobs, and
        they don't count: whoever copies a run to another machine may go on with it there.
    """
    for job in reversed(find_jobs(run_dir)):
        state = job.state()
        if state == UNKNOWN and job.scheduler == "slurm" and shutil.which("scontrol") is not None:
            raise SchedulerError(
                f"{run_dir}: Slurm does not say whether job {job.job_id} of this run is over, and two jobs can't own "
                f"one run; nothing was submitted; try again when it answers: scontrol show job {job.job_id}"
            )
        if state not in OVER | {UNKNOWN}:
            return job
    return None
