"""What our layouts say of DTensors, against what PyTorch says of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hpc_resume.checkpoint.placement import layout_of, local_of
from hpc_resume.errors import StateError
from tests.checkpoint.fakes import playing, random_tensor, same_bits
from tests.checkpoint.shapes import quick


@st.composite
def placements(draw):
    """Any mesh and placements, strided ones with any factor that could mean something."""
    mesh = draw(
        st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda extents: math.prod(extents) <= 12)
    )
    placed = []
    for mesh_dim in range(len(mesh)):
        kind = draw(st.sampled_from(["replicate", "shard", "shard", "strided"]))
        dim = draw(st.integers(0, 1))
        if kind == "replicate":
            placed.append(Replicate())
        elif kind == "shard" or math.prod(mesh[mesh_dim + 1 :]) == 1:
            placed.append(Shard(dim))
        else:
            placed.append(
                _StridedShard(dim, split_factor=draw(st.sampled_from([*mesh[mesh_dim + 1 :], 2, 4])))
            )
    return mesh, placed


def global_tensor(shape):
    return torch.arange(math.prod(shape), dtype=torch.int32).view(shape)


@quick
@given(placements(), st.tuples(st.integers(0, 13), st.integers(0, 13)))
def test_layouts_are_what_torch_cuts(case, shape):
    extents, placed = case
    size = math.prod(extents)
    whole = global_tensor(shape)
    told, refused = {}, []
    for rank in range(size):
        with playing(rank, size):
            mesh = DeviceMesh("cpu", torch.arange(size).view(extents), _init_backend=False)
            # Cut by PyTorch itself, without communication.
            tensor = distribute_tensor(whole, mesh, placed, src_data_rank=None)
            local = tensor.to_local()
            try:
                layout = layout_of("w", tensor, rank)
            except StateError:
                refused.append(rank)
                continue
            told[rank] = layout
            box = layout.box(shape, layout.group_of(rank))
            assert same_bits(
                whole[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))], local
            )
            size_there, offset_there = compute_local_shape_and_global_offset(shape, mesh, placed)
            assert box.size == size_there
            assert not box.volume or box.start == offset_there
    assert len(set(told.values())) <= 1, "all ranks say the same"
    if not any(isinstance(placement, _StridedShard) for placement in placed):
        assert not refused


@quick
@given(placements(), st.integers(0, 3), st.integers(0, 3))
def test_strided_shards_that_come_out_even_are_refused_only_if_torn(case, rows, columns):
    extents, placed = case
    size = math.prod(extents)
    shape = (rows * size * 8, columns * size * 8)
    whole = global_tensor(shape)
    for rank in range(size):
        with playing(rank, size):
            mesh = DeviceMesh("cpu", torch.arange(size).view(extents), _init_backend=False)
            tensor = distribute_tensor(whole, mesh, placed, src_data_rank=None)
            local = tensor.to_local()
            try:
                layout_of("w", tensor, rank)
            except StateError:
                # Only where the rank's own rows or columns do not follow each other.
                assert not together(local, shape) or not local.numel()


def together(local, shape):
    """Whether a part is one box."""
    if not local.numel():
        return True
    first = local.reshape(-1)[0].item()
    row, column = divmod(first, shape[1])
    box = global_tensor(shape)[row : row + local.shape[0], column : column + local.shape[1]]
    return same_bits(box.contiguous(), local.contiguous())


@pytest.mark.parametrize(
    ("dp", "tp", "rows"), [(2, 2, 257), (3, 2, 7), (3, 2, 257), (2, 3, 257), (4, 2, 5), (2, 4, 3), (1, 2, 9)]
)
def test_fsdp_over_tensor_parallelism_with_uneven_rows(dp, tp, rows):
    # FSDP2 cuts what tensor parallelism has left. Where that is uneven, its DTensors can say of themselves
    # something else than what they hold (rank 4 of 3 x 2 with 7 rows: nothing, but a row by its placements).
    weight = random_tensor((rows, 6), torch.float32, 1).nan_to_num()
    for rank in range(dp * tp):
        with playing(rank, dp * tp):
            mesh = torch.distributed.device_mesh.init_device_mesh(
                "cpu", (dp, tp), mesh_dim_names=("dp", "tp")
            )
            net = torch.nn.Linear(6, rows, bias=False)
            split = distribute_tensor(weight, mesh["tp"], [Shard(0)], src_data_rank=None)
            net.weight = torch.nn.Parameter(split)
            fully_shard(net, mesh=mesh["dp"])
            layout = layout_of("w", net.weight, rank)
            box = layout.box(weight.shape, layout.group_of(rank))
            assert same_bits(weight[box.start[0] : box.stop[0]], local_of(net.weight))
            mine = chunk(chunk(weight, tp, rank % tp), dp, rank // tp)
            assert same_bits(mine, local_of(net.weight))


def chunk(tensor, parts, place):
    chunks = torch.chunk(tensor, parts)
    return chunks[place] if place < len(chunks) else tensor[:0]


def refusal(placed, extents=(2, 2), local=(4, 4), shape=(8, 8)):
    size = math.prod(extents)
    with playing(0, size):
        mesh = DeviceMesh("cpu", torch.arange(size).view(extents), _init_backend=False)
        tensor = DTensor.from_local(
            torch.zeros(local), mesh, placed, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
        )
        with pytest.raises(StateError) as caught:
            layout_of("model/w", tensor, 0)
    return str(caught.value)


def test_what_cannot_be_stored_is_said_plainly():
    assert "still to be summed" in refusal([Partial(), Replicate()])
    assert "do not lie together" in refusal([Shard(0), _StridedShard(0, split_factor=2)])
    assert "rank 0 holds [3, 4] of [8, 8]" in refusal([Shard(0), Shard(1)], local=(3, 4))


def test_values_of_conjugates_and_negatives_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert same_bits(local_of(tensor.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert same_bits(local_of(tensor.conj().imag), torch.tensor([-2.0, 4.0]))
