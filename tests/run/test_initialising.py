"""The same weights from (seed, name), however a model is wrapped, sharded, or spread over ranks."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.errors import UsageError
from hpc_resume.run.initialising import initialise
from tests.ranks import run_ranks


class Net(torch.nn.Module):
    """Layers that reset themselves, one that resets what is in it, tied weights, buffers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 12)
        self.up = torch.nn.Linear(12, 19)
        self.norm = torch.nn.BatchNorm1d(19)
        self.down = torch.nn.Linear(19, 12)
        self.attention = torch.nn.MultiheadAttention(12, 2)
        self.head = torch.nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.down(self.norm(self.up(self.embed(x)))))


def whole(net):
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        )
        .detach()
        .clone()
        for name, tensor in net.state_dict().items()
    }


def sharded(rank, size, kind):
    torch.manual_seed(rank)  # what the generators were at does not matter
    if kind == "ddp":
        net = Net()
        initialise(net, seed=7)
        return whole(DistributedDataParallel(net))
    if kind == "ddp_late":
        net = DistributedDataParallel(Net())
    elif kind == "fsdp":
        net = Net()
        for layer in (net.up, net.down, net.attention):
            fully_shard(layer)
        fully_shard(net)
    elif kind == "fsdp_meta":
        with torch.device("meta"):
            net = Net()
            net.head.weight = torch.nn.Parameter(torch.empty(11, 12))  # sharded ties don't survive
        fully_shard(net)
    else:
        mesh = init_device_mesh("cpu", (size,))
        net = Net()
        parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    initialise(net, seed=7)
    return whole(net)


def reference(*, untied=False):
    net = Net()
    if untied:
        net.head.weight = torch.nn.Parameter(torch.empty(11, 12))
    initialise(net, seed=7)
    return whole(net)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_and_any_sharding_give_the_same_bits(size):
    for kind in ("ddp", "ddp_late", "fsdp", "fsdp_meta", "tp") if size in {2, 3} else ("fsdp",):
        expected = reference(untied=kind == "fsdp_meta")
        for found in run_ranks(sharded, size, kind):
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), (kind, size, name)


def test_it_follows_seed_and_name_and_nothing_else():
    expected = reference()
    other = Net()
    before = torch.get_rng_state(), torch.get_num_threads()
    initialise(other, seed=8)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    assert not torch.equal(other.up.weight, expected["up.weight"])
    larger = torch.nn.ModuleDict({"more": torch.nn.Linear(3, 3)})
    larger.update(dict(Net().named_children()))
    initialise(larger, seed=7)
    for name, tensor in expected.items():
        assert torch.equal(larger.state_dict()[name], tensor), name
    assert not torch.equal(expected["up.weight"].flatten()[:19], expected["down.weight"].flatten()[:19])


def test_what_it_draws_is_what_the_modules_draw_themselves():
    net = reference()
    bound = 1 / 12**0.5
    assert net["up.weight"].abs().max() < bound
    assert net["up.weight"].abs().max() > 0.9 * bound
    assert abs(float(net["embed.weight"].std()) - 1) < 0.2
    assert (net["attention.in_proj_bias"] == 0).all()  # which the attention sets, not its parts
    assert (net["attention.out_proj.bias"] == 0).all()
    assert net["norm.running_var"].tolist() == [1.0] * 19


def test_a_model_on_the_meta_device_gets_its_memory_and_stays_tied():
    with torch.device("meta"):
        net = Net()
    initialise(net, seed=7)
    assert net.head.weight is net.embed.weight
    for name, tensor in whole(net).items():
        assert torch.equal(tensor, reference()[name]), name


def test_an_init_function_sees_whole_modules_and_their_names():
    names = []

    def init(module, name):
        names.append(name)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)

    net = Net()
    hr.initialise(net, init, seed=7)
    assert sorted(names) == ["attention", "attention.out_proj", "down", "embed", "head", "norm", "up"]
    assert 0.01 < float(net.up.weight.detach().std()) < 0.03
    assert torch.equal(net.up.bias, reference()["up.bias"])


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.scale = torch.nn.Parameter(torch.ones(3))


def test_what_nothing_initialises_is_refused_by_name():
    with pytest.raises(UsageError, match=r"nothing initialises inner\.scale: .*init\(module, name\)"):
        initialise(torch.nn.ModuleDict({"inner": Scaled()}), seed=1)
    net = Scaled()
    initialise(net, lambda m, _: isinstance(m, Scaled) and torch.nn.init.constant_(m.scale, 2), seed=1)
    assert net.scale.tolist() == [2.0] * 3

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(2))

    with torch.device("meta"):
        masked = Masked()
    with pytest.raises(UsageError, match="nothing initialises mask"):
        initialise(masked, seed=1)
    masked = Masked()
    initialise(masked, seed=1)  # it has its values from where it was built
    assert masked.mask.tolist() == [1, 1]
    with pytest.raises(UsageError, match=r"parametrizations\.weight\.original0"):
        initialise(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)), seed=1)
    with pytest.raises(UsageError, match="weight has no shape yet"):
        initialise(torch.nn.LazyLinear(3), seed=1)


def test_a_compiled_model_has_the_same_names():
    net = torch.compile(Net(), backend="eager")
    initialise(net, seed=7)
    for name, tensor in whole(net).items():
        assert torch.equal(tensor, reference()[name]), name
