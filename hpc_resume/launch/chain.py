"""The jobs of Slurm that go on from each other, as a login node sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, JobFacts
from hpc_resume.scheduler.notes import Notes
from hpc_resume.scheduler.queue import SlurmQueue

#: A job in one of these states has a future.
UNFINISHED = ALIVE | {"PENDING", "COMPLETING"}
#: States after which nothing more happens; the last two are ours, see :meth:`JobHandle.state`.
#: A requeued job is PENDING again at once.
OVER = frozenset(
    {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "DEADLINE",
        "PREEMPTED",
        "NODE_FAIL",
        "BOOT_FAIL",
        "OUT_OF_MEMORY",
        "REVOKED",
        "GONE",
        "LOST",
    }
)


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
        """Find the job that runs, or waits to run; if there is none, the one that has begun last.

        If Slurm does not answer for one of them, and none of the others runs or waits, it is that one: nobody knows
        then that the chain is over.
        """
        latest = self.latest()
        looked = []
        for job_id in [latest, *self.waiting(latest)]:
            facts = self.queue.facts(job_id)
            if facts.state in UNFINISHED:
                return job_id, facts
            looked.append((job_id, facts))
        return next((each for each in looked if self.unanswered(each[1])), looked[0])

    def unanswered(self, facts: JobFacts) -> bool:
        """Whether Slurm has not said how a job is: it may run, or wait to run."""
        return facts.state == UNKNOWN and not self.queue.forgotten(facts)

    def cancel(self, why: str) -> None:
        """End the chain for good: first what waits, then what runs. What is over already is passed over.

        Raises
        ------
        SchedulerError
            If Slurm refuses.
        """
        latest = self.latest()
        if self.notes.read("latest", self.first) and not self.over():
            self.notes.write("over", self.first, why)
        for job_id in [*self.waiting(latest), latest]:
            if self._is_over(job_id):
                continue
            try:
                self.queue.cancel(job_id)
            except SchedulerError:
                if not self._is_over(job_id):  # else it has ended meanwhile
                    raise

    def _is_over(self, job_id: str) -> bool:
        """Whether Slurm has said that a job is over; it may have forgotten it since."""
        facts = self.queue.facts(job_id)
        return facts.state in OVER or self.queue.forgotten(facts)

    def waiting(self, latest: str) -> Iterator[str]:
        """Give the jobs that are to go on from the latest one; the rest of an array goes by the array's id."""
        yield from self.notes.after(latest)
        if latest.startswith(f"{self.first}_"):
            yield self.first
