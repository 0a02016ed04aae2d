"""Checkpoints that are opened outside of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint.boxes import Box
from tests.commits import commit_state
from tests.ranks import run_ranks


class Net(torch.nn.Module):
    """A tied weight, a buffer that counts, state that is no tensor, a table that is worth not reading."""

    def __init__(self, width=33):
        super().__init__()
        self.embed = torch.nn.Embedding(4096, width)
        self.up = torch.nn.Linear(width, 257)
        self.head = torch.nn.Linear(width, 4096, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.extra = {"seen": 5}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(1)
    net = Net()
    root = tmp_path_factory.mktemp("run")
    commit_state(root, model=net, extra={"best": float("nan"), "when": (1, 2), "array": np.arange(5), "low": torch.ones(3).bfloat16()})  # fmt: skip
    return root, net


def test_names_and_shapes_without_reading(saved):
    root, _ = saved
    with hr.Checkpoint(root) as ckpt:
        assert ckpt.keys == ("model", "extra")
        assert ckpt.names("model/*.weight") == ["model/embed.weight", "model/head.weight", "model/up.weight"]
        assert ckpt.names("nothing*") == []
        assert "model/up.bias" in ckpt
        assert len(ckpt) == len(list(ckpt)) == 7
        assert ckpt.record("model/head.weight").shape == (4096, 33)
        assert (ckpt.step, ckpt.reader.bytes_read) == (7, 0)


def test_one_tensor_reads_its_bytes_alone(saved):
    root, net = saved
    with hr.Checkpoint(root) as ckpt:
        assert torch.equal(ckpt["model/up.weight"], net.up.weight)
        assert net.up.weight.nbytes <= ckpt.reader.bytes_read < net.embed.weight.nbytes // 4
        before = ckpt.reader.bytes_read
        assert torch.equal(ckpt.read("model/head.weight", slice(10, 12)), net.embed.weight[10:12])
        assert ckpt.reader.bytes_read - before <= 2 * 128 * 1024 < net.embed.weight.nbytes


@pytest.mark.parametrize(
    "part",
    [
        slice(5, 70),
        (slice(None), slice(3, 9)),
        (4095, 2),
        (-1, slice(-3, None)),
        7,
        (slice(9, 4),),
        (),
    ],
    ids=str,
)
def test_parts_are_those_of_the_tensor(saved, part):
    root, net = saved
    with hr.Checkpoint(root) as ckpt:
        assert torch.equal(ckpt.read("model/embed.weight", part), net.embed.weight[part])
        low = ckpt.read("model/embed.weight", part, dtype="bfloat16")
        assert torch.equal(low, net.embed.weight[part].bfloat16())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (slice(0, 10, 2), "a step of 2"),
        ((1, 2, 3), "3 indices for a shape of"),
        (4096, "index 4096 in a dimension of 4096"),
        (Box((4000, 0), (100, 33)), "not within its shape"),
    ],
    ids=str,
)
def test_parts_that_there_are_not(saved, part, message):
    with hr.Checkpoint(saved[0]) as ckpt, pytest.raises(hr.UsageError, match=message):
        ckpt.read("model/embed.weight", part)


def test_loading_by_pattern_with_another_type_leaves_integers_alone(saved):
    root, net = saved
    with hr.Checkpoint(root) as ckpt:
        got = ckpt.load("model/*", dtype=torch.bfloat16)
        assert got["model/count"].dtype == torch.int64
        assert torch.equal(got["model/up.weight"], net.up.weight.bfloat16())
        assert got["model/head.weight"] is got["model/embed.weight"]
        with pytest.raises(hr.UsageError, match="did you mean bfloat16"):
            ckpt.load(dtype="bfloat61")
        with pytest.raises(hr.UsageError, match="no floating-point type"):
            ckpt.load(dtype=torch.int32)


def test_a_name_that_is_wrong_says_which_are_near(saved):
    with hr.Checkpoint(saved[0]) as ckpt:
        with pytest.raises(KeyError) as caught:
            ckpt["model/up.wieght"]
        assert "did you mean model/up.weight" in str(caught.value)
        assert isinstance(caught.value, hr.UsageError)
        with pytest.raises(hr.TensorNotFound, match="fits 'modell"):
            ckpt.load("modell/*")


def test_the_state_of_a_key_is_what_was_tracked(saved):
    with hr.Checkpoint(saved[0]) as ckpt:
        extra = ckpt.state("extra")
        assert extra["best"] != extra["best"]
        assert (extra["when"], extra["array"].tolist()) == ((1, 2), [0, 1, 2, 3, 4])
        assert extra["low"].dtype == torch.bfloat16
        with pytest.raises(hr.MismatchError, match=r"'extras'; there are: model, extra"):
            ckpt.state("extras")


def test_into_a_module_with_its_ties_and_extra_state(saved):
    root, net = saved
    other = Net().bfloat16()
    other.extra = {}
    with hr.Checkpoint(root) as ckpt:
        done = ckpt.load_into(other)
    assert (done.missing, done.unexpected) == ((), ())
    assert "model/head.weight" in done.loaded
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.embed.weight, net.embed.weight.bfloat16())
    assert other.extra == {"seen": 5}


def test_a_conjugate_is_loaded_as_what_it_shows(tmp_path):
    net, other = (torch.nn.Module() for _ in range(2))
    for each in (net, other):
        each.weight = torch.nn.Parameter(torch.randn(5, dtype=torch.complex64).conj())
    commit_state(tmp_path, model=net)
    with hr.Checkpoint(tmp_path) as ckpt:
        ckpt.load_into(other)
    assert torch.equal(other.weight, net.weight)
    assert other.weight.is_conj()


def test_into_a_state_dict_by_pattern(saved):
    root, net = saved
    state = {
        name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items() if name != "_extra_state"
    }
    with hr.Checkpoint(root) as ckpt:
        done = ckpt.load_into(state, pattern="up.*")
    assert done.loaded == ("model/up.bias", "model/up.weight")
    assert torch.equal(state["up.weight"], net.up.weight)
    assert not state["embed.weight"].any()


def test_every_misfit_is_listed_and_nothing_changes(saved):
    net = Net()
    net.up = torch.nn.Linear(33, 256)
    net.new = torch.nn.Linear(2, 2)
    net.count = torch.tensor(3.0)
    del net.embed
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if name != "_extra_state"}
    with hr.Checkpoint(saved[0]) as ckpt:
        with pytest.raises(hr.MismatchError) as caught:
            ckpt.load_into(net)
        for expected in (
            "model/up.weight: shape [256, 33], in the checkpoint [257, 33]",
            "model/up.bias: shape [256], in the checkpoint [257]",
            "model/count: float32, in the checkpoint int64",
            "model/new.weight: in the target, not in the checkpoint",
            "model/embed.weight: in the checkpoint, not in the target",
        ):
            assert expected in str(caught.value)
        with pytest.raises(hr.MismatchError) as caught:
            ckpt.load_into(net, strict=False)
        assert "up.weight" in str(caught.value)
        assert "new.weight" not in str(caught.value)
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
        done = ckpt.load_into(net, pattern="[!uc]*", strict=False)
    assert done.missing == ("model/new.bias", "model/new.weight")
    assert done.unexpected == ("model/embed.weight",)
    assert torch.equal(net.head.weight, saved[1].embed.weight)


def test_one_tensor_there_cannot_take_two(tmp_path):
    commit_state(tmp_path, model={"a": torch.ones(3), "b": torch.zeros(3)})
    both = torch.zeros(3)
    with hr.Checkpoint(tmp_path) as ckpt, pytest.raises(hr.MismatchError, match="one tensor in the target"):
        ckpt.load_into({"a": both, "b": both})


def test_which_checkpoint(tmp_path):
    older = commit_state(tmp_path, 3, model={"a": torch.ones(3)})
    newer = commit_state(tmp_path, 5, model={"a": torch.zeros(3)})
    commit_state(tmp_path, 6, content="model", model={"a": torch.zeros(3)})
    assert hr.Checkpoint(tmp_path).path == newer.resolve()
    assert hr.Checkpoint(tmp_path, step=3).path == hr.Checkpoint(older).path
    assert hr.Checkpoint(tmp_path, step=6).manifest.content == "model"
    with pytest.raises(hr.CheckpointNotFound, match=r"no checkpoint of step 4; there are: 6, 5, 3"):
        hr.Checkpoint(tmp_path, step=4)
    with pytest.raises(hr.UsageError, match="is the checkpoint of step 3"):
        hr.Checkpoint(older, step=5)
    with pytest.raises(hr.CheckpointNotFound, match="neither a run's folder"):
        hr.Checkpoint(tmp_path / "nix")
    (newer / "manifest.json").write_bytes(b"{}")
    with pytest.raises(hr.IntegrityError, match="ask for it with step=3"):
        hr.Checkpoint(tmp_path)


def test_a_flipped_bit_is_never_handed_out(tmp_path):
    folder = commit_state(tmp_path, model={"a": torch.ones(30_000), "b": torch.ones(30_000)})
    path = folder / "rank-00000-of-00001.h5"
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(30_000).numpy().tobytes()) + 11] ^= 1
    path.write_bytes(data)
    with hr.Checkpoint(tmp_path) as ckpt:
        damaged = [name for name in ckpt if not _whole(ckpt, name)]
    assert len(damaged) == 1


def _whole(ckpt, name):
    try:
        return bool(ckpt[name].all())
    except hr.IntegrityError:
        return False


def sharded(rank, size, folder, kind):
    net = Net(64)
    if kind == "fsdp":
        fully_shard(net.up, mesh=init_device_mesh("cpu", (size,)))
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    else:
        net = DistributedDataParallel(net)
    with hr.Checkpoint(Path(folder)) as ckpt:
        ckpt.load_into(net)
        read = ckpt.reader.bytes_read
    inner = net.module if kind == "ddp" else net
    weight = inner.embed.weight
    return read, (weight.full_tensor() if kind == "fsdp" else weight).detach().clone()


@pytest.mark.parametrize(("kind", "size"), [("fsdp", 2), ("fsdp", 3), ("ddp", 2)])
def test_each_rank_reads_its_part(tmp_path, kind, size):
    torch.manual_seed(4)
    net = Net(64)
    folder = commit_state(tmp_path, model=net)
    assert folder.is_dir()
    total = sum(p.nbytes for p in net.parameters())
    for read, weight in run_ranks(sharded, size, str(tmp_path), kind):
        assert torch.equal(weight, net.embed.weight)
        assert read <= 1.05 * total / (size if kind == "fsdp" else 1) + 200_000
