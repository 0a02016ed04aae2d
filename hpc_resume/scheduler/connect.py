"""From a job environment to the scheduler that can be asked about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hpc_resume.scheduler.base import NoScheduler, Scheduler
from hpc_resume.scheduler.environment import JobEnvironment


def connect(environment: JobEnvironment, environ: Mapping[str, str]) -> Scheduler:
    """Return the scheduler of this process's job.

    Parameters
    ----------
    environment
        As detected.
    environ
        The variables that it was detected from.
    """
    if environment.kind == "slurm" and environment.job_id is not None:
        from hpc_resume.scheduler.slurm import SlurmScheduler

        return SlurmScheduler(
            environment.job_id,
            own_restarts=environment.restart_count,
            partition=environment.partition,
            nodes=environ.get("SLURM_JOB_NODELIST"),
        )
    if environment.kind == "local":
        from hpc_resume.scheduler.local import LocalScheduler

        return LocalScheduler(Path(environ["HPC_RESUME_JOB_STATE"]))
    return NoScheduler()
