"""A tiny job that looks at a site from a compute node."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.files import Clock
from hpc_resume.launch.doctorpython import FACTS
from hpc_resume.launch.script import fill_in, job_directives, job_interpreter
from hpc_resume.launch.software import container_words, software_lines
from hpc_resume.provenance.filesystem import existing
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.command import Runner

_TIMEOUT_S = 30.0
_POLL_S = 1.0
#: Time limit of the job: importing torch from a busy filesystem takes minutes.
_LIMIT_S = 300.0
#: Enough to import torch.
_MEMORY_GB = 4.0
#: A job's last lines may reach another node late; NFS caches for up to a minute by default.
_LINGER_S = 60.0
_LOG = "probe.log"
_OVER = (
    "JobState=COMPLETED",
    "JobState=FAILED",
    "JobState=CANCELLED",
    "JobState=TIMEOUT",
    "JobState=NODE_FAIL",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a compute node told.

    Parameters
    ----------
    answers
        Name to answer, as the job said them; empty if its log never came.
    log
        All that it said.
    job
        The last that Slurm said of it, for a log that never came.
    """

    answers: dict[str, str]
    log: str
    job: str

    def can(self, name: str) -> bool | None:
        """Whether something works there; ``None`` if the job did not get that far."""
        return {"yes": True, "no": False}.get(self.answers.get(name, ""))

    @property
    def visible(self) -> bool:
        """Whether the run directory's filesystem is seen there."""
        return bool(self.answers)

    def findings(self) -> Iterator[Finding]:
        """Tell what it means."""
        if not self.visible:
            detail = f"the job left nothing in the run directory's filesystem ({self.job}); compute nodes do not see it"
            yield Finding(what="job", level="bad", detail=detail)
            return
        yield Finding(what="job", level="ok", detail=f"ran on {self.answers.get('node', 'a compute node')}")
        for name, what, without in (
            ("scontrol", "scontrol", "jobs can't requeue themselves"),
            ("sbatch", "sbatch", "jobs can't submit a successor"),
            ("rank_scontrol", "scontrol for ranks", "the batch script acts in their place"),
        ):
            works = self.can(name)
            detail = "works on compute nodes" if works else f"does not work there: {without}"
            yield Finding(what=what, level="ok" if works else "note", detail=detail)
        yield self._python()
        yield from self._health()
        if "end" not in self.answers:
            last = " ".join(self.log.splitlines()[-1:])
            yield Finding(
                what="end", level="bad", detail=f"the job did not come to its end; its log ends: {last}"
            )

    def _python(self) -> Finding:
        told, torch = self.answers.get("python", ""), self.answers.get("torch", "")
        try:
            facts: Any = json.loads(told)
            where = f"{facts['executable']}, {facts['version']}"
        except (ValueError, LookupError, TypeError):
            return Finding(
                what="Python", level="bad", detail=f"does not start on a compute node: {told or 'no answer'}"
            )
        if torch != "yes":
            return Finding(
                what="Python", level="bad", detail=f"{where} can't import hpc_resume and torch: {torch}"
            )
        return Finding(what="Python", level="ok", detail=f"{where}; imports hpc_resume and torch")

    def _health(self) -> Iterator[Finding]:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            for each in json.loads(self.answers.get("health", ""))["findings"]:
                yield Finding(**each)


def send_probe(
    config: Config,
    *,
    run: Runner,
    patience_s: float,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Probe:
    """Submit the job, wait for its answers, and take away what it has left.

    Parameters
    ----------
    config
        Its first node type is asked for, but one task of it.
    run
        Runs a command.
    patience_s
        How long the job may take, its wait in the queue included; then it is cancelled.
    clock, sleep
        For tests.

    Raises
    ------
    SchedulerError
        If it is refused, or does not start in time.
    UsageError
        If there is no place for its log.
    """
    place = existing(config.run_directory())
    try:
        folder = Path(tempfile.mkdtemp(prefix=".hpc-resume-probe-", dir=place))
    except OSError as error:
        raise UsageError(f"{place}: can't be written ({error.strerror}); give another run_dir") from error
    try:
        script = folder / "probe.sbatch"
        script.write_text(render_probe(config, folder))
        done = run(["sbatch", "--parsable", str(script)], _TIMEOUT_S)
        if done.code != 0:
            raise SchedulerError(f"sbatch refused the probe: {done.complaint}")
        job_id = done.out.strip().split(";")[0]
        return _wait(job_id, folder, run, clock() + patience_s, clock, sleep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def render_probe(config: Config, folder: Path) -> str:
    """Write the job's script."""
    node_type = config.node_types[0]
    small = config.replace(
        name="hpc-resume-probe",
        continuation="exit",
        time_limit_s=_LIMIT_S,
        warning_lead_s=0,
        node_types=[
            {
                **node_type.model_dump(exclude={"ranks", "time_limit_s"}),
                "nodes": 1,
                "tasks_per_node": 1,
                "gpus_per_node": min(node_type.gpus_per_node or 0, 1) or None,
                "mem_gb": None if node_type.mem_gb is None else min(node_type.mem_gb, _MEMORY_GB),
            }
        ],
        slurm={"requeue": False},
    )
    options, inside = container_words(config.slurm.container, folder)
    return fill_in(
        "probe.sbatch.j2",
        directives=job_directives(small, small.node_types[0], str(folder / _LOG).replace("%", "%%")),
        setup=software_lines(config.environment),
        folder=str(folder),
        srun=" ".join([shlex.join(config.slurm.srun_args), *options]),
        container=" ".join(inside),
        python=shlex.quote(job_interpreter(config)),
        facts=FACTS,
    )


def _wait(
    job_id: str, folder: Path, run: Runner, deadline_s: float, clock: Clock, sleep: Callable[[float], None]
) -> Probe:
    over_s = None
    while True:
        probe = _read(folder)
        if "end" in probe.answers:
            return probe
        job = _job(job_id, run)
        if over_s is None and (job.startswith(_OVER) or "invalid job id" in job.lower()):
            over_s = clock()
        if over_s is not None and clock() >= over_s + _LINGER_S:
            return replace(probe, job=job)
        if over_s is None and clock() > deadline_s:
            run(["scancel", job_id], _TIMEOUT_S)
            raise SchedulerError(
                f"the probe, job {job_id}, did not end in time ({job}), and was cancelled; wait longer: --patience"
            )
        sleep(_POLL_S)


def _read(folder: Path) -> Probe:
    try:
        log = (folder / _LOG).read_text(errors="replace")
    except OSError:
        log = ""
    lines = (
        line.removeprefix("probe: ").partition("=") for line in log.splitlines() if line.startswith("probe: ")
    )
    return Probe(answers={name: answer for name, _, answer in lines}, log=log, job="")


def _job(job_id: str, run: Runner) -> str:
    """Give ``JobState=… Reason=…``, or why it is not known."""
    try:
        done = run(["scontrol", "show", "job", job_id], _TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "no answer from slurmctld"
    line = next((line.strip() for line in done.out.splitlines() if line.strip().startswith("JobState=")), "")
    return line.partition(" Dependency=")[0] or done.complaint
