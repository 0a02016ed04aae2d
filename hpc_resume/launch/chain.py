"""The jobs of Slurm that go on from each other, as a login node sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.scheduler.base import ALIVE, JobFacts
from hpc_resume.scheduler.notes import Notes
from hpc_resume.scheduler.queue import SlurmQueue

#: A job in one of these states has a future.
UNFINISHED = ALIVE | {"PENDING", "COMPLETING"}


@dataclass(frozen=True, slots=True)
class Chain:
    """A job that was submitted, and those that go on from it.

    Parameters
    ----------
    run_dir
        The run directory.
    first
        Id of the job that was submitted.
    queue
        Slurm's.
    """

    run_dir: Path
    first: str
    queue: SlurmQueue

    @property
    def notes(self) -> Notes:
        """What its jobs tell each other."""
        return Notes(self.run_dir)

    def latest(self) -> str:
        """Id of the job that has begun last."""
        return self.notes.latest(self.first)

    def over(self) -> str:
        """Why no job comes after the latest one; empty if one may."""
        return self.notes.read("over", self.first)

    def current(self) -> tuple[str, JobFacts]:
        """Find the job that runs, or waits to run; if there is none, the one that has begun last."""
        latest = self.latest()
        last = self.queue.facts(latest)
        if last.state in UNFINISHED:
            return latest, last
        for job_id in self.waiting(latest):
            facts = self.queue.facts(job_id)
            if facts.state in UNFINISHED:
                return job_id, facts
        return latest, last

    def cancel(self, why: str) -> None:
        """End the chain for good: first what waits, then what runs.

        Raises
        ------
        SchedulerError
            If Slurm refuses.
        """
        latest = self.latest()
        if self.notes.read("latest", self.first) and not self.over():
            self.notes.write("over", self.first, why)
        for job_id in [*self.waiting(latest), latest]:
            if self.queue.facts(job_id).state in UNFINISHED or job_id == latest:
                self.queue.cancel(job_id)

    def waiting(self, latest: str) -> Iterator[str]:
        """Give the jobs that are to go on from the latest one; the rest of an array goes by the array's id."""
        yield from self.notes.after(latest)
        if latest.startswith(f"{self.first}_"):
            yield self.first
