"""From the login node: submit a run again that waits for it, or have its pending job ask for other nodes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, SchedulerError, UsageError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import read_events
from hpc_resume.launch.chain import UNFINISHED, Chain
from hpc_resume.launch.handle import job_of_attempt, latest_job
from hpc_resume.launch.onemachine import clean_environment
from hpc_resume.launch.script import node_type_options
from hpc_resume.launch.submit import only
from hpc_resume.provenance.running import take_source, what_changed
from hpc_resume.provenance.source import read_source
from hpc_resume.provenance.sources import Sources
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.queue import HOPELESS, SlurmQueue
from hpc_resume.settings import NodeType

#: A resubmission that has not said within this which job it has submitted has died. sbatch takes 10 s at most.
_STALE_CLAIM_S = 60.0
#: How long the scheduler may take to look at a job that was changed, before that counts as accepted.
_LOOK_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was found, and done about it.

    Parameters
    ----------
    job_id
        The job that was submitted or changed; ``None`` if none was.
    over
        Whether nothing will ever have to be done again.
    why
        In words.
    """

    job_id: str | None
    over: bool
    why: str


class Resubmission:
    """Looks after one run from the login node.

    Parameters
    ----------
    run_dir
        The run directory.
    queue
        Slurm's.
    clock, sleep
        Unix time in seconds, and waiting.

    Raises
    ------
    CheckpointNotFound
        If there is no such run, or no job of it is known.
    UsageError
        If it does not run under Slurm.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        queue: SlurmQueue | None = None,
        clock: Clock = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run = RunDirectory(run_dir.resolve())
        self._run.identity()
        job = latest_job(self._run.root)
        if job.scheduler != "slurm":
            raise UsageError(f"{run_dir}: its job is the embedded scheduler's, which continues it by itself")
        self._queue, self._clock, self._sleep = queue or SlurmQueue(), clock, sleep
        self._chain = Chain(self._run.root, job.job_id, self._queue)
        self._notes = self._chain.notes

    # ---------------------------------------------------------------- submitting again

    def refresh_source(self) -> str:
        """Have the run's next attempts run the code as it is now; gives what changed, in words.

        Raises
        ------
        UsageError
            If its jobs run what is there when they start anyway, or one of them runs now.
        SchedulerError
            If Slurm does not say whether one runs.
        """
        sources = Sources.of(self._run)
        before = sources.chosen()
        if before is None:
            raise UsageError(
                f"{self._run.root}: its jobs run the code as it is when an attempt begins (environment.source=live); "
                "there is no snapshot to take anew"
            )
        job_id, facts = self._chain.current()
        if facts.state in UNFINISHED and facts.state != "PENDING":
            raise UsageError(f"job {job_id} is {facts.state}: its ranks run the code that it has begun with")
        if self._chain.unanswered(facts):
            raise SchedulerError(f"job {job_id}: {facts.evidence}; the run's source is as it was; try again")
        source = read_source(Path(before.root))
        if source is None:
            raise UsageError(
                f"{before.root}: the project is not there any more; submit the run as you did before"
            )
        chosen = take_source(sources, source)
        sources.choose(chosen)
        return what_changed(self._run, before, chosen) or "nothing has changed"

    def resubmit(self) -> Answer:
        """Submit the run again, if it was interrupted and no job of it is alive; once, whoever else tries.

        Raises
        ------
        SchedulerError
            If Slurm can't be asked, or refuses.
        """
        job_id, facts = self._chain.current()
        if facts.state in UNFINISHED:
            return Answer(job_id=None, over=False, why=f"job {job_id} is {facts.state}")
        if over := self._over(job_id):
            return Answer(job_id=None, over=True, why=over)
        if self._chain.unanswered(facts):
            raise SchedulerError(f"job {job_id}: {facts.evidence}; nothing was submitted")
        if facts.state == "CANCELLED":
            return self._cancelled(job_id)
        for waited in self._notes.after(job_id):
            if self._queue.facts(waited).state == "CANCELLED":
                return self._cancelled(waited)
        return self._submit_after(job_id)

    def watch(self, *, every_s: float, say: Callable[[str], None]) -> Answer:
        """Look again and again until the run is over; submit it again, and move it on, when that is due.

        Parameters
        ----------
        every_s
            Seconds between two looks.
        say
            Told in words what has changed.
        """
        last = ""
        while True:
            try:
                answer = self.resubmit()
                if answer.job_id is None and not answer.over:
                    answer = self._move_on_if_due() or answer
            except SchedulerError as error:  # the controller may be away for a while
                answer = Answer(job_id=None, over=False, why=str(error))
            if answer.why != last:
                last = answer.why
                say(last)
            if answer.over:
                return answer
            self._sleep(every_s)

    def _over(self, job_id: str) -> str:
        """Why nothing is to come; empty if something is."""
        if over := self._chain.over():
            return over
        if (ended := self._last_word()).get("decision") in {"done", "stop"}:
            return str(ended.get("why"))
        if not self._notes.path("script", self._chain.first).exists():
            raise CheckpointNotFound(
                f"{self._run.root}: job {job_id} has left no script to submit again "
                f"({self._notes.path('script', self._chain.first)}); submit the run as you did before"
            )
        return ""

    def _last_word(self) -> JsonObject:
        """Give the event that ended the last attempt, if that was one of these jobs."""
        numbers = self._run.attempt_numbers()
        if (
            not numbers
            or (job := job_of_attempt(self._run, numbers[-1])) is None
            or job.job_id != self._chain.first
        ):
            return {}
        events = read_events(self._run.attempt(numbers[-1]) / "events.jsonl")
        return next((event for event in reversed(events) if event.get("event") == "ended"), {})

    def _cancelled(self, job_id: str) -> Answer:
        why = f"a person cancelled job {job_id}"
        self._notes.write("over", self._chain.first, why)
        return Answer(job_id=None, over=True, why=why)

    def _submit_after(self, job_id: str) -> Answer:
        comment = f"hpc_resume: after {job_id}"
        if not self._notes.claim("after", job_id):
            if (found := self._queue.find(comment)) is not None:
                self._notes.write("after", job_id, found)  # whoever submitted it died before saying so
                return Answer(job_id=None, over=False, why=f"job {found} waits to go on")
            fresh = self._notes.age_s("after", job_id, self._clock()) < _STALE_CLAIM_S
            if (fresh and not self._notes.after(job_id)) or not self._notes.drop("after", job_id):
                return Answer(job_id=None, over=False, why="somebody else is submitting it")
            if not self._notes.claim("after", job_id):
                return Answer(job_id=None, over=False, why="somebody else is submitting it")
        number = self._notes.first_type(self._chain.first)
        try:
            new = self._submit(job_id, number, [f"--comment={comment}"])
        except SchedulerError:
            self._notes.drop("after", job_id)
            raise
        self._notes.write("after", job_id, new)
        return Answer(job_id=new, over=False, why=f"submitted as job {new}, which goes on from job {job_id}")

    def _submit(self, job_id: str, number: int, options: list[str]) -> str:
        folder = self._notes.read("folder", self._chain.first)
        with only(clean_environment(os.environ)):
            new = self._queue.submit(
                self._notes.path("script", self._chain.first),
                self._chain.first,
                job_id,
                str(number),
                options=[*options, *self._options(number)],
                folder=Path(folder) if folder else None,
            )
        self._notes.write("type", new, str(number))
        return new

    def _options(self, number: int) -> list[str]:
        config = self._config()
        return node_type_options(config, number) if len(config.node_types) > 1 else []

    def _config(self) -> Config:
        """Give the settings of the last attempt."""
        handle = latest_job(self._run.root)
        return Config.load(self._run.configs / f"{handle.config}.yaml")

    # ---------------------------------------------------------------- other node types

    def move_on(self, to: str | None = None) -> Answer:
        """Have the pending job ask for the next node type, or for the one of this name.

        In place where the new type has as many nodes, ranks, CPUs, GPUs and bytes; else by another job in its
        place, because a job keeps the variables that describe its shape from its submission.

        Raises
        ------
        UsageError
            If there is no such node type.
        SchedulerError
            If no job waits, or Slurm could never run it there; nothing has been changed then.
        """
        types = self._config().node_types
        job_id, _ = self._chain.current()
        if self._queue.waiting(job_id) is None:
            raise SchedulerError(f"job {job_id}: does not wait for nodes, so it can't ask for others")
        number = self._number(job_id)
        wanted = self._wanted(types, number, to)
        for sibling in self._notes.after(self._chain.latest()):
            if sibling != job_id and self._number(sibling) == wanted:
                self._queue.change(sibling, {"StartTime": "now"})
                return Answer(
                    job_id=sibling, over=False, why=f"job {sibling} may begin on {types[wanted].name} now"
                )
        script = self._notes.path("script", self._chain.first)
        self._queue.check(script, node_type_options(self._config(), wanted))
        if _same_shape(types[number], types[wanted]) and self._moved_in_place(job_id, number, wanted):
            return Answer(job_id=job_id, over=False, why=f"job {job_id} asks for {types[wanted].name} now")
        return self._replaced(job_id, wanted, types[wanted].name)

    def _move_on_if_due(self) -> Answer | None:
        """Move on if the pending job has waited longer than its node type allows."""
        types = self._config().node_types
        job_id, _ = self._chain.current()
        waiting = self._queue.waiting(job_id)
        number = self._number(job_id)
        limit_s = types[number].wait_limit_s if number < len(types) else None
        if waiting is None or limit_s is None or number + 1 >= len(types):
            return None
        _, since_s = waiting
        return self.move_on() if self._clock() - since_s > limit_s else None

    def _number(self, job_id: str) -> int:
        number = self._notes.read("type", job_id)
        return int(number) if number.isdecimal() else 0

    def _wanted(self, types: tuple[NodeType, ...], number: int, to: str | None) -> int:
        names = [node_type.name for node_type in types]
        if to is None and number + 1 < len(types):
            return number + 1
        if to in names:
            return names.index(to)
        what = f"{to!r} is none of its node types" if to else f"{names[number]} is the last of its node types"
        raise UsageError(f"{self._run.root}: {what}, which are {', '.join(names)}")

    def _moved_in_place(self, job_id: str, number: int, wanted: int) -> bool:
        """Change the job, and see what the scheduler says of it; undone if it could never run."""
        types = self._config().node_types
        self._notes.write("type", job_id, str(wanted))  # before the job can begin there
        try:
            self._queue.change(job_id, _place(types[wanted]))
            deadline_s = self._clock() + _LOOK_S
            while (waiting := self._queue.waiting(job_id)) is not None and self._clock() < deadline_s:
                if waiting[0] in HOPELESS:
                    raise SchedulerError(waiting[0])
                if waiting[0]:
                    break
                self._sleep(0.5)
        except SchedulerError:
            self._notes.write("type", job_id, str(number))
            self._queue.change(job_id, _place(types[number]))
            return False
        return True

    def _replaced(self, job_id: str, wanted: int, name: str) -> Answer:
        """Submit a job of the other type in place of a pending one, which is held lest both begin."""
        latest = self._chain.latest()
        self._queue.hold(job_id)
        try:
            new = self._submit(latest, wanted, [])
        except SchedulerError:
            self._queue.release(job_id)
            raise
        self._notes.write("after", latest, new)
        self._queue.cancel(job_id)
        return Answer(job_id=new, over=False, why=f"job {new} asks for {name} in place of job {job_id}")


def _same_shape(one: NodeType, other: NodeType) -> bool:
    names = ("nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "time_limit_s")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _place(node_type: NodeType) -> dict[str, str]:
    """Give the fields of ``scontrol update`` that say where; one that is empty is the site's default."""
    fields = {"Features": node_type.constraint or ""}
    if node_type.partition is not None:
        fields["Partition"] = node_type.partition
    return fields
