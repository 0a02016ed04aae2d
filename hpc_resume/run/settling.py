"""What a process finds out before its run begins: its settings and its device."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from hpc_resume.config import Config


def settle(config: Config | str | Path | None, settings: dict[str, Any]) -> Config:
    """Resolve the settings of this process."""
    if rehearsal := os.environ.get("HPC_RESUME_REHEARSAL"):
        settings = {**settings, "run_dir": rehearsal}  # whatever the script says: the real run is left alone
    if isinstance(config, Config):
        settled = config.replace(**settings) if settings else config
    else:
        path = config or os.environ.get("HPC_RESUME_CONFIG") or None
        settled = Config.load(path, overrides=settings, environ=os.environ, given="hr.Run(…)")
    # Two scripts that nobody named must not share a run directory.
    stem = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("-._")
    return settled.named(name) if name else settled


def device_of(local_rank: int) -> torch.device:
    """Give the GPU of a process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")
