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
    failed_nodes
        Nodes of the job that are down.
    evidence
        The fields as they were read, or why they could not be.
    """

    state: str
    reason: str | None = None
    restarts: int | None = None
    preempt_time_s: float | None = None
    end_time_s: float | None = None
    failed_nodes: tuple[str, ...] = ()
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Which job an earlier attempt was of, where it ran, and when.

    Parameters
    ----------
    job_id, restart_count
        Of its job.
    nodes
        Its nodes.
    began_s, last_sign_s
        Unix times: its start, and when it was last heard of.
    """

    job_id: str
    restart_count: int
    nodes: tuple[str, ...]
    began_s: float
    last_sign_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PastJob:
    """What a scheduler says afterwards of an attempt that is over.

    Parameters
    ----------
    state
        Its last state, in Slurm's word; empty if nothing is known.
    reason
        Slurm's word, as for :class:`JobFacts`.
    requeued
        The scheduler has restarted the job since.
    failed_nodes
        Nodes of the attempt that are down, do not respond, or have been booted since.
    evidence
        The fields as they were read.
    """

    state: str = ""
    reason: str | None = None
    requeued: bool = False
    failed_nodes: tuple[str, ...] = ()
    evidence: str = ""


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

    def look_back(self, past: Whereabouts) -> PastJob:
        """Look an earlier attempt up, of this job or of one before it; never raises."""
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

    def look_back(self, past: Whereabouts) -> PastJob:  # noqa: ARG002 - as above
        """Know nothing."""
        return PastJob()
