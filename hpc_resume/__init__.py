"""PyTorch training runs that outlive their Slurm jobs.

The names here load on first use, so that ``import hpc_resume`` and every command that needs no tensors leave
PyTorch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpc_resume._version import __version__
from hpc_resume.errors import (
    BudgetSpent,
    CheckpointNotFound,
    ConfigError,
    Declined,
    DriftError,
    FencedError,
    HpcResumeError,
    IntegrityError,
    Interrupted,
    MismatchError,
    NonFiniteError,
    ProbeError,
    RendezvousError,
    SaveError,
    SchedulerError,
    StateError,
    TensorNotFound,
    UsageError,
)

if TYPE_CHECKING:
    from hpc_resume.branching import Fork, fork, rollback
    from hpc_resume.checkpoint.opened import Checkpoint
    from hpc_resume.config import Config
    from hpc_resume.exchange.dcpreader import DcpReader
    from hpc_resume.exchange.dcpwriter import DcpWriter
    from hpc_resume.job import Job, Sweep, submit
    from hpc_resume.launch.grid import Grid, grid
    from hpc_resume.rehearsal import rehearse
    from hpc_resume.report.rehearsal import Rehearsal
    from hpc_resume.run.initialising import initialise
    from hpc_resume.run.run import Run
    from hpc_resume.run.samples import sample_key

__all__ = [
    "BudgetSpent",
    "Checkpoint",
    "CheckpointNotFound",
    "Config",
    "ConfigError",
    "DcpReader",
    "DcpWriter",
    "Declined",
    "DriftError",
    "FencedError",
    "Fork",
    "Grid",
    "HpcResumeError",
    "IntegrityError",
    "Interrupted",
    "Job",
    "MismatchError",
    "NonFiniteError",
    "ProbeError",
    "Rehearsal",
    "RendezvousError",
    "Run",
    "SaveError",
    "SchedulerError",
    "StateError",
    "Sweep",
    "TensorNotFound",
    "UsageError",
    "__version__",
    "fork",
    "grid",
    "initialise",
    "rehearse",
    "rollback",
    "sample_key",
    "submit",
]

_LAZY = {
    "Checkpoint": "hpc_resume.checkpoint.opened",
    "Config": "hpc_resume.config",
    "DcpReader": "hpc_resume.exchange.dcpreader",
    "DcpWriter": "hpc_resume.exchange.dcpwriter",
    "Fork": "hpc_resume.branching",
    "Grid": "hpc_resume.launch.grid",
    "Job": "hpc_resume.job",
    "Rehearsal": "hpc_resume.report.rehearsal",
    "Run": "hpc_resume.run.run",
    "Sweep": "hpc_resume.job",
    "fork": "hpc_resume.branching",
    "grid": "hpc_resume.launch.grid",
    "initialise": "hpc_resume.run.initialising",
    "rehearse": "hpc_resume.rehearsal",
    "rollback": "hpc_resume.branching",
    "sample_key": "hpc_resume.run.samples",
    "submit": "hpc_resume.job",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hpc_resume' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
