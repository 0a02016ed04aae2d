"""Commits a state as one rank, without a run around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.rundir import RunDirectory


def commit_state(root: Path, step: int = 7, *, content: str = "full", **items: Any) -> Path:
    """Save items as one checkpoint; returns its folder."""
    run = RunDirectory(root)
    identity = run.create("test")
    attempt = claim_attempt(run)
    header = Header(
        run_id=identity["run_id"], attempt=attempt, step=step, samples=70, reason="cadence", world_size=1,
        node_type=None, config=None, environment={}, content=content,
    )  # fmt: skip
    captured = TrackedState(items, rank=0, world_size=1).capture({"rng": torch.arange(3, dtype=torch.uint8)})
    staging = Staging(run, attempt, 0, "node0")
    staging.write(header, Camera().take(captured, stage=False))
    name = staging.commit(step)
    staging.close()
    return run.checkpoints / name
