"""Submission to Slurm: submitit's executor, with our batch script in place of its own."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, JobPaths

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.launch.script import render


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
                "a job array is more than one run, and each needs a run directory; submit them one by one"
            )
        return super()._internal_process_submissions(list(delayed_submissions))
