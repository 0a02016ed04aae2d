"""Submission to Slurm: submitit's executor, with our batch script in place of its own."""

from __future__ import annotations

import math
import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.files import DISK
from hpc_resume.launch.grid import PlannedRun
from hpc_resume.launch.handle import jobs_folder
from hpc_resume.launch.script import RunList, render


class ResumeSlurmExecutor(submitit.SlurmExecutor):
    """Submits functions to Slurm.

    submitit's own script ends with the ranks, so only a rank can have the job continued, and only while it
    lives. Ours looks at how they ended, too.

    Parameters
    ----------
    folder
        Where the jobs' files go: ``RUN_DIR/jobs``, on a filesystem that the nodes see.
    config
        Node type, times and environment.
    run_dir
        The run's folder.
    config_path
        The stored configuration.
    """

    def __init__(self, folder: Path, *, config: Config, run_dir: Path, config_path: Path) -> None:
        python = config.environment.interpreter
        super().__init__(folder, python=None if python is None else shlex.quote(python))
        self._config = config
        self._run_dir = run_dir
        self._config_path = config_path
        node_type = config.node_types[0]
        limit_s = node_type.time_limit_s or config.time_limit_s
        # submitit only counts ranks and minutes with these; the script is written from the configuration.
        self.update_parameters(
            nodes=node_type.nodes,
            ntasks_per_node=node_type.tasks_per_node,
            **({} if limit_s is None else {"time": math.ceil(limit_s / 60)}),
        )

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002 - submitit's signature
        # "%" means something in Slurm's file names, and the folder may have one.
        pattern = str(JobPaths(folder=Path(str(self.folder).replace("%", "%%"))).stdout)
        if self._config.continuation == "array":
            pattern = pattern.replace("%j", "%A_%a")
        return render(
            self._config,
            command=command,
            run_dir=self._run_dir,
            config_path=self._config_path,
            output=pattern.replace("%t", "0"),
            rank_output=pattern,
            pickles=self.folder,
            variables={"SUBMITIT_EXECUTOR": "slurm"},
        )

    def _submit_command(self, command: str) -> Any:
        try:
            return super()._submit_command(command)
        except submitit.core.utils.FailedJobError as error:
            raise SchedulerError(f"sbatch refused the job: {error}") from error

    def _internal_process_submissions(self, delayed_submissions: Sequence[DelayedSubmission]) -> Any:
        if len(delayed_submissions) > 1:
            raise UsageError(
                "a job array is more than one run, and each needs a run directory: hr.submit(f, hr.grid(...))"
            )
        return super()._internal_process_submissions(list(delayed_submissions))


class ArrayExecutor(ResumeSlurmExecutor):
    """Submits runs as the elements of one job array.

    The files of each run's job lie in its own directory, as those of a run that was submitted alone.

    Parameters
    ----------
    folder
        Where the array's script, its list of runs and the logs of its batch scripts go.
    config
        Node type, times and environment of all.
    run_dir
        The folder that the runs are in.
    runs
        The runs; their directories are there.
    at_once
        How many of them run at the same time at most.
    after
        Id of an array that must be over before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        run_dir: Path,
        runs: Sequence[PlannedRun],
        at_once: int | None = None,
        after: str | None = None,
    ) -> None:
        list_path = folder / f"{uuid.uuid4().hex}_runs.txt"
        super().__init__(folder, config=config, run_dir=run_dir, config_path=list_path)
        self._runs = runs
        self._script: Path | None = None
        self._list = RunList(path=list_path, size=len(runs), at_once=at_once, after=after)

    def submit_runs(self) -> list[str]:
        """Submit the array, and return the job id of each run.

        Raises
        ------
        SchedulerError
            If ``sbatch`` refuses; nothing is left behind then.
        """
        lines = [line for run in self._runs for line in (str(run.run.root), str(run.config_path))]
        DISK.write_file(self._list.path, "".join(f"{line}\n" for line in lines).encode())
        pickles = [jobs_folder(run.run.root) / f"{uuid.uuid4().hex}.pkl" for run in self._runs]
        try:
            for run, pickle in zip(self._runs, pickles, strict=True):
                call = DelayedSubmission(run.entry)
                call.set_timeout(self.parameters.get("time", 5), self.max_num_timeout)
                call.dump(pickle)
            array = self._submit_command(self._submitit_command_str).job_id
        except BaseException:
            for path in (*pickles, self._list.path, self._script):
                if path is not None:
                    path.unlink(missing_ok=True)
            raise
        ids = [f"{array}_{place}" for place in range(len(self._runs))]
        for job_id, pickle in zip(ids, pickles, strict=True):
            JobPaths(pickle.parent, job_id=job_id).move_temporary_file(pickle, "submitted_pickle")
        return ids

    @property
    def _submitit_command_str(self) -> str:
        return f'{self.python} -u -m submitit.core._submit "$HPC_RESUME_RUN_DIR/jobs"'

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        self._script = submission_file_path
        return list(super()._make_submission_command(submission_file_path))

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002 - submitit's signature
        folder = str(self.folder).replace("%", "%%")
        return render(
            self._config,
            command=command,
            run_dir=self._run_dir,
            runs=self._list,
            output=f"{folder}/%A_%a.log",
            variables={"SUBMITIT_EXECUTOR": "slurm"},
        )
