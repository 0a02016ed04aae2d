"""Jobs as people hold them: submit a run, look at it, wait for it, end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, UsageError
from hpc_resume.launch.handle import OVER, JobHandle, latest_job
from hpc_resume.launch.submit import submit as submit_run
from hpc_resume.report.checkpoints import CheckpointSummary, list_checkpoints
from hpc_resume.report.explain import Explanation, explain
from hpc_resume.report.status import RunStatus, status
from hpc_resume.report.tables import Table, status_table


def submit(
    target: Callable[..., Any] | str | Sequence[str],
    /,
    *,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None = None,
    run_dir: str | Path | None = None,
    **kwargs: Any,
) -> Job:
    """Submit a run; see :func:`hpc_resume.launch.submit.submit` for parameters and errors.

    Returns
    -------
    Job
        Shows itself as a table of the run's attempts.
    """
    return Job(submit_run(target, config=config, run_dir=run_dir, **kwargs))


class Job:
    """A submitted job and the run that it works on.

    Parameters
    ----------
    handle
        The job as it was submitted.
    """

    def __init__(self, handle: JobHandle) -> None:
        self._handle = handle

    @classmethod
    def of(cls, run_dir: str | Path) -> Job:
        """Find the job of a run that was submitted last, from any process.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        """
        return cls(latest_job(Path(run_dir).resolve()))

    @property
    def id(self) -> str:
        """Id of the job; it stays the same when the job is continued."""
        return self._handle.job_id

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._handle.run_dir

    @property
    def state(self) -> str:
        """Slurm's word for how the job is: ``PENDING``, ``RUNNING``, ``COMPLETED`` …; ``LOST`` if it was killed."""
        return self._handle.state()

    @property
    def checkpoints(self) -> list[CheckpointSummary]:
        """The run's checkpoints by ascending step."""
        return list_checkpoints(self.run_dir)

    def status(self) -> RunStatus:
        """Read how the run is: attempts, causes, steps, what was lost."""
        return status(self.run_dir)

    def explain(self) -> Explanation:
        """Tell what ended each attempt, what was decided and why, and what comes next."""
        return explain(self.run_dir)

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait until the job is over, however often it is continued, and return its state.

        Raises
        ------
        TimeoutError
            If it is not over after ``timeout_s``; the job goes on.
        """
        return self._handle.wait(timeout_s=timeout_s)

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the job, and give what the function returned on rank 0.

        Raises
        ------
        submitit.core.utils.UncompletedJobError
            If it failed or was cancelled; with its log.
        TimeoutError
            As :meth:`wait`.
        UsageError
            If it runs a command, which returns nothing.
        """
        self.wait(timeout_s)
        if not self._handle.returns:
            raise UsageError(f"job {self.id}: runs a command, which has no result; read its log: job.log()")
        return self._handle.submitit_job().result()

    @staticmethod
    def over(state: str) -> bool:
        """Whether nothing more happens after a state."""
        return state in OVER

    def cancel(self) -> None:
        """End the job for good; its ranks may save first."""
        self._handle.cancel()

    def preempt(self) -> None:
        """Take the allocation away, as a more important job would; embedded scheduler only."""
        self._handle.preempt()

    def log(self, rank: int = 0) -> str:
        """Read what a rank has printed, over all attempts of the job."""
        path = self._handle.log_path(rank)
        try:
            return path.read_text(errors="replace")
        except FileNotFoundError:
            raise CheckpointNotFound(
                f"{path}: no such log; rank {rank} has not begun yet, or there is none"
            ) from None

    def table(self) -> Table:
        """Show the run's attempts, and the job's state until the first has begun."""
        shown = status_table(self.status())
        return Table(
            title=f"{shown.title} (job {self.id}: {self.state})",
            columns=shown.columns,
            rows=shown.rows,
            right=shown.right,
            note=shown.note,
        )

    def __repr__(self) -> str:
        return "\n".join(self.table().lines())

    def _repr_html_(self) -> str:
        return self.table().html()
