"""What Slurm is asked and told about one job, by its own commands.

``scontrol`` is enough: accounting (``sacct``) is missing on many sites, slow on others, and late on all.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import subprocess
from collections.abc import Sequence
from functools import partial

import stamina

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.base import ALIVE, UNKNOWN, JobFacts, PastJob, Whereabouts
from hpc_resume.scheduler.command import Completed, Runner, run_command
from hpc_resume.scheduler.lookback import failed_nodes, last_state

#: One command; slurmctld answers in 10-100 ms, but under load it takes its time.
_COMMAND_TIMEOUT_S = 10.0
#: All tries of one question. KillWait, the time to answer in, is 30 s by default.
_TOTAL_TIMEOUT_S = 20.0
_ATTEMPTS = 4

#: Slurm's answers to a requeue of a job that has been requeued (measured; the wording differs by version).
_PENDING_ALREADY = ("already pending", "pending execution", "already requeued")
#: Answers that no second try changes.
_FINAL = (
    "invalid job id",
    "access/permission denied",
    "invalid user id",
    "presently disabled",
    "not supported",
    "can not be requeued",
)
#: A requeue continues a job in these states, or one that is being ended for these reasons. In any other it
#: would undo what a person did.
_REQUEUE_STATES = ALIVE | {"PENDING"}
_REQUEUE_REASONS = frozenset({"TimeLimit", "NodeDown", "NodeFail"})


class _TryAgainError(Exception):
    """The command failed in a way that may pass."""


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
        # Unix seconds instead of local time, which is ambiguous once a year.
        self._run: Runner = runner or partial(run_command, environ={"SLURM_TIME_FORMAT": "%s"})

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
        if facts.state not in _REQUEUE_STATES and facts.reason not in _REQUEUE_REASONS:
            raise SchedulerError(
                f"job {self.job_id}: not requeued, because it is being ended ({facts.evidence}); "
                "if nobody cancelled it, submit it again: it continues from its last checkpoint"
            )
        done = self._retry(["scontrol", "requeue", self.job_id], final=(*_FINAL, *_PENDING_ALREADY))
        if done.code == 0 or _says(done, _PENDING_ALREADY):
            return True
        raise SchedulerError(
            f"job {self.job_id}: scontrol requeue was refused: {done.complaint}; "
            "leave with exit code 75 and let the batch script requeue, or submit it again: "
            "it continues from its last checkpoint"
        )

    def node_type(self, node: str) -> str | None:
        """Name a node by its partition and features: ``"main/a100"``.

        Where the site sets no features, its GPUs name it: ``"main/gpu:a100"``.
        """
        try:
            text = self._ask(["scontrol", "show", "node", node], expect="NodeName=")
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
                done = self._once(["scontrol", "show", "job", past.job_id])
                job = parse_job(done.out)
                found = PastJob()
                if done.code == 0 and job.state not in ALIVE | {UNKNOWN, "PENDING"}:
                    evidence = f"job {past.job_id}: {job.evidence}"
                    found = PastJob(state=job.state, reason=job.reason, evidence=evidence)
            if not found.state:
                found = last_state(found, past, self._once)
            return failed_nodes(found, past, self._once)
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
            done = self._retry(["scancel", self.job_id], final=_FINAL)
        except FileNotFoundError:
            raise SchedulerError(
                f"job {self.job_id}: there is no scancel here; cancel it on a machine where Slurm is installed"
            ) from None
        if done.code != 0:
            raise SchedulerError(f"job {self.job_id}: scancel was refused: {done.complaint}")

    def _lookup(self) -> JobFacts:
        return parse_job(self._ask(["scontrol", "show", "job", self.job_id], expect="JobState="))

    def _with_why_requeued(self, facts: JobFacts) -> JobFacts:
        """Add why Slurm requeued the job, which ``scontrol show job`` no longer shows (measured)."""
        done = self._once(["squeue", "--noheader", f"--jobs={self.job_id}", "--Format=PreemptTime:30"])
        preempt_time_s = _unix_time(done.out.strip())
        if preempt_time_s is not None:
            evidence = f"{facts.evidence} PreemptTime={done.out.strip()}"
            return dataclasses.replace(facts, preempt_time_s=preempt_time_s, evidence=evidence)
        if self._nodes:
            done = self._once(
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

    def _ask(self, words: Sequence[str], *, expect: str) -> str:
        """Run a query and return its answer; SchedulerError if there is none, FileNotFoundError if no command."""
        done = self._retry(words, final=_FINAL, expect=expect)
        if done.code != 0 or expect not in done.out:
            raise SchedulerError(f"{' '.join(words)}: {done.complaint}")
        return done.out

    def _retry(self, words: Sequence[str], *, final: Sequence[str], expect: str = "") -> Completed:
        """Run a command until it succeeds, gives a final answer, or the tries are used up."""
        last = Completed(code=-1, out="", err="not run")
        try:
            for attempt in stamina.retry_context(
                on=_TryAgainError,
                attempts=_ATTEMPTS,
                timeout=_TOTAL_TIMEOUT_S,
                wait_initial=0.2,
                wait_max=2.0,
            ):
                with attempt:
                    last = self._once(words)
                    _check(last, final=final, expect=expect)
        except _TryAgainError:
            pass  # the caller reads the last answer
        return last

    def _once(self, words: Sequence[str]) -> Completed:
        try:
            return self._run(words, _COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Completed(code=-1, out="", err=f"no answer within {_COMMAND_TIMEOUT_S:g} s")
        except FileNotFoundError:
            raise
        except OSError as error:  # no memory or no process left: may pass
            return Completed(code=-1, out="", err=str(error))


def _check(done: Completed, *, final: Sequence[str], expect: str) -> None:
    """Raise what the retry waits for, unless the command succeeded or gave a final answer."""
    if (done.code != 0 or expect not in done.out) and not _says(done, final):
        raise _TryAgainError(done.complaint)


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


def _says(done: Completed, phrases: Sequence[str]) -> bool:
    complaint = done.err.lower()
    return done.code != 0 and any(phrase in complaint for phrase in phrases)
