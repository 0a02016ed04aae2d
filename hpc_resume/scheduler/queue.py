"""Jobs of a run as a login node sees them in Slurm's queue."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.base import UNKNOWN, JobFacts
from hpc_resume.scheduler.client import FINAL, SlurmClient
from hpc_resume.scheduler.command import Runner
from hpc_resume.scheduler.slurm import SlurmScheduler, parse_job

#: Slurm gives a job these reasons for waiting that waiting does not change. Source: job_reason_codes in squeue(1).
HOPELESS = frozenset(
    {
        "BadConstraints",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "PartitionConfig",
        "InvalidAccount",
        "InvalidQOS",
    }
)
#: The second is said of an element that waited when it was cancelled, while others of its array are there (measured).
_FORGOTTEN = re.compile(r"invalid job id|job [0-9_]+ not found", re.IGNORECASE)


class SlurmQueue:
    """Submits, looks up, changes and cancels jobs.

    Parameters
    ----------
    runner
        Runs a command; a test gives its own.
    """

    def __init__(self, runner: Runner | None = None) -> None:
        self._runner = runner
        self._client = SlurmClient(runner)

    def facts(self, job_id: str) -> JobFacts:
        """Look a job up; never raises. One that Slurm has forgotten is looked for in its accounting."""
        facts = SlurmScheduler(job_id, runner=self._runner).facts()
        if self.forgotten(facts):
            try:
                words = ["sacct", "-X", "--noheader", "--parsable2", "--format=State", f"--jobs={job_id}"]
                done = self._client.once(words)
            except FileNotFoundError:
                return facts
            # Of several lines, one for each time that it was requeued, the last; "CANCELLED by 1000".
            if done.code == 0 and (lines := done.out.split("\n")[:-1]):
                return JobFacts(state=lines[-1].split()[0], evidence=f"sacct: {lines[-1]}")
        return facts

    def forgotten(self, facts: JobFacts) -> bool:
        """Whether Slurm has said that it knows no such job."""
        return facts.state == UNKNOWN and _FORGOTTEN.search(facts.evidence) is not None

    def waiting(self, job_id: str) -> tuple[str, float] | None:
        """Tell why a job waits, and since when it could have begun, in Unix seconds; ``None`` if it does not wait.

        Raises
        ------
        SchedulerError
            If it can't be looked up.
        """
        try:
            text = self._client.ask(["scontrol", "show", "job", job_id], expect="JobState=")
        except FileNotFoundError:
            raise SchedulerError(f"job {job_id}: there is no scontrol here") from None
        facts = parse_job(text)
        eligible = re.search(r"^\s+SubmitTime=\S+ EligibleTime=(\d+)", text, re.MULTILINE)
        if facts.state != "PENDING" or facts.reason == "Dependency" or eligible is None:
            return None
        return facts.reason or "", float(eligible[1])

    def find(self, comment: str) -> str | None:
        """Find a job of this user by its comment.

        Raises
        ------
        SchedulerError
            If the queue can't be looked at.
        """
        try:
            done = self._client.retry(
                ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i %k"], final=FINAL
            )
        except FileNotFoundError:
            raise SchedulerError(
                "there is no squeue here; go to a machine where Slurm is installed"
            ) from None
        if done.code != 0:
            raise SchedulerError(f"squeue: {done.complaint}")
        found = (line.partition(" ") for line in done.out.splitlines())
        return next((job_id for job_id, _, text in found if text.strip() == comment), None)

    def submit(
        self, script: Path, *words: str, options: Sequence[str] = (), folder: Path | None = None
    ) -> str:
        """Submit a script with arguments, and return the job's id.

        Raises
        ------
        SchedulerError
            If Slurm refuses.
        """
        where = [] if folder is None else [f"--chdir={folder}"]
        done = self._sbatch(["--parsable", *options, *where, str(script), *words])
        return done.strip().partition(";")[0]

    def check(self, script: Path, options: Sequence[str]) -> None:
        """Ask whether a script could be run with these options, without submitting it.

        Raises
        ------
        SchedulerError
            If not.
        """
        self._sbatch(["--test-only", *options, str(script)])

    def change(self, job_id: str, fields: Mapping[str, str]) -> None:
        """Change what a waiting job asks for; see :meth:`SlurmScheduler.change`."""
        SlurmScheduler(job_id, runner=self._runner).change(fields)

    def hold(self, job_id: str) -> None:
        """Keep a waiting job from beginning.

        Raises
        ------
        SchedulerError
            If it does not wait any more.
        """
        self._scontrol("hold", job_id)

    def release(self, job_id: str) -> None:
        """Let a job that was held begin."""
        self._scontrol("release", job_id)

    def _scontrol(self, verb: str, job_id: str) -> None:
        done = self._client.retry(["scontrol", verb, job_id], final=(*FINAL, "no longer pending"))
        if done.code != 0:
            raise SchedulerError(f"job {job_id}: scontrol {verb} was refused: {done.complaint}")

    def cancel(self, job_id: str) -> None:
        """End a job; see :meth:`SlurmScheduler.cancel`."""
        SlurmScheduler(job_id, runner=self._runner).cancel()

    def _sbatch(self, words: Sequence[str]) -> str:
        try:
            # Once: sbatch may have submitted a job although it says nothing.
            done = self._client.once(["sbatch", *words])
        except FileNotFoundError:
            raise SchedulerError(
                "there is no sbatch here; go to a machine where Slurm is installed"
            ) from None
        if done.code != 0:
            raise SchedulerError(f"sbatch refused the job: {done.complaint}")
        return done.out
