"""Ranks that do not track the same: what works, and what is refused before anything is committed."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError, StateError
from tests.checkpoint.fakes import make_run, playing, random_tensor, same_bits, save_as

ROWS = (Shard(0),)
WEIGHT = random_tensor((300, 64), torch.float32, 1).nan_to_num()


def on_mesh(ranks, rank, tensor, extents=None, placements=ROWS):
    """This rank's part of a tensor on some of the ranks, split in rows by the last dimension of the mesh."""
    mesh = DeviceMesh("cpu", torch.tensor(ranks).view(extents or (len(ranks),)), _init_backend=False)
    parts = mesh.mesh.shape[-1] if isinstance(placements[-1], Shard) else 1
    place = ranks.index(rank) % parts
    local = torch.chunk(tensor, parts)[place].clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def refused(tmp_path, size, items_of, match):
    run = make_run(tmp_path)
    with pytest.raises((IntegrityError, StateError), match=match):
        save_as(run, size, items_of)
    assert run.checkpoint_names() == []


def restored(run, name, manifest, rank, size, make):
    with playing(rank, size), CheckpointReader(run.checkpoints / name, manifest) as reader:
        items = make()
        TrackedState(items, rank=rank, world_size=size).restore(reader)
    return items


def test_stages_of_a_pipeline_on_their_own_meshes(tmp_path):
    run = make_run(tmp_path)
    stages = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}

    def items(rank, tensor):
        return {"model": {f"stage{rank // 2}.weight": on_mesh(stages[rank], rank, tensor + rank // 2)}}

    name, manifest = save_as(run, 4, lambda rank: items(rank, WEIGHT))
    assert set(manifest.tensors) == {"model/stage0.weight", "model/stage1.weight"}
    for rank in range(4):
        mine = restored(run, name, manifest, rank, 4, lambda r=rank: items(r, 0 * WEIGHT))
        (tensor,) = mine["model"].values()
        assert same_bits(tensor.to_local(), torch.chunk(WEIGHT + rank // 2, 2)[rank % 2])


def test_stages_whose_tensors_have_the_same_names_are_refused(tmp_path):
    stages = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}
    refused(
        tmp_path,
        4,
        lambda rank: {"model": {"weight": on_mesh(stages[rank], rank, WEIGHT)}},
        r"model/weight is float32 \[300, 64\] on ranks 0, 1 split .* on ranks 2, 3 .* name the parts of a pipeline",
    )


@pytest.mark.parametrize("size", [2, 3])
def test_plain_tensors_of_some_ranks_are_refused(tmp_path, size):
    refused(
        tmp_path, size, lambda rank: {"model": {f"{rank}.weight": WEIGHT}}, "the ranks track different models"
    )


def test_plain_tensors_that_are_not_the_same_are_refused(tmp_path):
    class Stage(torch.nn.Module):
        def __init__(self, rank):
            super().__init__()
            torch.manual_seed(rank)
            self.layer = torch.nn.Linear(30, 30)

    refused(
        tmp_path / "module",
        2,
        lambda rank: {"model": Stage(rank)},
        r"model/layer\.(bias|weight) of rank 1 is not the same as rank 0's \(one of 2 such tensors\), and only rank 0's",
    )
    refused(
        tmp_path / "dict",
        2,
        lambda rank: {"extra": {"mask": torch.arange(9) * (rank + 1), "z": torch.tensor(1j)}},
        "extra/mask of rank 1 is not the same",
    )


def test_replicas_that_have_drifted_and_buffers_are_rank_zeros(tmp_path):
    def items(rank):
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(30)
        norm.running_mean += rank
        norm.weight.data *= 1 + rank * 1e-3
        return {
            "model": norm,
            "half": {"nan": torch.full((2,), torch.nan), "fp8": torch.ones(3).to(torch.float8_e5m2)},
        }

    run = make_run(tmp_path)
    name, manifest = save_as(run, 2, items)
    mine = restored(run, name, manifest, 1, 2, lambda: items(1))
    assert same_bits(mine["model"].running_mean, torch.zeros(30))
    assert same_bits(mine["model"].weight, torch.ones(30))


@pytest.mark.parametrize("same_names", [True, False])
def test_replicas_of_a_group_of_ranks(tmp_path, same_names):
    def items(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        torch.manual_seed(rank // 2)
        net = torch.nn.Linear(300, 64)
        wrapped = DistributedDataParallel(net, process_group=groups[rank // 2])
        return {"model" if same_names else f"stage{rank // 2}": wrapped}

    if same_names:
        refused(
            tmp_path,
            4,
            items,
            r"model/bias is float32 \[64\] on ranks 0, 1 to some ranks and .* on ranks 2, 3",
        )
        return
    run = make_run(tmp_path)
    name, manifest = save_as(run, 4, items)
    assert manifest.tensors["stage1/weight"].layout.ranks == (2, 3)

    def zeros(rank):
        mine = items(rank)
        torch.nn.init.zeros_(mine[f"stage{rank // 2}"].module.weight)
        return mine

    for rank in (1, 3):
        mine = restored(run, name, manifest, rank, 4, lambda r=rank: zeros(r))
        torch.manual_seed(rank // 2)
        assert same_bits(mine[f"stage{rank // 2}"].module.weight, torch.nn.Linear(300, 64).weight)


def test_what_lies_on_a_slice_of_a_mesh_is_stored_once(tmp_path):
    # FSDP over tensor parallelism: what tensor parallelism leaves alone is on the columns of the mesh only.
    def items(rank):
        return {
            "model": {
                "split": on_mesh([0, 1, 2, 3], rank, WEIGHT, (2, 2), (Replicate(), Shard(0))),
                "norm": on_mesh([rank % 2, rank % 2 + 2], rank, WEIGHT + 1),
            }
        }

    run = make_run(tmp_path)
    name, manifest = save_as(run, 4, items)
    assert manifest.costs["state_bytes"] - 2 * WEIGHT.nbytes < 20_000  # ... and the ranks' own objects
    assert manifest.tensors["model/norm"].layout.ranks == (0, 2, 1, 3)
    empty = {"split": torch.zeros_like(WEIGHT), "norm": torch.zeros_like(WEIGHT)}
    whole = restored(run, name, manifest, 0, 1, lambda: {"model": empty})
    assert same_bits(whole["model"]["split"], WEIGHT)
    assert same_bits(whole["model"]["norm"], WEIGHT + 1)


def test_a_rank_outside_the_mesh_is_told(tmp_path):
    def items(rank):
        mesh = DeviceMesh("cpu", torch.tensor([0]), _init_backend=False)
        return {"model": {"weight": DTensor.from_local(WEIGHT, mesh, [Replicate()], run_check=False)}}

    refused(tmp_path, 2, items, r"model/weight: rank 1 has no part in its mesh of ranks \[0\]")


def trained(rank, make, *, differing=0.0):
    """A model under DDP with buffers, and an optimizer that has made a step or two."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20))
    model = DistributedDataParallel(net)
    optimizer = make(net.parameters())
    for _ in range(2):
        optimizer.zero_grad()

        def loss():
            found = net(torch.ones(4, 30)).square().sum()
            found.backward()
            return found

        loss()
        optimizer.step(loss)
    for state in optimizer.state.values():
        if rank and differing and "step" in state:
            state["step"] += differing
    return {"model": model, "optimizer": optimizer}


def layouts(tmp_path, make, **options):
    run = make_run(tmp_path)
    _, manifest = save_as(run, 3, lambda rank: trained(rank, make, **options))
    return {name: record.layout.ranks for name, record in manifest.tensors.items()}


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.Adafactor,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    ],
)
def test_all_state_of_parameters_under_ddp_is_replicated_and_buffers_are_rank_zeros(tmp_path, make):
    found = layouts(tmp_path, make)
    buffers = {"model/1.running_mean", "model/1.running_var", "model/1.num_batches_tracked"}
    assert {name for name, ranks in found.items() if ranks == (0,)} == buffers
    assert {ranks for name, ranks in found.items() if name not in buffers} == {(0, 1, 2)}
    assert any(name.startswith("optimizer/state/") for name in found)


def test_state_of_an_optimizer_that_computes_the_loss_is_rank_zeros(tmp_path):
    found = layouts(tmp_path, torch.optim.LBFGS)
    states = {ranks for name, ranks in found.items() if name.startswith("optimizer/")}
    assert states == {(0,)}


def test_an_optimizer_whose_state_is_not_the_same_is_refused(tmp_path):
    refused(
        tmp_path,
        2,
        lambda rank: trained(rank, torch.optim.AdamW, differing=5),
        r"optimizer/state/.*/step of rank 1 is not the same as rank 0's",
    )


def test_zero_is_refused_before_training():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with playing(0, 2):
        net = torch.nn.Linear(3, 3)
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=1e-3)
        with pytest.raises(StateError, match=r"track\(optimizer=…\): ZeroRedundancyOptimizer .*fully_shard"):
            TrackedState({"model": net, "optimizer": optimizer}, rank=0, world_size=2)
