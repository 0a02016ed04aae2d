"""One process that plays every rank: saves on N of them, restores on M, without any communication."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.files import Filesystem
from hpc_resume.rundir import RunDirectory


class Careless(Filesystem):
    """Waits for no disk: nothing here is about what survives a crash."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_dir(self, path: Path) -> None:
        pass


CARELESS = Careless()


@contextlib.contextmanager
def playing(rank: int, size: int) -> Iterator[None]:
    """Be one rank of a process group that never communicates."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several that wait for each other are slow on a busy machine
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def two_factors(size: int) -> tuple[int, int]:
    """Spread a number of ranks over two dimensions, the second one the smaller."""
    small = next((small for small in (2, 3, 5, 7) if size % small == 0), 1)
    return size // small, small


#: Kinds of sharding, as the dimensions of the mesh that split, in the order in which they do: for a number of
#: ranks, the mesh, and for each of its dimensions the tensor dimension that it splits; None for replicas.
KINDS: dict[str, Callable[[int], tuple[tuple[int, ...], list[int | None]]]] = {
    "rows": lambda size: ((size,), [0]),
    "columns": lambda size: ((size,), [1]),
    "hsdp": lambda size: (two_factors(size)[::-1], [None, 0]),
    "fsdp_tp_rows": lambda size: (two_factors(size), [0, 0]),
    "fsdp_tp_columns": lambda size: (two_factors(size), [0, 1]),
    "replicas": lambda size: ((size,), [None]),
}


class Part:
    """What one rank has of tensors that are sharded in one of the kinds.

    Works out by ``torch.chunk`` alone what a rank holds, to be compared with what our own arithmetic says.
    """

    def __init__(self, kind: str, rank: int, size: int):
        self.kind = kind
        self.extents, self.dims = KINDS[kind](size)
        # Without groups of processes, which nobody needs who does not communicate.
        self.mesh = DeviceMesh("cpu", torch.arange(size).view(self.extents), _init_backend=False)
        self.coordinate = []
        for extent in reversed(self.extents):
            rank, digit = divmod(rank, extent)
            self.coordinate.insert(0, digit)

    def _splits(self, ndim: int) -> list[int | None]:
        """Tensors with fewer dimensions are split in their last one; 0-d ones are replicas."""
        return [None if dim is None or ndim == 0 else min(dim, ndim - 1) for dim in self.dims]

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut this rank's part out of a tensor."""
        steps = list(zip(self.extents, self.coordinate, self._splits(tensor.ndim), strict=True))
        if len(steps) == 2 and steps[0][2] == steps[1][2]:
            steps.reverse()  # FSDP2 cuts what tensor parallelism has left
        for parts, digit, dim in steps:
            if dim is not None:
                chunks = torch.chunk(tensor, parts, dim)
                tensor = chunks[digit] if digit < len(chunks) else tensor.narrow(dim, 0, 0)
        return tensor

    def placements(self, ndim: int) -> list[Placement]:
        """As FSDP2 and tensor parallelism spell them."""
        dims = self._splits(ndim)
        spelled: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
        if len(dims) == 2 and dims[0] is not None and dims[0] == dims[1] and self.extents[1] > 1:
            spelled[0] = _StridedShard(dims[0], split_factor=self.extents[1])
        return spelled

    def dtensor(self, tensor: torch.Tensor, *, empty: bool = False) -> DTensor:
        """Make this rank's part of a tensor; ``empty``: of one like it, with other values."""
        local = self.local(tensor).clone()
        if empty:
            local.view(torch.uint8).fill_(0x55) if local.numel() and local.ndim else local.zero_()
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements(tensor.ndim),
            run_check=False,
            shape=tensor.shape,
            stride=tensor.contiguous().stride(),
        )


def make_run(folder: Path) -> RunDirectory:
    """Make a run directory with an attempt."""
    run = RunDirectory(folder)
    run.create("test", fs=CARELESS)
    claim_attempt(run, fs=CARELESS)
    return run


def header(run: RunDirectory, size: int, step: int = 1) -> Header:
    return Header(
        run_id=run.identity()["run_id"],
        attempt=max(run.attempt_numbers()),
        step=step,
        samples=0,
        reason="cadence",
        world_size=size,
        node_type=None,
        config=None,
        environment={},
    )


def writer(run: RunDirectory, attempt: int, rank: int, **options: Any) -> Staging:
    """Make a rank's side of saving, quick and careless."""
    return Staging(run, attempt, rank, "node", threads=1, direct=False, fs=CARELESS, **options)


def save_as(
    run: RunDirectory,
    size: int,
    items_of: Callable[[int], dict[str, Any]],
    *,
    step: int = 1,
    stage: bool = False,
) -> tuple[str, Manifest]:
    """Save as each of ``size`` ranks what ``items_of(rank)`` tracks, and commit."""
    attempt = max(run.attempt_numbers())
    for rank in range(size):
        with playing(rank, size):
            state = TrackedState(items_of(rank), rank=rank, world_size=size)
            camera, staging = Camera(threads=1), writer(run, attempt, rank)
            staging.write(header(run, size, step), camera.take(state.capture({}), stage=stage))
            camera.close()
            staging.close()
    last = writer(run, attempt, size - 1)
    last.commit(step)
    last.close()
    return store.find(run, step)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are alike to the bit, NaNs too."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*flat)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, as far as the type has them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(tuple(shape), generator=generator) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))
