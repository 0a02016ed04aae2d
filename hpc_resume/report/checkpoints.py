"""What checkpoints a run has, and what is in one; read from manifests alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.lineage import read_lineage
from hpc_resume.provenance.datarecord import DataRecord
from hpc_resume.rollbacks import active_names, set_aside
from hpc_resume.rundir import RunDirectory, checkpoint_step


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """One checkpoint; only ``name`` and ``step`` are known of one whose manifest is damaged (``problem``).

    ``set_aside`` says why the run does not go on from it, if a person rolled it back; ``shared`` which run it was
    forked from with it.
    ``held_back`` says what is not finite in it: then it is not resumed from.
    """

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
    set_aside: str | None = None
    shared: str | None = None
    data: str | None = None
    held_back: str = ""

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
    aside, shared = why_set_aside(run), shared_with(run)
    for name in run.checkpoint_names():
        try:
            summary = _summary(name, read_manifest(run.checkpoints / name))
        except (IntegrityError, FileNotFoundError) as error:
            summary = CheckpointSummary(name=name, step=checkpoint_step(name), problem=str(error))
        found.append(dataclasses.replace(summary, set_aside=aside.get(name), shared=shared.get(name)))
    return found


def why_set_aside(run: RunDirectory) -> dict[str, str]:
    """Tell of the checkpoints that a run does not go on from, by name, why it does not.

    Raises
    ------
    IntegrityError
        If that is not known.
    """
    return {name: each.sentence for name, each in set_aside(run).items()}


def shared_with(run: RunDirectory) -> dict[str, str]:
    """Tell of the checkpoints that a fork began with, by name, where it comes from.

    Raises
    ------
    IntegrityError
        If that is not known.
    """
    lineage = read_lineage(run)
    return {} if lineage is None else dict.fromkeys(lineage.shared, lineage.sentence)


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
    active = active_names(run)
    # Of a step, too, what the run may go on from comes before what is set aside.
    ordered = active if step is None else [name for name in names if name not in active] + active
    fitting = [name for name in ordered if step is None or checkpoint_step(name) == step]
    if not fitting:
        there = ", ".join(str(checkpoint_step(name)) for name in names) or "none at all"
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointNotFound(f"{root}: {what}; there are: {there}")
    return fitting[-1], read_manifest(run.checkpoints / fitting[-1])


def describe(
    name: str, manifest: Manifest, *, set_aside: str | None = None, shared: str | None = None
) -> JsonObject:
    """Tell what is in a checkpoint: where it was written, its tensors, its other state's names.

    Parameters
    ----------
    name, manifest
        The checkpoint.
    set_aside
        Why the run does not go on from it; see :func:`why_set_aside`.
    shared
        Which run it comes from; see :func:`shared_with`.
    """
    objects = manifest.objects
    return {
        **dataclasses.replace(_summary(name, manifest), set_aside=set_aside, shared=shared).to_json(),
        "run_id": manifest.run_id,
        "content_id": manifest.content_id,
        "samples": manifest.samples,
        "config": manifest.config,
        "environment": manifest.environment,
        "costs": manifest.costs,
        "health": manifest.health.to_json(),
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
        data=DataRecord.from_json(manifest.environment.get("data")).digest,
        held_back=manifest.health.told,
    )
