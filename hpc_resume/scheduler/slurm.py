"""What Slurm is asked and told about one job, by its own commands.

``scontrol`` is enough: accounting (``sacct``) is missing on many sites, slow on others, and late on all.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Mapping

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, JobFacts, PastJob, Whereabouts
from hpc_resume.scheduler.client import FINAL, SlurmClient, says
from hpc_resume.scheduler.command import Runner
from hpc_resume.scheduler.lookback import failed_nodes, last_state

#: Slurm's answers to a requeue of a job that has been requeued (measured; the wording differs by version).
_PENDING_ALREADY = ("already pending", "pending execution", "already requeued")
#: A requeue continues a job in these states, or one that is being ended for these reasons. In any other it
#: would undo what a person did.
_REQUEUE_STATES = ALIVE | {"PENDING"}
_REQUEUE_REASONS = frozenset({"TimeLimit", "NodeDown", "NodeFail"})


class SlurmScheduler:
    """One job of Slurm.

    Parameters
    ----------
    job_id
        ``"123"``; for an element of an array ``"120_3"``, never its bare number, which may be the array's.
    own_restarts
        Restart count of the attempt that asks; 0 from a login node.
    partition
        Part of a node type's name.
    nodes
        The job's nodes, as Slurm abbreviates them: ``"big[1-2]"``.
    runner
        Runs a command; a test gives its own.
    """

    def __init__(
        self,
        job_id: str,
        *,
        own_restarts: int = 0,
        partition: str | None = None,
        nodes: str | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.job_id = job_id
        self._own_restarts = own_restarts
        self._partition = partition
        self._nodes = nodes
        self._client = SlurmClient(runner)

    def facts(self) -> JobFacts:
        """Look the job up; a lookup that fails gives the state ``UNKNOWN`` and the reason as evidence."""
        try:
            facts = self._lookup()
            if facts.restarts is not None and facts.restarts > self._own_restarts:
                return self._with_why_requeued(facts)
        except SchedulerError as error:
            return JobFacts(state=UNKNOWN, evidence=str(error))
        except FileNotFoundError:
            return JobFacts(state=UNKNOWN, evidence="there is no scontrol here (a container?)")
        return facts

    def requeue(self) -> bool:
        """Have the job run again, unless someone cancelled it.

        ``scontrol requeue`` brings a cancelled job back to life, and saving took its time since the last
        look. So it looks once more.

        Raises
        ------
        SchedulerError
            If Slurm refuses, or the job is being ended by a cancel, or can't be looked up.
        """
        try:
            facts = self._lookup()
        except FileNotFoundError:
            return False
        if facts.restarts is not None and facts.restarts > self._own_restarts:
            return True
        ours = facts.state in _REQUEUE_STATES or facts.reason in _REQUEUE_REASONS
        # A preempted job shows its PreemptTime for as long as Slurm does not requeue it by itself (measured).
        if not ours and facts.preempt_time_s is None:
            raise SchedulerError(
                f"job {self.job_id}: not requeued, because it is being ended ({facts.evidence}); "
                "if nobody cancelled it, submit it again: it continues from its last checkpoint"
            )
        done = self._client.retry(["scontrol", "requeue", self.job_id], final=(*FINAL, *_PENDING_ALREADY))
        if done.code == 0 or says(done, _PENDING_ALREADY):
            return True
        raise SchedulerError(
            f"job {self.job_id}: scontrol requeue was refused: {done.complaint}; "
            "leave with exit code 75 and let the batch script requeue, or submit it again: "
            "it continues from its last checkpoint"
        )

    def change(self, fields: Mapping[str, str]) -> None:
        """Change what the job asks for, while it waits in the queue.

        Parameters
        ----------
        fields
            As ``scontrol update`` calls them. Slurm accepts what it can never schedule, too.

        Raises
        ------
        SchedulerError
            If Slurm refuses.
        """
        words = ["scontrol", "update", f"JobId={self.job_id}"]
        words += [f"{name}={value}" for name, value in fields.items()]
        try:
            done = self._client.retry(words, final=FINAL)
        except FileNotFoundError:
            raise SchedulerError(f"job {self.job_id}: there is no scontrol here") from None
        if done.code != 0:
            raise SchedulerError(f"job {self.job_id}: {' '.join(words[3:])} was refused: {done.complaint}")

    def node_type(self, node: str) -> str | None:
        """Name a node by its partition and features: ``"main/a100"``.

        Where the site sets no features, its GPUs name it: ``"main/gpu:a100"``.
        """
        try:
            text = self._client.ask(["scontrol", "show", "node", node], expect="NodeName=")
        except (SchedulerError, FileNotFoundError):
            return self._partition
        features = _field(text, "ActiveFeatures") or _field(text, "AvailableFeatures")
        kind = features or _gpu_kind(_field(text, "Gres"))
        return "/".join(part for part in (self._partition, kind) if part) or None

    def look_back(self, past: Whereabouts) -> PastJob:
        """Look up what Slurm still knows of an earlier attempt."""
        try:
            if past.job_id == self.job_id:
                found = PastJob(requeued=self._own_restarts > past.restart_count)
            else:
                done = self._client.once(["scontrol", "show", "job", past.job_id])
                job = parse_job(done.out)
                found = PastJob()
                if done.code == 0 and job.state not in ALIVE | {UNKNOWN, "PENDING"}:
                    evidence = f"job {past.job_id}: {job.evidence}"
                    found = PastJob(state=job.state, reason=job.reason, evidence=evidence)
            if not found.state:
                found = last_state(found, past, self._client.once)
            return failed_nodes(found, past, self._client.once)
        except FileNotFoundError:
            return PastJob()

    def cancel(self) -> None:
        """End the job, as ``scancel`` does.

        Raises
        ------
        SchedulerError
            If Slurm refuses.
        """
        try:
            done = self._client.retry(["scancel", self.job_id], final=FINAL)
        except FileNotFoundError:
            raise SchedulerError(
                f"job {self.job_id}: there is no scancel here; cancel it on a machine where Slurm is installed"
            ) from None
        if done.code != 0:
            raise SchedulerError(f"job {self.job_id}: scancel was refused: {done.complaint}")

    def _lookup(self) -> JobFacts:
        return parse_job(self._client.ask(["scontrol", "show", "job", self.job_id], expect="JobState="))

    def _with_why_requeued(self, facts: JobFacts) -> JobFacts:
        """Add why Slurm requeued the job, which ``scontrol show job`` no longer shows (measured)."""
        done = self._client.once(["squeue", "--noheader", f"--jobs={self.job_id}", "--Format=PreemptTime:30"])
        preempt_time_s = _unix_time(done.out.strip())
        if preempt_time_s is not None:
            evidence = f"{facts.evidence} PreemptTime={done.out.strip()}"
            return dataclasses.replace(facts, preempt_time_s=preempt_time_s, evidence=evidence)
        if self._nodes:
            done = self._client.once(
                [
                    "sinfo", "--noheader", "--Node", f"--nodes={self._nodes}", "--states=down,fail", "--format=%N"
                ]
            )  # fmt: skip
            if down := tuple(dict.fromkeys(done.out.split())):
                return dataclasses.replace(
                    facts,
                    reason="NodeDown",
                    failed_nodes=down,
                    evidence=f"{facts.evidence} ({', '.join(down)} down)",
                )
        return facts


def parse_job(text: str) -> JobFacts:
    """Read what ``scontrol show job`` prints for one job.

    The fields are looked for at the starts of their lines, where no job name or comment can put them.
    """
    state = re.search(r"^\s+JobState=(\S+) Reason=(\S+)", text, re.MULTILINE)
    restarts = re.search(r"^\s+Requeue=\d+ Restarts=(\d+)", text, re.MULTILINE)
    end = re.search(r"^\s+StartTime=\S+ EndTime=(\S+)", text, re.MULTILINE)
    preempt = re.search(r"^\s+(?:PreemptEligibleTime=\S+ )?PreemptTime=(\S+)", text, re.MULTILINE)
    if state is None:
        return JobFacts(state=UNKNOWN, evidence=f"scontrol show job: no JobState in {text[:80]!r}")
    found = [match for match in (state, restarts, preempt, end) if match]
    return JobFacts(
        state=state[1],
        reason=None if state[2] in {"None", "(null)"} else state[2],
        restarts=int(restarts[1]) if restarts else None,
        preempt_time_s=_unix_time(preempt[1]) if preempt else None,
        end_time_s=_unix_time(end[1]) if end else None,
        evidence=" ".join(match[0].strip() for match in found),
    )


def _unix_time(text: str) -> float | None:
    """Read Unix seconds, or local time as Slurm prints it by default; words such as ``None`` are ``None``."""
    if text.isdecimal():
        return float(text)
    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^\s+(?:\S+ )*{name}=(\S+)", text, re.MULTILINE)
    return None if match is None or match[1] == "(null)" else match[1]


def _gpu_kind(gres: str | None) -> str | None:
    """``gpu:a100`` from ``gpu:a100:4(S:0-1),craynetwork:2``."""
    match = re.search(r"\bgpu:([A-Za-z]\w*)", gres or "")
    return None if match is None else f"gpu:{match[1]}"
