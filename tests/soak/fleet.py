"""The runs of the soak: two of two ranks, one of them sharded, and an array of eight; and the same, uninterrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpc_resume as hr
from hpc_resume.launch.handle import latest_job
from hpc_resume.report.status import RunStatus, status
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.run.training import train

ELEMENTS = 8
#: What is submitted, and where: partitions that are preempted with and without a grace time.
GROUPS = {"ddp": "low", "fsdp": "low0", "array": "low"}


def train_soak(steps: int, step_s: float, kind: str = "ddp", seed: int = 0) -> None:
    """What every run does."""
    train(steps, step_s=step_s, kind=kind, every_steps=10, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One run of a fleet.

    Parameters
    ----------
    run_dir
        Its folder.
    group
        What it was submitted with.
    fleet
        Submits it again.
    """

    run_dir: Path
    group: str
    fleet: Fleet

    @property
    def name(self) -> str:
        """What it is called in the list of what happened."""
        return str(self.run_dir.relative_to(self.fleet.folder))

    @property
    def job_id(self) -> str:
        """Its present job."""
        return latest_job(self.run_dir).job_id

    @property
    def saved_step(self) -> int:
        """Step of its newest checkpoint."""
        names = RunDirectory(self.run_dir).checkpoint_names()
        return checkpoint_step(names[-1]) if names else 0

    def status(self) -> RunStatus:
        """How it is."""
        return status(self.run_dir)

    def resubmit(self) -> None:
        """Submit what it belongs to again."""
        self.fleet.submit(self.group)


class Fleet:
    """Two runs and an array of eight.

    Parameters
    ----------
    folder
        Where their folders are.
    steps, step_s
        Of each run; how long one takes at least.
    time_limit_s
        Of each job.
    groups
        Which of :data:`GROUPS`.
    """

    def __init__(
        self, folder: Path, *, steps: int, step_s: float, time_limit_s: float, groups: Sequence[str]
    ) -> None:
        self.folder = folder
        self.groups = tuple(groups)
        self._lock = threading.Lock()
        self.size = sum(ELEMENTS if group == "array" else 1 for group in groups)
        self._steps, self._step_s, self._time_limit_s = steps, step_s, time_limit_s

    def submit(self, group: str) -> Any:
        """Submit one of the runs, or the array; what is done or alive already is left alone."""
        with self._lock:
            return self._submit(group)

    def _submit(self, group: str) -> Any:
        settings = self._settings(group)
        steps = {"steps": self._steps, "step_s": self._step_s}
        if group == "array":
            grid = hr.grid(seed=range(ELEMENTS))
            return hr.submit(train_soak, grid, config=settings, run_dir=self.folder / group, **steps)
        return hr.submit(train_soak, config=settings, run_dir=self.folder / group, kind=group, **steps)

    def submit_all(self) -> None:
        """Submit everything."""
        for group in self.groups:
            self.submit(group)

    def members(self) -> Iterator[Member]:
        """Go through the runs that have been submitted."""
        # No deeper: runs that are under way come and go with folders of their own.
        for identity in sorted((*self.folder.glob("*/run.json"), *self.folder.glob("array/*/run.json"))):
            run_dir = identity.parent
            group = run_dir.relative_to(self.folder).parts[0]
            yield Member(run_dir=run_dir, group=group, fleet=self)

    def _settings(self, group: str) -> dict[str, Any]:
        alone = group == "array"
        return {
            "name": f"soak-{group}",
            "scheduler": "slurm",
            "time_limit_s": self._time_limit_s,
            "warning_lead_s": 20,
            "node_types": [
                {
                    "tasks_per_node": 1 if alone else 2,
                    "cpus_per_task": 1,
                    "mem_gb": 0.5,
                    "partition": GROUPS[group],
                }
            ],
            "environment": {"variables": {"OMP_NUM_THREADS": "1"}},
        }
