"""Jobs as people hold them: submit a run or an array of runs, look at it, wait for it, end it."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, SchedulerError, UsageError
from hpc_resume.launch.chain import OVER
from hpc_resume.launch.handle import (
    LOCAL_POLL_S,
    JobHandle,
    cancel_elements,
    find_jobs,
    latest_job,
    states_of,
)
from hpc_resume.launch.submit import submit as submit_run
from hpc_resume.launch.sweep import Submission, submit_sweep
from hpc_resume.report.checkpoints import CheckpointSummary, list_checkpoints
from hpc_resume.report.explain import Explanation, explain
from hpc_resume.report.status import RunStatus, status
from hpc_resume.report.sweeps import ElementStatus, JobWord, read_element, sweep_table
from hpc_resume.report.tables import Table, status_table
from hpc_resume.sweepdir import SweepDirectory

_Target = Callable[..., Any] | str | Sequence[str]
_Settings = Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None


@overload
def submit(
    target: _Target, /, *, config: _Settings = None, run_dir: str | Path | None = None, **kwargs: Any
) -> Job: ...


@overload
def submit(
    target: _Target,
    runs: Iterable[Mapping[str, Any]],
    /,
    *,
    config: _Settings = None,
    run_dir: str | Path | None = None,
    **kwargs: Any,
) -> Sweep: ...


def submit(
    target: _Target,
    runs: Iterable[Mapping[str, Any]] | None = None,
    /,
    *,
    config: _Settings = None,
    run_dir: str | Path | None = None,
    **kwargs: Any,
) -> Job | Sweep:
    """Submit a run, or an array of runs.

    Parameters
    ----------
    target
        A function, ``"file.py:function"``, ``"package.module:function"``, or a command as a list of words.
    runs
        Arguments of several runs: ``hr.grid(lr=[1e-3, 3e-4], seed=range(4))``, or a list of dicts.
    config
        Settings: a :class:`~hpc_resume.config.Config`, a YAML file or several, or a dict of settings.
    run_dir
        The run's folder, over the one that the settings say; of an array, the folder that its runs' are in.
    **kwargs
        Arguments of the function, the same in all runs.

    Returns
    -------
    Job or Sweep
        Shows itself as a table: of the run's attempts, or of the runs.

    Raises
    ------
    UsageError
        If something is missing or contradicts itself, or the job of a single run is still alive; nothing has
        been written then.
    SchedulerError
        If the scheduler refuses, or does not say whether a job of this run is still alive.
    """
    if runs is None:
        return Job(submit_run(target, config=config, run_dir=run_dir, **kwargs))
    submission = submit_grid(target, runs, config, run_dir=run_dir, kwargs=kwargs)
    if submission.left:
        warnings.warn(submission.sentences()[-1], stacklevel=2)
    return Sweep.submitted(submission)


def submit_grid(
    target: _Target,
    runs: Iterable[Mapping[str, Any]],
    config: _Settings,
    *,
    run_dir: str | Path | None,
    kwargs: Mapping[str, Any],
) -> Submission:
    """Submit an array of runs, except those that are done; see :func:`submit`."""
    return submit_sweep(
        target,
        runs,
        config,
        run_dir=run_dir,
        kwargs=kwargs,
        finished=lambda run: status(run).state == "done",
    )


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
    def poll_s(self) -> float:
        """Seconds between two looks at :attr:`state`, if you wait for it: Slurm is asked each time."""
        return self._handle.poll_s

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


class Sweep:
    """An array of runs: each has a directory and a job of its own.

    ``sweep[3]`` and ``sweep["lr=0.001,seed=3"]`` are the jobs of single runs.

    Parameters
    ----------
    folder
        The folder that the runs' folders are in.
    names
        Which of them, in this order; by default all, in the order of their first submission.
    note
        Shown below the table.

    Raises
    ------
    CheckpointNotFound
        If the folder holds no array of runs.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] | None = None, *, note: str = "") -> None:
        self._directory = SweepDirectory(Path(folder).resolve())
        self._name = str(self._directory.identity().get("name"))
        self.names = tuple(self._directory.names() if names is None else names)
        """Names of the runs, which are their folders'."""
        self._note = note

    @classmethod
    def submitted(cls, submission: Submission) -> Sweep:
        """Give the runs that were just submitted, with a note on what became of them."""
        return cls(submission.folder, submission.names, note="\n".join(submission.sentences()))

    @property
    def folder(self) -> Path:
        """The folder that the runs' folders are in."""
        return self._directory.root

    @property
    def runs(self) -> dict[str, Job]:
        """The newest job of each run by the run's name; one that never had a job is not in it."""
        return {name: Job(job) for name, job in self._jobs().items()}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, run: int | str) -> Job:
        """Give the newest job of a run, by its place or name."""
        if isinstance(run, str) and run not in self.names:
            raise UsageError(f"{self.folder}: has no run {run!r}; see sweep.names")
        return Job.of(self._directory.run(run if isinstance(run, str) else self.names[run]).root)

    def __iter__(self) -> Iterator[Job]:
        return iter(self.runs.values())

    def states(self) -> dict[str, str]:
        """Tell how each run's newest job is, in Slurm's words, by the run's name; Slurm is asked once for all.

        Raises
        ------
        SchedulerError
            If it does not answer.
        """
        return _states(self._jobs())

    def status(self) -> list[ElementStatus]:
        """Read how each run is."""
        jobs = self._jobs()
        try:
            states = _states(jobs)
        except SchedulerError:
            states = dict.fromkeys(jobs, "UNKNOWN")  # where there is no Slurm, the folder tells enough
        words = {
            name: JobWord(
                job_id=job.job_id,
                state=states[name],
                over=None if states[name] == "UNKNOWN" else states[name] in OVER,
            )
            for name, job in jobs.items()
        }
        return [read_element(self._directory.run(name), words.get(name)) for name in self.names]

    def wait(self, timeout_s: float | None = None) -> dict[str, str]:
        """Wait until every job is over, however often each is continued, and return their states.

        Raises
        ------
        TimeoutError
            If they are not over after ``timeout_s``; they go on.
        """
        jobs = self._jobs()
        poll_s = max((job.poll_s for job in jobs.values()), default=LOCAL_POLL_S)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                states = _states(jobs)
            except SchedulerError:
                states = dict.fromkeys(jobs, "UNKNOWN")  # it will answer again
            if not (alive := [name for name, state in states.items() if state not in OVER]):
                return states
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(alive)} of {len(self)} runs are not over after {timeout_s:g} s; they go on: "
                    f"hpc-resume status {self.folder}"
                )
            time.sleep(poll_s)

    def cancel(self) -> None:
        """End the jobs of all runs for good, those that wait too; ranks may save first.

        Raises
        ------
        SchedulerError
            If some can't be ended, after all others were; with the reasons.
        """
        jobs = self._jobs()
        arrays: dict[str, list[str]] = defaultdict(list)
        ends: list[Callable[[], None]] = []
        for name, state in _states(jobs).items():
            if state in OVER:
                continue
            array, element = jobs[name].job_id.partition("_")[::2]
            if jobs[name].scheduler == "slurm" and element.isdecimal():
                arrays[array].append(element)
            else:
                ends.append(jobs[name].cancel)
        ends += [partial(cancel_elements, array, elements) for array, elements in arrays.items()]
        refused = []
        for end in ends:
            try:
                end()
            except SchedulerError as error:
                refused.append(str(error))
        if refused:
            raise SchedulerError("; ".join(refused))

    def table(self) -> Table:
        """Show the runs, one a row."""
        return sweep_table(self._name, self.status(), note=self._note)

    def __repr__(self) -> str:
        return "\n".join(self.table().lines())

    def _repr_html_(self) -> str:
        return self.table().html()

    def _jobs(self) -> dict[str, JobHandle]:
        found = {name: find_jobs(self._directory.run(name).root) for name in self.names}
        return {name: jobs[-1] for name, jobs in found.items() if jobs}


def _states(jobs: Mapping[str, JobHandle]) -> dict[str, str]:
    return dict(zip(jobs, states_of(list(jobs.values())), strict=True))
