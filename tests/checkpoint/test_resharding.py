"""Saved on N ranks, restored on M: N and M from 1 to 8 in every combination, in every kind of sharding."""

import pytest
import torch

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from tests.checkpoint.fakes import KINDS, Part, make_run, playing, random_tensor, same_bits, save_as

SIZES = range(1, 9)
#: Uneven rows, fewer rows than ranks, empty shards, 0-d, no elements, long single rows, many dimensions.
TENSORS = {
    "uneven": random_tensor((257, 33), torch.float32, 1),
    "short": random_tensor((3, 5), torch.bfloat16, 2),
    "one": random_tensor((1, 1), torch.complex64, 3),
    "vector": random_tensor((100,), torch.int64, 4),
    "scalar": random_tensor((), torch.float64, 5),
    "no_rows": random_tensor((0, 8), torch.float32, 6),
    "no_columns": random_tensor((9, 0), torch.float32, 7),
    "cube": random_tensor((6, 70, 50), torch.float16, 8),
    "long_rows": random_tensor((3, 70_001), torch.float8_e4m3fn, 9),
    "tall": random_tensor((30_001, 3), torch.bool, 10),
    "square": random_tensor((260, 260), torch.float32, 11),
}


def parts(rank, size):
    return {kind: Part(kind, rank, size) for kind in KINDS}


def items(parts, *, empty=False):
    return {
        kind: {name: part.dtensor(tensor, empty=empty) for name, tensor in TENSORS.items()}
        for kind, part in parts.items()
    }


@pytest.mark.parametrize("saved_on", SIZES)
def test_every_number_of_ranks_to_every_other(tmp_path, saved_on):
    run = make_run(tmp_path)
    name, manifest = save_as(run, saved_on, lambda rank: items(parts(rank, saved_on)))
    for size in SIZES:
        for rank in range(size):
            with playing(rank, size), CheckpointReader(run.checkpoints / name, manifest, threads=1) as reader:
                mine = items(own := parts(rank, size), empty=True)
                TrackedState(mine, rank=rank, world_size=size).restore(reader)
                for kind, tensors in mine.items():
                    for key, tensor in tensors.items():
                        wanted = own[kind].local(TENSORS[key])
                        assert same_bits(tensor.to_local(), wanted), (kind, key, size, rank)


@pytest.mark.parametrize("saved", KINDS)
def test_every_kind_to_every_other(tmp_path, saved):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 6, lambda rank: {"state": items({saved: Part(saved, rank, 6)})[saved]})
    for kind in KINDS:
        for size, rank in ((1, 0), (4, 1), (4, 3), (7, 5)):
            with playing(rank, size), CheckpointReader(run.checkpoints / name, manifest, threads=1) as reader:
                part = Part(kind, rank, size)
                mine = {"state": items({kind: part}, empty=True)[kind]}
                TrackedState(mine, rank=rank, world_size=size).restore(reader)
                for key, tensor in mine["state"].items():
                    assert same_bits(tensor.to_local(), part.local(TENSORS[key])), (kind, key, size, rank)


#: Matrices of a transformer.
NET = {
    "attention": torch.zeros(2304, 768),
    "down": torch.zeros(768, 3072),
    "out": torch.zeros(768, 768),
    "bias": torch.zeros(3072),
}


def net(kind, rank, size):
    part = Part(kind, rank, size)
    return {"net": {name: part.dtensor(tensor) for name, tensor in NET.items()}}


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("rows", 1.02), ("hsdp", 1.02), ("fsdp_tp_rows", 1.02), ("columns", 2), ("fsdp_tp_columns", 2)],
)
def test_hardly_more_is_read_than_needed(tmp_path, kind, bound):
    worst = {}
    for saved_on in SIZES:
        run = make_run(tmp_path / str(saved_on))
        name, manifest = save_as(run, saved_on, lambda rank, size=saved_on: net(kind, rank, size))
        for size in SIZES:
            needed = read = 0
            for rank in range(size):
                with (
                    playing(rank, size),
                    CheckpointReader(run.checkpoints / name, manifest, threads=1) as reader,
                ):
                    mine = net(kind, rank, size)
                    TrackedState(mine, rank=rank, world_size=size).restore(reader)
                    needed += sum(tensor.to_local().nbytes for tensor in mine["net"].values())
                    read += reader.bytes_read
            worst[saved_on, size] = read / needed
    assert max(worst.values()) <= bound, worst
