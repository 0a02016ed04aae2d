"""The embedded scheduler as its jobs see it: one JSON file that says what is happening to the job.

The controller writes the file before it sends a signal, so a rank that looks a signal up finds the truth.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.errors import IntegrityError
from hpc_resume.files import DISK, Filesystem
from hpc_resume.scheduler.base import UNKNOWN, JobFacts, PastJob, Whereabouts

SCHEMA = 1
#: States in which a job still has a future.
UNFINISHED = frozenset({"PENDING", "RUNNING", "COMPLETING"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalState:
    """A job of the embedded scheduler at one moment; the words are Slurm's.

    Parameters
    ----------
    state
        ``PENDING``, ``RUNNING``, ``COMPLETING``, ``COMPLETED``, ``FAILED`` or ``CANCELLED``.
    preempt_time, end_time
        Unix seconds.
    controller_pid, controller_ticks
        Which process runs the job: a process id can be given out again, with its start time it can't.
    exit_codes
        Of the ranks of the last attempt that ended.
    why
        The last decision in words.
    """

    job_id: str
    state: str
    run_dir: str
    reason: str | None = None
    restarts: int = 0
    preempt_time: float | None = None
    end_time: float | None = None
    node_type: str | None = None
    ranks: int = 0
    host: str = ""
    controller_pid: int = 0
    controller_ticks: int = 0
    exit_codes: tuple[int, ...] = ()
    why: str = ""

    @classmethod
    def read(cls, path: Path) -> LocalState:
        """Read a state file.

        Raises
        ------
        FileNotFoundError
            If there is none.
        IntegrityError
            If it is damaged, or of another version.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_bytes())
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise IntegrityError(f"{path}: schema {schema!r}, but this version reads {SCHEMA}")
            return cls(**{**values, "exit_codes": tuple(values["exit_codes"])})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{path}: damaged ({error})") from error

    def write(self, path: Path, *, fs: Filesystem = DISK) -> None:
        """Replace the state file, all or nothing."""
        fs.write_file(path, json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1).encode())

    def alive(self) -> bool:
        """Whether the job is not over and its controller still runs; on another host it is believed to."""
        if self.state not in UNFINISHED:
            return False
        if self.host != os.uname().nodename:
            return True
        return process_ticks(self.controller_pid) == self.controller_ticks


def state_path(folder: Path, job_id: str) -> Path:
    """Path of a job's state file; the folder is ``RUN_DIR/jobs``."""
    return folder / f"{job_id}_state.json"


def cancel_path(folder: Path, job_id: str) -> Path:
    """Path of a file that says, by being there, that a job is to end for good."""
    return folder / f"{job_id}_cancel"


def process_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; ``None`` if it is gone or only a zombie.

    Source: proc(5), /proc/PID/stat, fields 3 and 22; the command's name may contain anything but ends at
    the last parenthesis.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children that are no zombies, in the order of their start."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (ticks := process_ticks(int(folder.name))) is not None:
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append((ticks, int(folder.name)))
    return [child for _, child in sorted(found)]


class LocalScheduler:
    """Answers for the embedded scheduler; see :class:`hpc_resume.scheduler.base.Scheduler`.

    Parameters
    ----------
    path
        The job's state file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def facts(self) -> JobFacts:
        """Read the state file."""
        try:
            state = LocalState.read(self.path)
        except (OSError, IntegrityError) as error:
            return JobFacts(state=UNKNOWN, evidence=f"embedded scheduler: {error}")
        return JobFacts(
            state=state.state,
            reason=state.reason,
            restarts=state.restarts,
            preempt_time_s=state.preempt_time,
            end_time_s=state.end_time,
            evidence=f"embedded scheduler: JobState={state.state} Reason={state.reason} "
            f"Restarts={state.restarts} PreemptTime={state.preempt_time} EndTime={state.end_time}",
        )

    def requeue(self) -> bool:
        """Return ``False``: exit code 75 is what has the job continued."""
        return False

    def node_type(self, node: str) -> str | None:  # noqa: ARG002 - there is one node
        """Name the node type that the job has been given."""
        try:
            return LocalState.read(self.path).node_type
        except (OSError, IntegrityError):
            return None

    def look_back(self, past: Whereabouts) -> PastJob:  # noqa: ARG002 - the protocol's signature
        """Know nothing: the controller leaves the exit codes in the run directory."""
        return PastJob()
