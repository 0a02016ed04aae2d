"""Gradients that are still to be used are stored; those that have been used are not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpc_resume.checkpoint.gradients import Gradients, merged
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError, MismatchError, StateError
from tests.checkpoint.fakes import make_run, playing, same_bits, save_as


def pair(make=torch.optim.SGD, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    return net, make(net.parameters(), lr=0.1, **options)


def backward(net, value=1.0):
    net(torch.full((2, 4), value)).square().sum().backward()


def stored(net, *optimizers):
    gradients = Gradients({"net": net}, optimizers)
    found = gradients.accumulated()
    return sorted([*found.shared, *found.own])


ALL = ["gradients/net/0.bias", "gradients/net/0.weight", "gradients/net/1.bias", "gradients/net/1.weight"]


@pytest.mark.parametrize("zero_first", [True, False])
def test_what_the_optimizer_has_used_is_not_stored(zero_first):
    net, optimizer = pair()
    Gradients({"net": net}, [optimizer])  # as tracking does
    for _ in range(3):
        if zero_first:
            optimizer.zero_grad()
        backward(net)
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
            assert stored(net, optimizer) == []
    assert stored(net, optimizer) == []
    optimizer.zero_grad()
    backward(net)
    assert stored(net, optimizer) == ALL  # the first micro-batch of the next step
    backward(net)
    assert stored(net, optimizer) == ALL
    optimizer.step()
    assert stored(net, optimizer) == []
    backward(net)  # into gradients that the optimizer has used
    assert stored(net, optimizer) == ALL


def test_a_backward_pass_after_the_step_is_seen_though_addresses_are_used_again():
    net, optimizer = pair()
    Gradients({"net": net}, [optimizer])
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        backward(net)
        assert stored(net, optimizer) == ALL


def test_gradients_that_nobody_ever_drops_are_stored():
    net, optimizer = pair()
    Gradients({"net": net}, [optimizer])
    for _ in range(3):
        backward(net)
        optimizer.step()  # and no zero_grad: the next backward pass adds to what is there
        assert stored(net, optimizer) == ALL


def test_zeros_are_named_and_not_stored():
    net, optimizer = pair()
    gradients = Gradients({"net": net}, [optimizer])
    for _ in range(3):
        backward(net)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    found = gradients.accumulated()
    assert (sorted(found.zeros), found.own, found.shared) == (ALL, {}, {})


def test_two_optimizers_are_told_apart():
    net, _ = pair()
    one, two = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    Gradients({"net": net}, [one, two])
    for step in range(6):
        backward(net)
        one.step()
        one.zero_grad()
        if step % 3 == 2:
            two.step()
            two.zero_grad()
        assert stored(net, one, two) == ([] if step % 3 == 2 else ALL[2:])


def restored(run, name, manifest, make, rank=0, size=1):
    with playing(rank, size), CheckpointReader(run.checkpoints / name, manifest) as reader:
        items = make()
        state = TrackedState(items, rank=rank, world_size=size)
        state.restore(reader)
    return items, state


def saved_on(tmp_path, values, wrap=DistributedDataParallel):
    """As many ranks as there are values, each of which has gone through a micro-batch of its own without DDP's sum."""

    def items(rank):
        net, optimizer = pair()
        backward(net, values[rank])
        return {"net": wrap(net), "optimizer": optimizer}

    run = make_run(tmp_path)
    return run, *save_as(run, len(values), items)


def expected(value):
    net, _ = pair()
    backward(net, value)
    return [parameter.grad for parameter in net.parameters()]


def fresh(wrap=DistributedDataParallel):
    net, optimizer = pair()
    return {"net": wrap(net), "optimizer": optimizer}


def gradients_of(items):
    return [parameter.grad for parameter in items["net"].parameters()]


