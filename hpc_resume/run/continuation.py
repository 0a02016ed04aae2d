"""How a run goes on in another job, as seen from its rank 0.

The batch script does most of it: it runs on the host even if the ranks are in a container, and lives on when
they are killed. What rank 0 has decided stands in notes beside the run (:mod:`hpc_resume.scheduler.notes`), and
is done by whoever comes to it first.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

from hpc_resume.config import Config
from hpc_resume.errors import EXIT_CONTINUE, SchedulerError
from hpc_resume.policy.decision import Decision
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import Scheduler
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.notes import Notes
from hpc_resume.scheduler.slurm import SlurmScheduler


class Continuation(Protocol):
    """One way to go on; rank 0 alone has one."""

    def prepare(self) -> str:
        """See at the start of an attempt that the next one is provided for; says how, or nothing."""
        ...

    def go_on(self, decision: Decision, *, already: bool = False) -> str:
        """Have the run continued as was decided; says how.

        Parameters
        ----------
        decision
            What the next attempt is to be like.
        already
            The scheduler runs the job again by itself.

        Raises
        ------
        SchedulerError
            If the scheduler refuses; exit code 75 is what remains.
        """
        ...

    def leave(self, decision: Decision) -> str:
        """Leave it to exit code 75, on which whoever started the ranks acts; says to whom."""
        ...

    def end(self, why: str) -> None:
        """Have nothing come after this attempt: the run is done, or was stopped for good."""
        ...


class ByExitCode:
    """Leaves with exit code 75, and calls nobody: whoever started the ranks acts on it.

    Parameters
    ----------
    words
        Who that is.
    """

    def __init__(self, words: str) -> None:
        self._words = words

    def prepare(self) -> str:
        """Do nothing."""
        return ""

    def go_on(self, decision: Decision, *, already: bool = False) -> str:  # noqa: ARG002 - the protocol's signature
        """Say who goes on."""
        return self._words

    def leave(self, decision: Decision) -> str:  # noqa: ARG002 - the protocol's signature
        """Say who goes on."""
        return self._words

    def end(self, why: str) -> None:
        """Do nothing: another exit code says it."""


class ByScript:
    """Leaves notes for our batch script, which has queued a successor (chain, array) or acts on exit code 75.

    Parameters
    ----------
    kind
        ``"requeue"``, ``"chain"``, ``"array"``, ``"exit"`` or ``"login"``.
    config
        Of the run.
    environment
        Of this job, which has an id.
    notes
        Of the run.
    """

    def __init__(self, kind: str, config: Config, environment: JobEnvironment, notes: Notes) -> None:
        assert environment.job_id is not None
        assert environment.chain is not None
        self._kind, self._config, self._notes = kind, config, notes
        self._job_id, self._chain = environment.job_id, environment.chain
        self._node_type = environment.node_type

    def prepare(self) -> str:
        """Say which job waits to go on from this one."""
        if self._kind == "array":
            return "the next element of the array goes on"
        if self._kind != "chain":
            return ""
        if after := self._notes.after(self._job_id):
            return f"job {' or '.join(after)} waits to go on"
        return "no job waits to go on: sbatch has refused it (see the log); tried again at the end"

    def go_on(self, decision: Decision, *, already: bool = False) -> str:
        """Write down what the next job is to be like."""
        said = ["the scheduler has requeued it" if already else self.prepare() or self._who()]
        try:
            if decision.delay_s > 0:
                self._notes.write("delay", self._job_id, f"{decision.delay_s:.0f}")
                said.append(f"not before {decision.delay_s:.0f} s from now")
            if decision.exclude:
                self._notes.write("exclude", self._job_id, excluded(self._config, decision))
                said.append(f"not on {', '.join(decision.exclude)}")
            if decision.move_on:
                said.append(self._move_on())
        except OSError as error:
            said.append(f"the rest can't be noted ({error})")
        return ", ".join(said)

    def leave(self, decision: Decision) -> str:
        """Write down what the next job is to be like."""
        return self.go_on(decision)

    def end(self, why: str) -> None:
        """Write down that it is over; the script, and any job that starts all the same, keep to it."""
        with contextlib.suppress(OSError):  # the exit code says it, too
            self._notes.write("over", self._chain, " ".join(why.split()))

    def _who(self) -> str:
        if self._kind == "login":
            return f"waits for the login node: hpc-resume resubmit {self._notes.root}"
        return f"left to the batch script by exit code {EXIT_CONTINUE}"

    def _move_on(self) -> str:
        names = [node_type.name for node_type in self._config.node_types]
        current = names.index(self._node_type) if self._node_type in names else 0
        if current + 1 >= len(names):
            return f"again on {names[current]}, which is the last node type"
        self._notes.write("from", self._chain, str(current + 1))
        return f"on {names[current + 1]}"


class ByRequeue:
    """Requeues the job; if that can't be done from here, the batch script does it on exit code 75.

    Parameters
    ----------
    scheduler
        Of this job.
    config
        Of the run.
    script
        What our batch script is told; ``None`` if it did not start the ranks.
    """

    def __init__(self, scheduler: SlurmScheduler, config: Config, script: ByScript | None) -> None:
        self._scheduler, self._config, self._script = scheduler, config, script

    def prepare(self) -> str:
        """Do nothing: a requeue needs no preparation."""
        return ""

    def go_on(self, decision: Decision, *, already: bool = False) -> str:
        """Requeue, and have the job wait or be elsewhere if that was decided."""
        left = self.leave(decision)
        if decision.move_on and self._script is not None and not already:
            return left  # the script submits a job for another node type
        if not already and not self._scheduler.requeue():
            return left
        done = "the scheduler has requeued it" if already else "requeued"
        fields = {}
        if decision.delay_s > 0:
            fields["StartTime"] = f"now+{decision.delay_s:.0f}"
        if decision.exclude:
            fields["ExcNodeList"] = excluded(self._config, decision)
        if not fields:
            return done
        wishes = ", ".join(f"{name} {value}" for name, value in fields.items())
        try:
            self._scheduler.change(fields)
        except SchedulerError as error:
            return f"{done}, without {wishes}: {error}"
        return f"{done} with {wishes}"

    def leave(self, decision: Decision) -> str:
        """Leave it to the batch script."""
        return f"left to exit code {EXIT_CONTINUE}" if self._script is None else self._script.go_on(decision)

    def end(self, why: str) -> None:
        """Have the batch script requeue nothing, whatever becomes of other ranks."""
        if self._script is not None:
            self._script.end(why)


def excluded(config: Config, decision: Decision) -> str:
    """Give the nodes that the next attempt must not get: those of the settings, too, which it would replace."""
    return ",".join(filter(None, (config.slurm.exclude, *decision.exclude)))


def choose(
    config: Config, environment: JobEnvironment, scheduler: Scheduler, directory: RunDirectory
) -> Continuation:
    """Pick the way that was configured, as far as it is there where the ranks run.

    Parameters
    ----------
    config
        Of the run.
    environment, scheduler
        Of this job.
    directory
        The run directory.
    """
    if environment.kind != "slurm" or not isinstance(scheduler, SlurmScheduler):
        return ByExitCode(f"left to exit code {EXIT_CONTINUE}")
    kind = config.continuation
    script = None
    if environment.launcher_requeues:
        script = ByScript(kind, config, environment, Notes(directory.root))
    if kind == "requeue":
        return ByRequeue(scheduler, config, script)
    return script or ByExitCode(
        f"left to exit code {EXIT_CONTINUE}: our batch script, which would act on continuation {kind}, did not "
        "start these ranks (hpc-resume script prints it)"
    )
