"""What a process can know of its job from its environment alone.

Two questions, answered apart because launchers nest (``srun torchrun …``): which *job* is this, and which
*rank* of it? The job comes from Slurm, from our one-machine scheduler or from submitit's; the ranks come from
torchrun where it runs, because it is the innermost, and else from whoever started the processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_resume.errors import UsageError

#: Step ids from here on name no ``srun``: the batch script, ``salloc``'s shell, the external step.
#: Source: slurm.h, SLURM_MAX_NORMAL_STEP_ID.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnvironment:
    """Job and rank of one process.

    Parameters
    ----------
    kind
        ``"slurm"``, ``"local"`` (our one-machine scheduler), ``"submitit-local"``, ``"torchrun"`` or
        ``"plain"``.
    job_id
        ``"123"``, or ``"120_3"`` for an element of a job array; ``None`` where there is no job.
    chain
        Id of the first of the jobs that go on from each other; the job's own where it goes on by itself.
    restart_count
        How often this job was restarted under the same id.
    rank, world_size, local_rank, local_world_size
        This process among all, and among those on its node.
    node
        The node's name, as the scheduler spells it.
    node_type
        What the launcher calls this kind of node, if it said.
    partition
        Slurm's partition.
    rendezvous
        Identity of this set of processes: the same on all its ranks, another after every restart.
    master
        Address and port of a store that the launcher keeps (torchrun); ``None``: rank 0 opens its own.
    launcher_requeues
        Our batch script started this process: it acts on exit code 75.
    """

    kind: str
    job_id: str | None
    chain: str | None
    restart_count: int
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str
    node_type: str | None
    partition: str | None
    rendezvous: str
    master: tuple[str, int] | None
    launcher_requeues: bool

    @classmethod
    def detect(
        cls, environ: Mapping[str, str], *, hostname: str, pid: int, parent_pid: int | None = None
    ) -> JobEnvironment:
        """Read the environment variables that launchers leave.

        Parameters
        ----------
        environ
            Usually ``os.environ``.
        hostname
            Name of this machine, where the scheduler does not say.
        pid, parent_pid
            Process ids that tell apart two starts that no launcher numbers.

        Raises
        ------
        UsageError
            If a variable is no number, or contradicts another; names the variable.
        """
        job = _job(environ)
        ranks = _ranks(environ, job, pid=pid, parent_pid=parent_pid)
        kind = job.kind
        if kind == "plain" and ranks.launcher == "torchrun":
            kind = "torchrun"
        in_slurm = kind == "slurm"
        return cls(
            kind=kind,
            job_id=job.job_id,
            chain=environ.get("HPC_RESUME_CHAIN") or job.job_id,
            restart_count=job.restart_count,
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_rank=ranks.local_rank,
            local_world_size=ranks.local_world_size,
            node=(environ.get("SLURMD_NODENAME") if in_slurm else None) or hostname,
            node_type=environ.get("HPC_RESUME_NODE_TYPE") or None,
            partition=(environ.get("SLURM_JOB_PARTITION") if in_slurm else None) or None,
            rendezvous=ranks.rendezvous,
            master=ranks.master,
            launcher_requeues=environ.get("HPC_RESUME_BATCH") == "1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Which job this process belongs to."""

    kind: str
    job_id: str | None
    restart_count: int
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranks:
    """Which of the job's processes this one is."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    rendezvous: str
    master: tuple[str, int] | None = None


def _job(environ: Mapping[str, str]) -> _Job:
    if environ.get("HPC_RESUME_JOB_STATE"):
        return _Job(
            kind="local",
            job_id=_text(environ, "SUBMITIT_LOCAL_JOB_ID"),
            restart_count=_number(environ, "HPC_RESUME_RESTART_COUNT", 0),
            step=_number(environ, "HPC_RESUME_STEP", 0),
        )
    if environ.get("SLURM_JOB_ID"):
        return _Job(
            kind="slurm",
            job_id=_slurm_job_id(environ),
            restart_count=_number(environ, "SLURM_RESTART_COUNT", 0),
            step=_slurm_step(environ),
        )
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        return _Job(kind="submitit-local", job_id=_text(environ, "SUBMITIT_LOCAL_JOB_ID"), restart_count=0)
    return _Job(kind="plain", job_id=None, restart_count=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0))


def _slurm_job_id(environ: Mapping[str, str]) -> str:
    """Job id in the form that is safe to give to ``scontrol``.

    An array gives its own id as SLURM_JOB_ID to one of its elements; with that number ``scontrol requeue``
    and ``scancel`` mean every element. Source: measured, and ``man sbatch``, JOB ARRAY.
    """
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and element:
        return f"{array}_{element}"
    return environ["SLURM_JOB_ID"]


def _slurm_step(environ: Mapping[str, str]) -> int | None:
    """Id of the ``srun`` step this process is a task of; ``None`` in a batch script or a shell."""
    if not environ.get("SLURM_PROCID") or not environ.get("SLURM_STEP_ID", "").isdecimal():
        return None
    step = int(environ["SLURM_STEP_ID"])
    return step if step < _FIRST_SPECIAL_STEP else None


def _ranks(environ: Mapping[str, str], job: _Job, *, pid: int, parent_pid: int | None) -> _Ranks:
    if environ.get("TORCHELASTIC_RUN_ID") or all(
        environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    ):
        return _torchrun_ranks(environ, job, parent_pid=parent_pid)
    if job.kind in {"local", "submitit-local"}:
        return _local_ranks(environ, job)
    if job.step is not None:
        return _slurm_ranks(environ, job)
    identity = _job_identity(job)
    return _Ranks(
        launcher="none",
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        rendezvous=f"{identity}-pid-{pid}" if identity else f"plain-{pid}",
    )


def _torchrun_ranks(environ: Mapping[str, str], job: _Job, *, parent_pid: int | None) -> _Ranks:
    world_size = _positive(environ, "WORLD_SIZE")
    local_world_size = _positive(environ, "LOCAL_WORLD_SIZE", world_size)
    run_id = environ.get("TORCHELASTIC_RUN_ID") or "none"
    identity = f"torchrun-{run_id}-{_number(environ, 'TORCHELASTIC_RESTART_COUNT', 0)}"
    if job.kind != "plain":
        identity = f"{_job_identity(job)}-{identity}"
    if local_world_size == world_size and parent_pid is not None:
        # Without --standalone or --rdzv-id the run id is "none", every time: on one node, torchrun's own
        # process id tells two starts apart.
        identity = f"{identity}-{parent_pid}"
    return _Ranks(
        launcher="torchrun",
        rank=_index(environ, "RANK", world_size, "WORLD_SIZE"),
        world_size=world_size,
        local_rank=_index(environ, "LOCAL_RANK", local_world_size, "LOCAL_WORLD_SIZE", 0),
        local_world_size=local_world_size,
        rendezvous=identity,
        master=(_text(environ, "MASTER_ADDR"), _positive(environ, "MASTER_PORT")),
    )


def _local_ranks(environ: Mapping[str, str], job: _Job) -> _Ranks:
    world_size = _positive(environ, "SUBMITIT_LOCAL_NTASKS")
    return _Ranks(
        launcher=job.kind,
        rank=_index(environ, "SUBMITIT_LOCAL_GLOBALID", world_size, "SUBMITIT_LOCAL_NTASKS"),
        world_size=world_size,
        local_rank=_index(environ, "SUBMITIT_LOCAL_LOCALID", world_size, "SUBMITIT_LOCAL_NTASKS"),
        local_world_size=world_size,  # one machine
        rendezvous=_job_identity(job),
    )


def _slurm_ranks(environ: Mapping[str, str], job: _Job) -> _Ranks:
    # SLURM_NTASKS may be the job's, left from submission; the step's own numbers are always right.
    size_name = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    world_size = _positive(environ, size_name)
    local_world_size = _tasks_on_node(environ, world_size)
    return _Ranks(
        launcher="slurm",
        rank=_index(environ, "SLURM_PROCID", world_size, size_name),
        world_size=world_size,
        local_rank=_index(environ, "SLURM_LOCALID", local_world_size, "SLURM_STEP_TASKS_PER_NODE", 0),
        local_world_size=local_world_size,
        rendezvous=_job_identity(job),
    )


def _tasks_on_node(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks of this step on this node, from a list like ``2(x3),1``."""
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if not listed:
        return world_size
    per_node: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(
                f"SLURM_STEP_TASKS_PER_NODE={listed!r}: not understood at {part!r} (expected e.g. 2(x3),1); "
                "was it exported by hand? Unset it"
            )
        per_node += [int(match[1])] * int(match[2] or 1)
    return per_node[_index(environ, "SLURM_NODEID", len(per_node), "nodes of SLURM_STEP_TASKS_PER_NODE", 0)]


