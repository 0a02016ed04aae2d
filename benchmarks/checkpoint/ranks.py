"""Measurements on real ranks: saves of four, and loads on other numbers of ranks."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from benchmarks.checkpoint.dcp import Dcp
from benchmarks.checkpoint.engine import Ours
from benchmarks.checkpoint.states import gpt_shapes
from benchmarks.paired import Result, summarise
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.placement import layout_of

#: How a tensor lies on ranks, by name: mesh and placements of matrices.
_KINDS: dict[str, Any] = {
    "row shards": lambda ranks: ((ranks,), [Shard(0)]),
    "column shards": lambda ranks: ((ranks,), [Shard(1)]),
    "2-D meshes": lambda ranks: ((ranks // 2, 2), [Shard(0), Shard(1)]),
    "replicas of shards": lambda ranks: ((2, ranks // 2), [Replicate(), Shard(0)]),
}


def four_ranks(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare a save of four ranks with DCP: as many threads, both with fsync."""
    pairs = _spawn(_save_in_turn, 4, str(folder), quick, 3 if quick else 7)
    yield summarise("synchronous save + fsync on 4 ranks, against DCP", pairs, target=0.70)


def resharding(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare loads on other numbers of ranks: bytes read over bytes needed, and time against DCP."""
    moves = [("row shards", 2, 4), ("row shards", 4, 3), ("column shards", 2, 4), ("column shards", 4, 3)]
    moves += [("2-D meshes", 4, 2), ("replicas of shards", 4, 2)]
    for kind, before, after in moves:
        place = folder / f"{kind}-{before}-{after}".replace(" ", "-")
        _spawn(_save_both, before, str(place), quick, kind)
        pairs, read = _spawn(_load_in_turn, after, str(place), quick, kind, 3 if quick else 5)
        shutil.rmtree(place)
        target = 1.02 if kind in {"row shards", "replicas of shards"} else 2.0
        ours, theirs = read
        yield Result(
            name=f"bytes read over bytes needed, {kind}, {before} → {after} ranks",
            ratio=ours,
            target=target,
            n=1,
            details={"dcp": round(theirs, 3)},
        )
        yield summarise(f"load of {kind}, {before} → {after} ranks, against DCP", pairs, target=1.0)


def _spawn(function: Any, ranks: int, *arguments: Any) -> Any:
    """Run a function on ranks; returns what rank 0 returns."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(function, rank, ranks, store.port, queue, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    result = queue.get()
    for process in processes:
        process.join()
    ok, value = result
    if not ok:
        raise RuntimeError(value)
    return value


def _rank(function: Any, rank: int, ranks: int, port: int, queue: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        result = function(rank, ranks, *arguments)
        dist.barrier()
        if rank == 0:
            queue.put((True, result))
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - told by the parent
        if rank == 0:
            queue.put((False, f"{type(error).__name__}: {error}"))
        os._exit(1)


def _state(kind: str, ranks: int, *, quick: bool) -> dict[str, torch.Tensor]:
    """Make the part of a GPT-2's parameters and one moment that this rank holds."""
    extents, placements = _KINDS[kind](ranks)
    mesh = init_device_mesh("cpu", extents)
    state: dict[str, torch.Tensor] = {}
    shapes = gpt_shapes(2, 384, 8000) if quick else gpt_shapes(8, 768, 16000)
    for index, shape in enumerate(shapes):
        for moment in ("weight", "exp_avg"):
            name = f"{index:03d}.{moment}"
            of_vectors: list[Placement] = [p if p == Shard(0) else Replicate() for p in placements]
            state[name] = _shard(name, shape, mesh, placements if len(shape) > 1 else of_vectors)
    return state


def _shard(name: str, shape: tuple[int, ...], mesh: Any, placements: list[Placement]) -> DTensor:
    """Make a DTensor whose elements are a function of their place, without a collective."""
    empty = DTensor.from_local(
        torch.empty(0), mesh, placements, run_check=False, shape=torch.Size(shape), stride=_strides(shape)
    )
    box = _box(name, empty)
    seed = zlib.crc32(f"{name} {box.start}".encode())  # the same on every rank that holds the box
    generator = torch.Generator().manual_seed(seed)
    local = torch.randn(box.size, generator=generator)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=_strides(shape)
    )


def _box(name: str, tensor: DTensor) -> Box:
    """Box of a DTensor on this rank, by its mesh and placements alone."""
    layout = layout_of(name, tensor, dist.get_rank(), check=False)
    group = layout.group_of(dist.get_rank())
    assert group is not None
    return layout.box(tensor.shape, group)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _slowest(taken: float) -> float:
    """Seconds of the slowest rank."""
    value = torch.tensor(taken)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _save_in_turn(rank: int, ranks: int, folder: str, quick: bool, n: int) -> list[tuple[float, float]]:
    state = _state("row shards", ranks, quick=quick)
    ours = _ours(Path(folder) / "ours", state, rank, ranks)
    peer = Dcp(Path(folder), state, threads=1, leader=rank == 0)
    pairs = []
    for turn in range(-1, n):
        dist.barrier()
        begin = time.perf_counter()
        ours.write(ours.snapshot(stage=False))
        dist.barrier()  # stands for the counter in the store
        if rank == 0:
            ours.commit()
        first = _slowest(time.perf_counter() - begin)
        if rank == 0:
            ours.clear()
        dist.barrier()
        second = _slowest(peer.timed_save())
        dist.barrier()
        if turn >= 0:
            pairs.append((first, second))
    return pairs


def _ours(folder: Path, state: dict[str, torch.Tensor], rank: int, ranks: int) -> Ours:
    if rank == 0:
        engine = Ours(folder, state, rank=rank, world_size=ranks, threads=1)
    dist.barrier()
    if rank != 0:
        engine = Ours(folder, state, rank=rank, world_size=ranks, threads=1)
    dist.barrier()
    return engine


def _save_both(rank: int, ranks: int, folder: str, quick: bool, kind: str) -> bool:
    state = _state(kind, ranks, quick=quick)
    ours = _ours(Path(folder) / "ours", state, rank, ranks)
    ours.write(ours.snapshot(stage=False))
    dist.barrier()
    if rank == 0:
        ours.commit()
    Dcp(Path(folder), state, threads=1).save()
    return True


def _load_in_turn(
    rank: int,  # noqa: ARG001 - as all that is spawned
    ranks: int,
    folder: str,
    quick: bool,
    kind: str,
    n: int,
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    state = _state(kind, ranks, quick=quick)
    theirs = _state(kind, ranks, quick=quick)
    locals_ = {name: tensor.to_local() for name, tensor in state.items()}  # type: ignore[attr-defined]
    boxes = {name: _box(name, tensor) for name, tensor in state.items()}  # type: ignore[arg-type]
    ours = Ours.opened(Path(folder) / "ours", threads=1)
    peer = Dcp(Path(folder), theirs, threads=1)
    pairs = []
    for turn in range(-1, n):
        dist.barrier()
        begin = time.perf_counter()
        read = ours.load(locals_, boxes)
        first = _slowest(time.perf_counter() - begin)
        dist.barrier()
        before = _bytes_read()
        second = _slowest(peer.load(theirs, Path(folder) / "dcp-1"))
        their_read = _bytes_read() - before
        if turn >= 0:
            pairs.append((first, second))
    for name, tensor in theirs.items():
        assert torch.equal(tensor.to_local(), locals_[name]), name  # type: ignore[attr-defined]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in locals_.values())
    totals = torch.tensor([read, their_read, needed], dtype=torch.float64)
    dist.all_reduce(totals)
    return pairs, (float(totals[0] / totals[2]), float(totals[1] / totals[2]))


def _bytes_read() -> int:
    """Bytes that this process has read by system calls. Source: proc(5), /proc/PID/io, rchar."""
    line = Path("/proc/self/io").read_text().splitlines()[0]
    return int(line.split()[1])
