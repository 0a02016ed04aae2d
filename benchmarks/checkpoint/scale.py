"""What planning and manifests cost for many ranks, simulated in one process."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import (
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.paired import Result, summarise
from hpc_resume.checkpoint.index import shard_file
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.manifest import Manifest, ShardRecord
from hpc_resume.checkpoint.receipt import Header, Receipt, carries_structure, to_manifest
from hpc_resume.checkpoint.structure import Structure, TensorRecord

_ROWS, _COLUMNS = 4096, 64


def planning(*, quick: bool) -> Iterator[Result]:
    """Compare planning a save of row shards: from the local tensors to what the commit needs."""
    ranks, tensors = (32, 200) if quick else (256, 1000)
    pairs = [(_ours(ranks, tensors)[0], _theirs(ranks, tensors)) for _ in range(1 if not quick else 2)]
    yield summarise(
        f"planning, {ranks} simulated ranks x {tensors:,} tensors, against DCP", pairs, target=0.02
    )


def manifests(*, quick: bool) -> Iterator[Result]:
    """Tell the size of manifests, and the time to make and to read one, from 16 to 4,096 ranks."""
    grid = (
        [(16, 100), (64, 1000)]
        if quick
        else [(16, 100), (256, 1000), (1024, 1000), (4096, 1000), (4096, 20000)]
    )
    for ranks, tensors in grid:
        made, manifest = _ours(ranks, tensors)
        data = manifest.to_bytes()
        begin = time.perf_counter()
        Manifest.from_bytes(data)
        read = time.perf_counter() - begin
        yield Result(
            name=f"manifest of {ranks:,} ranks x {tensors:,} tensors: bytes for each rank and tensor",
            ratio=len(data) / (ranks * tensors),
            target=None,
            n=1,
            details={"size_bytes": len(data), "plan_and_make_s": round(made, 4), "read_s": round(read, 4)},
        )


def _ours(ranks: int, tensors: int) -> tuple[float, Manifest]:
    """Seconds of one rank's planning, of reading all receipts, and of the manifest, as the committer does it."""
    begin = time.perf_counter()
    layout = Layout((ranks,), tuple(range(ranks)), ((0, 0),))
    structure = Structure(
        {f"layer.{i}.weight": TensorRecord((_ROWS, _COLUMNS), "float32", layout) for i in range(tensors)}
    )
    assert sum(1 for _ in structure.stored_by(ranks // 2)) == tensors
    header = Header(
        run_id="benchmark",
        attempt=1,
        step=1,
        samples=0,
        reason="cadence",
        world_size=ranks,
        node_type=None,
        config=None,
        environment={},
    )
    one = Receipt(
        header=header,
        by=0,
        created=0.0,
        shard=_shard(0, ranks),
        structure_digest=structure.digest,
        structure=None,
        objects_digest="0" * 64,
        objects=None,
        refers=(),
        state_bytes=1,
        written_bytes=1,
        write_s=1.0,
    )
    receipts = []
    assert carries_structure(structure, 0)
    for rank in range(ranks):
        receipt = replace(
            one,
            by=rank,
            shard=_shard(rank, ranks),
            structure=structure if rank == 0 else None,  # the lowest of those that hold it carries it
            objects={} if rank == 0 else None,
        )
        receipts.append(Receipt.parse(receipt.to_bytes()))
    manifest = to_manifest(receipts, None)
    manifest.to_bytes()
    return time.perf_counter() - begin, manifest


def _shard(rank: int, ranks: int) -> ShardRecord:
    return ShardRecord(
        file=shard_file(rank, ranks),
        rank=rank,
        node=f"node{rank // 8:04d}",
        size_bytes=1 << 30,
        index=(0, 100_000),
        table=(100_000, 80_000),
        digest="0" * 32,
        rest="0" * 16,
    )


def _theirs(ranks: int, tensors: int) -> float:
    """Seconds of one rank's planning, of gathering all plans on rank 0 (as bytes), and of the global plan."""
    plans, local = [], 0.0
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,))
        part = torch.zeros(-(-_ROWS // ranks), _COLUMNS)
        state = {
            f"layer.{i}.weight": DTensor.from_local(
                part, mesh, [Shard(0)], run_check=False, shape=(_ROWS, _COLUMNS), stride=(_COLUMNS, 1)
            )
            for i in range(tensors)
        }
        begin = time.perf_counter()
        plan = create_default_local_save_plan(state, is_coordinator=rank == 0)
        local = time.perf_counter() - begin  # ranks plan side by side: the last one's time stands for all
        plans.append(pickle.dumps(plan))
        dist.destroy_process_group()
    begin = time.perf_counter()
    global_plans, metadata = create_default_global_save_plan([pickle.loads(plan) for plan in plans])  # noqa: S301 - made above
    for plan in global_plans:  # scattered to the ranks
        pickle.dump(plan, io.BytesIO())
    pickle.dump(metadata, io.BytesIO())
    return local + time.perf_counter() - begin