def test_each_rank_gets_its_own_back(tmp_path):
    run, name, manifest = saved_on(tmp_path, [1.0, 2.0, 3.0])
    for rank, value in enumerate([1.0, 2.0, 3.0]):
        items, state = restored(run, name, manifest, fresh, rank, 3)
        assert all(map(same_bits, gradients_of(items), expected(value)))
        assert state.notes == ["gradients of 4 parameters that were still to be used were restored"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_on_another_number_of_ranks_the_mean_over_ranks_stays(tmp_path, size):
    values = [1.0, 2.0, 3.0]
    run, name, manifest = saved_on(tmp_path, values)
    parts = []
    for rank in range(size):
        items, state = restored(run, name, manifest, fresh, rank, size)
        parts.append(gradients_of(items))
        assert "summed up on 3 ranks, and their mean over ranks was kept" in state.notes[-1]
    mean = [torch.stack(each).double().mean(0) for each in zip(*parts, strict=True)]
    right = [torch.stack(each).double().mean(0) for each in zip(*map(expected, values), strict=True)]
    for found, wanted in zip(mean, right, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_synchronised_gradients_go_to_every_rank(tmp_path):
    run, name, manifest = saved_on(tmp_path, [2.0, 2.0, 2.0])
    for rank in range(2):
        items, _ = restored(run, name, manifest, fresh, rank, 2)
        assert all(map(same_bits, gradients_of(items), expected(2.0)))


def test_without_gradients_there_are_none_after_a_restore(tmp_path):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: fresh(lambda net: net))

    def dirty():
        items = fresh(lambda net: net)
        backward(items["net"])
        return items

    items, state = restored(run, name, manifest, dirty)
    assert gradients_of(items) == [None] * 4
    assert state.notes == []


def test_zeros_come_back_as_zeros(tmp_path):
    def items(rank):
        net, optimizer = pair()
        backward(net)
        optimizer.zero_grad(set_to_none=False)
        return {"net": net, "optimizer": optimizer}

    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, items)
    found, _ = restored(run, name, manifest, lambda: fresh(lambda net: net))
    assert all((gradient == 0).all() for gradient in gradients_of(found))


def test_sparse_ones_that_are_still_to_be_used_are_refused_by_name():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True))
    optimizer = torch.optim.SparseAdam(net.parameters())
    gradients = Gradients({"net": net}, [optimizer])
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        assert gradients.accumulated().own == {}
    optimizer.zero_grad()
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(StateError, match=r"net/0\.weight: its gradient is sparse and still to be used"):
        gradients.accumulated()


def test_damaged_ones_are_refused(tmp_path):
    run, name, manifest = saved_on(tmp_path, [1.0], wrap=lambda net: net)

    def other():
        net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        net.append(torch.nn.Linear(3, 2))
        net[1].weight = torch.nn.Parameter(torch.zeros(2, 3))
        return {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}

    restored(run, name, manifest, other)

    def larger():
        items = other()
        items["net"].append(torch.nn.Linear(2, 2))
        return items

    with pytest.raises(MismatchError, match="net/2"):
        restored(run, name, manifest, larger)
    parameters = {"a": torch.zeros(2)}
    with pytest.raises(IntegrityError, match="a: the ranks' gradients are not of one shape"):
        merged([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], parameters, 0, 1)


def test_an_accumulation_that_fully_shard_keeps_to_itself_is_refused():
    with playing(0, 1):
        net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        fully_shard(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        gradients = Gradients({"net": net}, [optimizer])
        backward(net)
        assert list(gradients.accumulated().shared) == ALL[:2][::-1]
        optimizer.zero_grad()
        net.set_requires_gradient_sync(False)
        backward(net)
        with pytest.raises(StateError, match=r"fully_shard keeps gradients .*run\.micro_batches"):
            gradients.accumulated()


def test_sharded_ones_go_to_any_number_of_ranks(tmp_path):
    def items(rank, size):
        net, _ = pair()
        fully_shard(net)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
            for number, row in enumerate(parameter.grad.to_local()):
                row.fill_(rank * 100 + number)
        return {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}

    run = make_run(tmp_path)
    name, manifest = save_as(run, 2, lambda rank: items(rank, 2))
    assert manifest.tensors["gradients/net/0.weight"].shape == (3, 4)
    found, _ = restored(run, name, manifest, lambda: fresh(lambda net: net))
    assert gradients_of(found)[0][:, 0].tolist() == [0, 1, 100]  # rows of rank 0, and of rank 1


def test_own_ones_go_to_sharded_parameters_as_their_mean(tmp_path):
    run, name, manifest = saved_on(tmp_path, [1.0, 3.0])

    def sharded():
        items = fresh(lambda net: net)
        fully_shard(items["net"])
        items["optimizer"] = torch.optim.SGD(items["net"].parameters(), lr=0.1)
        return items

    right = torch.stack([expected(1.0)[0], expected(3.0)[0]]).mean(0)
    for rank in range(2):
        items, _ = restored(run, name, manifest, sharded, rank, 2)
        mine = gradients_of(items)[0].to_local()
        torch.testing.assert_close(mine, right.chunk(2)[rank])


def test_frozen_parameters_are_frozen_and_trained_ones_trained(tmp_path):
    def items(rank):
        found = fresh(lambda net: net)
        found["net"][0].weight.requires_grad_(False)
        return found

    def other():
        found = fresh(lambda net: net)
        found["net"][1].requires_grad_(False)
        return found

    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, items)
    found, state = restored(run, name, manifest, other)
    assert [p.requires_grad for p in found["net"].parameters()] == [False, True, True, True]
    assert state.notes == [
        "net/1.weight, net/1.bias are trained, as when the checkpoint was taken",
        "net/0.weight are frozen, as they were then",
    ]


