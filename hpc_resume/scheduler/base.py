"""What any scheduler is asked: what is happening to this job, and please run it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

#: The lookup failed.
UNKNOWN = "UNKNOWN"
#: There is no scheduler to ask.
NONE = "NONE"
#: States of a job that nobody is ending. While slurmctld delivers a signal, ``SIGNALING`` stands in place of
#: ``RUNNING`` (measured: the warning before a time limit often finds it so); a job that is being ended shows
#: ``COMPLETING`` even then. Source: job_state_string() in slurm_protocol_defs.c.
ALIVE = frozenset({"RUNNING", "SIGNALING", "RESIZING", "CONFIGURING", "SUSPENDED", "STOPPED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """A job as its scheduler describes it at one moment.

    Parameters
    ----------
    state
        Slurm's word: ``RUNNING``, ``COMPLETING`` …; ``UNKNOWN`` if the lookup failed, ``NONE`` without a
        scheduler.
    reason
        Slurm's word: ``TimeLimit``, ``NodeDown`` …; ``None`` if there is none.
    restarts
        How often the scheduler has restarted the job, a requeue that is on its way included.
    preempt_time_s
        When the preemption of this attempt began, Unix seconds; ``None`` if it is not being preempted.
    end_time_s
        When the job ends at the latest, Unix seconds.
    evidence
        The fields as they were read, or why they could not be.
    """

    state: str
    reason: str | None = None
    restarts: int | None = None
    preempt_time_s: float | None = None
    end_time_s: float | None = None
    evidence: str


class Scheduler(Protocol):
    """What the library needs of a scheduler; one object speaks of one job."""

    def facts(self) -> JobFacts:
        """Look the job up; never raises."""
        ...

    def requeue(self) -> bool:
        """Have the job run again under its id.

        Returns
        -------
        bool
            ``True``: it will, perhaps because someone asked before. ``False``: this cannot be done from
            here, only by leaving with exit code 75.

        Raises
        ------
        SchedulerError
            If it was refused.
        """
        ...

    def node_type(self, node: str) -> str | None:
        """Name the kind of a node, such as ``"main/a100"``; ``None`` if nothing is known."""
        ...


class NoScheduler:
    """Stands in where no scheduler is: plain ``python``, ``torchrun`` by hand."""

    def facts(self) -> JobFacts:
        """Say that there is nobody to ask."""
        return JobFacts(state=NONE, evidence="no scheduler")

    def requeue(self) -> bool:
        """Return ``False``: whoever started the process must start it again."""
        return False

    def node_type(self, node: str) -> str | None:  # noqa: ARG002 - the protocol's signature
        """Return ``None``."""
        return None