def _job_identity(job: _Job) -> str:
    """Name this start of the job's processes: ranks that are started again in place are another step."""
    if job.kind == "plain":
        return ""
    if job.kind == "submitit-local":
        return f"submitit-local-{job.job_id}"  # submitit does not number its restarts
    identity = f"{job.kind}-{job.job_id}-{job.restart_count}"
    return identity if job.step is None else f"{identity}-{job.step}"


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise UsageError(
            f"{name} is not set, though the other variables of its launcher are; start the processes through "
            "one launcher (srun, torchrun, hpc-resume submit), or unset what an earlier one left behind"
        )
    return value


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    value = _text(environ, name)
    if not value.isdecimal():
        raise UsageError(f"{name}={value!r} is no number; unset it, or let the launcher set it")
    return int(value)


def _positive(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = _number(environ, name, default)
    if value < 1:
        raise UsageError(f"{name}={value} must be 1 or more; unset it, or let the launcher set it")
    return value


def _index(
    environ: Mapping[str, str], name: str, size: int, size_name: str, default: int | None = None
) -> int:
    value = _number(environ, name, default)
    if value >= size:
        raise UsageError(
            f"{name}={value} does not fit {size_name}={size} (counting from 0); "
            "variables of two launchers are mixed: unset those that the inner one did not set"
        )
    return value
