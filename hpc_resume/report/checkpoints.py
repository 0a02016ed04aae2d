"""What checkpoints a run has, and what is in one; read from manifests alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import RunDirectory, checkpoint_step


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """One checkpoint; only ``name`` and ``step`` are known of one whose manifest is damaged (``problem``)."""

    name: str
    step: int
    problem: str | None = None
    reason: str | None = None
    content: str | None = None
    note: str = ""
    attempt: int | None = None
    world_size: int | None = None
    node_type: str | None = None
    size_bytes: int | None = None
    created: float | None = None
    parent: str | None = None

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return dataclasses.asdict(self)


def list_checkpoints(root: Path) -> list[CheckpointSummary]:
    """List the committed checkpoints of a run by ascending step.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    """
    run = RunDirectory(root)
    run.identity()
    found = []
    for name in run.checkpoint_names():
        try:
            found.append(_summary(name, read_manifest(run.checkpoints / name)))
        except (IntegrityError, FileNotFoundError) as error:
            found.append(CheckpointSummary(name=name, step=checkpoint_step(name), problem=str(error)))
    return found


def find_checkpoint(root: Path, step: int | None) -> tuple[str, Manifest]:
    """Find the newest checkpoint, or the newest of a step.

    Raises
    ------
    CheckpointNotFound
        If there is none; names the steps that there are.
    IntegrityError
        If its manifest is damaged.
    """
    run = RunDirectory(root)
    run.identity()
    names = run.checkpoint_names()
    fitting = [name for name in names if step is None or checkpoint_step(name) == step]
    if not fitting:
        there = ", ".join(str(checkpoint_step(name)) for name in names) or "none at all"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointNotFound(f"{root}: {what}; there are: {there}")
    return fitting[-1], read_manifest(run.checkpoints / fitting[-1])


def describe(name: str, manifest: Manifest) -> JsonObject:
    """Tell what is in a checkpoint: where it was written, its tensors, its other state's names."""
    objects = manifest.objects
    return {
        **_summary(name, manifest).to_json(),
        "run_id": manifest.run_id,
        "content_id": manifest.content_id,
        "samples": manifest.samples,
        "config": manifest.config,
        "environment": manifest.environment,
        "costs": manifest.costs,
        "refers": list(manifest.refers),
        "missing_ranks": list(manifest.missing_ranks),
        "tensors": {
            tensor: {
                "shape": list(record.shape),
                "dtype": record.dtype,
                "size_bytes": record.size_bytes,
                "ranks": len(
                    record.layout.ranks if record.layout is not None else {r for r, _ in record.pieces}
                ),
            }
            for tensor, record in manifest.tensors.items()
        },
        "objects": sorted(objects) if isinstance(objects, dict) else [],
        "shards": [
            {"file": shard.file, "node": shard.node, "size_bytes": shard.size_bytes}
            for shard in manifest.shards
        ],
    }


def _summary(name: str, manifest: Manifest) -> CheckpointSummary:
    return CheckpointSummary(
        name=name,
        step=manifest.step,
        reason=manifest.reason,
        content=manifest.content,
        note=manifest.note,
        attempt=manifest.attempt,
        world_size=manifest.world_size,
        node_type=manifest.node_type,
        size_bytes=manifest.size_bytes,
        created=manifest.created,
        parent=manifest.parent,
    )