def test_what_ddp_would_not_average_is_refused(tmp_path):
    run, name, manifest = saved_on(tmp_path, [1.0, 1.0])

    def frozen():
        net, optimizer = pair()
        net[1].requires_grad_(False)
        return {"net": DistributedDataParallel(net), "optimizer": optimizer}

    with pytest.raises(MismatchError, match=r"net/1\.bias: frozen now, trained in the checkpoint"):
        restored(run, name, manifest, frozen, 0, 2)


def test_the_names_are_taken():
    for key in ("gradients", "ranks"):
        with pytest.raises(StateError, match="the name is taken"):
            TrackedState({key: {}}, rank=0, world_size=1)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_whatever_ranks_had_its_mean_stays(values, size):
    saved = [{"a": torch.tensor(each)} for each in values]
    parameters = {"a": torch.zeros(3)}
    parts = [merged(saved, parameters, rank, size)["a"] for rank in range(size)]
    mean = torch.stack([each["a"] for each in saved]).double().mean(0)
    torch.testing.assert_close(torch.stack(parts).double().mean(0), mean, rtol=1e-6, atol=1e-6)


class Wrapper(torch.optim.Optimizer):
    """As other libraries wrap optimizers: one by name alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_gradients_of_an_optimizer_that_can_not_be_watched_are_stored():
    net, optimizer = pair()
    wrapper = Wrapper(optimizer)
    assert stored(net, wrapper) == []
    backward(net)
    wrapper.step()
    assert stored(net, wrapper) == ALL
    optimizer.zero_grad()
    assert stored(net, wrapper) == []


def as_bytes(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parameters", as_bytes(b"[]")),
        ("parameters", as_bytes(b"{")),
        ("parameters", as_bytes(b'{"frozen": 3, "zeros": []}')),
        ("parameters", as_bytes(b'{"frozen": [], "zeros": [[]]}')),
        ("parameters", torch.zeros(3)),
        ("gradients/net/0%2Eweight", torch.zeros(3)),
        ("gradients/net/0.weight", torch.zeros(2, 2)),
        ("gradients/net/0.weight", torch.zeros(3, 4, dtype=torch.int64)),
        ("streams/noise", torch.zeros(0)),
    ],
)
def test_what_is_made_up_is_no_state(tmp_path, monkeypatch, name, value):
    run, found, manifest = saved_on(tmp_path, [1.0], wrap=lambda net: net)
    whole = CheckpointReader.private

    def private(self, rank, prefix):
        there = {f"{prefix}{each}": tensor for each, tensor in whole(self, rank, prefix).items()}
        if (full := f"ranks/00000/{name}").startswith(prefix):
            there[full] = value
        return {each.removeprefix(prefix): tensor for each, tensor in there.items()}

    monkeypatch.setattr(CheckpointReader, "private", private)
    with pytest.raises((IntegrityError, MismatchError)):
        restored(run, found, manifest, lambda: fresh(lambda net: net))
