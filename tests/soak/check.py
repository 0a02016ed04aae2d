"""What must be so after a soak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.rundir import RunDirectory
from tests.soak.fleet import Fleet


def differences(ours: Any, theirs: Any, at: str = "") -> Iterator[str]:
    """Name what is not equal in two states, bit for bit."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            yield at
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.keys() == theirs.keys():
        for key in ours:
            yield from differences(ours[key], theirs[key], f"{at}/{key}")
    elif isinstance(ours, Sequence) and not isinstance(ours, str) and len(ours) == len(theirs):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{at}/{place}")
    elif ours != theirs:
        yield at


def compare_runs(run_dir: Path, reference: Path) -> list[str]:
    """Name what differs between the newest checkpoints of two runs."""
    with hr.Checkpoint(run_dir) as ours, hr.Checkpoint(reference) as theirs:
        if (ours.step, ours.manifest.samples) != (theirs.step, theirs.manifest.samples):
            return [f"step {ours.step} instead of {theirs.step}"]
        found = [] if ours.keys == theirs.keys else ["what was tracked"]
        for key in ours.keys:
            found += differences(ours.state(key), theirs.state(key), key)
    return found


def complaints(fleet: Fleet, reference: Fleet, committed: Mapping[Path, set[str]]) -> list[str]:
    """List everything that is not as it must be; an empty list is a soak that was survived.

    Parameters
    ----------
    fleet, reference
        The interrupted runs, and the same ones without interruptions.
    committed
        Every checkpoint that was ever seen to be committed, by run directory.
    """
    found = []
    for member in fleet.members():
        state = member.status().state
        if state != "done":
            found.append(f"{member.name}: is {state}: {member.status().why}")
            continue
        differing = compare_runs(member.run_dir, reference.folder / member.name)
        found += [f"{member.name}: differs from the uninterrupted run: {', '.join(differing)}"] * bool(
            differing
        )
        found += [f"{member.name}: {finding}" for finding in verify_run(member.run_dir)]
        run = RunDirectory(member.run_dir)
        gone = sorted(committed[member.run_dir] - set(run.checkpoint_names()))
        found += [f"{member.name}: lost checkpoints: {', '.join(gone)}"] * bool(gone)
    return found
