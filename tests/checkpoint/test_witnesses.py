"""Tensors that ranks are taken to have alike: what they do not have alike is refused by name, and nothing else is."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint import store, witnesses
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError
from hpc_resume.rundir import RunDirectory
from tests.checkpoint.fakes import header, make_run, playing, same_bits, save_as, writer
from tests.ranks import Attempt, run_ranks
from tests.run.training import Samples

NUMBER = r"and of a tensor only rank 0's would be stored: .* Python number \(\.item\(\), \.tolist\(\)\), which each"


def refusal(tmp_path, items_of, size=2):
    """What is said of a state that is not committed; empty if it is."""
    run = make_run(tmp_path)
    try:
        save_as(run, size, items_of)
    except IntegrityError as error:
        assert run.checkpoint_names() == []
        return str(error)
    return ""


class Average:
    """A metric that every rank sums up for itself."""

    def __init__(self, total):
        self.total = torch.tensor(total)

    def state_dict(self):
        return {"sums": [self.total]}

    def load_state_dict(self, state):
        (self.total,) = state["sums"]


def changed(tensor, place):
    """A copy with one element that is another one."""
    copy = tensor.clone()
    copy[place] = ~copy[place] if copy.dtype == torch.bool else copy[place] + 1
    return copy


MASK = torch.zeros(5, 7, dtype=torch.bool)
LONG = torch.arange(70_000)
MANY = {f"{number:04d}": torch.tensor(number) for number in range(1000)}
STATES = {
    "tokens": (lambda rank: {"n": torch.tensor(105_000 if rank else 100_003)}, "state/n of rank 1 is"),
    "averages": (lambda rank: {"loss": torch.tensor(2.15 if rank else 2.31)}, "state/loss of rank 1"),
    "nearly": (lambda rank: {"loss": torch.tensor(2.31) + rank * 2**-21}, "state/loss of rank 1"),
    "beyond_doubles": (lambda rank: {"hash": torch.tensor([2**62 + rank])}, "state/hash of rank 1"),
    "one_bit": (lambda rank: {"mask": changed(MASK, (4, 3)) if rank else MASK}, "state/mask of rank 1"),
    "an_array": (lambda rank: {"seen": np.arange(3, dtype=np.uint16) + rank}, "state/seen of rank 1"),
    "the_end_of_much": (lambda rank: {"ids": changed(LONG, -1) if rank else LONG}, "state/ids of rank 1"),
    "one_is_nan": (lambda rank: {"x": torch.tensor([1.0, torch.nan if rank else 1.0])}, "state/x of rank 1"),
    "eighths": (lambda rank: {"x": torch.tensor([1.0, rank]).to(torch.float8_e5m2)}, "state/x of rank 1"),
    "complex": (lambda rank: {"x": torch.tensor([1 + 1j, 2 - 1j * rank])}, "state/x of rank 1"),
    "one_of_many": (
        lambda rank: MANY | {"0501": torch.tensor(501 + rank)},
        r"state/0500 … state/0503 of rank 1",
    ),
    "an_object": (lambda rank: Average(10.0 + rank / 8), r"state/sums/0 of rank 1"),
    "several": (
        lambda rank: {"a": torch.tensor(rank), "b": torch.tensor(min(rank, 1)), "c": torch.tensor(0)},
        r"state/a of ranks 1, 2 is not the same as rank 0's \(one of 2 such tensors\)",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_what_is_no_weight_must_be_the_same_on_all_ranks(tmp_path, name):
    make, expected = STATES[name]
    said = refusal(
        tmp_path / "differing", lambda rank: {"state": make(rank)}, size=3 if name == "several" else 2
    )
    assert pytest.RaisesExc(IntegrityError, match=rf"step 1: {expected}.*{NUMBER}").matches(
        IntegrityError(said)
    )
    assert refusal(tmp_path / "same", lambda _: {"state": make(1)}) == ""


def test_each_rank_keeps_its_python_numbers(tmp_path):
    run = make_run(tmp_path)
    name, manifest = save_as(
        run, 2, lambda rank: {"state": {"tokens": 105_000 if rank else 100_003, "at": [rank]}}
    )
    for rank in range(2):
        state = {"tokens": 0, "at": [None]}
        with playing(rank, 2), CheckpointReader(run.checkpoints / name, manifest) as reader:
            TrackedState({"state": state}, rank=rank, world_size=2).restore(reader)
        assert state == {"tokens": 105_000 if rank else 100_003, "at": [rank]}


def test_what_is_the_same_number_is_the_same(tmp_path):
    """Zeros, NaNs, strides, and views that are not in order in memory."""
    table = torch.arange(120_000.0).reshape(300, 400)
    bits = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)

    def items(rank):
        state = {
            "zero": torch.tensor([-0.0 if rank else 0.0]),
            "nan": bits[rank],
            "half": torch.tensor([torch.nan, -0.0 if rank else 0.0]).bfloat16(),
            "table": table.t().contiguous().t() if rank else table,
            "small": table[:3, :4].t().contiguous().t() if rank else table[:3, :4],
            "conjugate": torch.tensor([1 - 2j]) if rank else torch.tensor([1 + 2j]).conj(),
            "empty": torch.empty(0, rank + 1)[:, :0],
        }
        return {"state": state}

    assert refusal(tmp_path, items) == ""


def averaged(rank, drift, scale=1.0, numbers=torch.float32):
    """A model under DDP, a running average of its weights in a dict, and what else there is with a shape of theirs."""
    torch.manual_seed(0)
    net = torch.nn.Linear(40, 30).to(numbers)
    average = {name: tensor * (1 + rank * drift) * scale for name, tensor in net.state_dict().items()}
    return {"model": DistributedDataParallel(net), "average": average}


def test_running_averages_of_weights_may_drift_as_weights_do_and_no_further(tmp_path):
    assert refusal(tmp_path / "drift", lambda rank: averaged(rank, 1e-5)) == ""
    assert refusal(tmp_path / "half", lambda rank: averaged(rank, 2**-6, numbers=torch.bfloat16)) == ""
    said = refusal(tmp_path / "own", lambda rank: averaged(rank, 1e-2))
    assert (
        "average/bias of rank 1 is not the same as rank 0's (one of 2 such tensors), and only rank 0's"
        in said
    )


def test_buffers_in_a_running_average_are_rank_zeros_as_those_of_the_model(tmp_path):
    def items(rank, name="module.1.running_mean"):
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
        average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.module[1].running_mean += rank
        average[name] = average.pop("module.1.running_mean") + rank
        return {"model": model, "average": average}

    assert refusal(tmp_path / "buffers", items) == ""
    said = refusal(tmp_path / "others", lambda rank: items(rank, "mean"))
    assert "average/mean of rank 1 is not the same as rank 0's" in said


@pytest.mark.parametrize("drift", [1e-5, 1e-2, torch.nan])
def test_replicas_under_ddp_may_drift_and_are_not_mixed(tmp_path, drift):
    def items(rank):
        torch.manual_seed(0)
        net = torch.nn.Linear(300, 200)
        net.weight.data *= 1 + drift if rank else 1
        return {"model": DistributedDataParallel(net, init_sync=False)}

    said = refusal(tmp_path, items)
    if drift < 1e-3:
        assert said == ""
    else:
        assert "model/weight of rank 1 is not the same as rank 0's, though it is under Distributed" in said
        assert "what no rank ever had" in said


def test_counts_of_an_optimizer_and_learning_rates_do_not_drift(tmp_path):
    def items(rank, steps=0, rate=0.0):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        model = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1))
        net(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] += rank * rate
        for state in optimizer.state.values():
            state["step"] += 10_000 + rank * steps
        return {"model": model, "optimizer": optimizer}

    assert refusal(tmp_path / "same", items) == ""
    assert "optimizer/state/bias/step of rank 1" in refusal(
        tmp_path / "steps", lambda rank: items(rank, steps=1)
    )
    said = refusal(tmp_path / "rate", lambda rank: items(rank, rate=0.01))
    assert pytest.RaisesExc(IntegrityError, match=rf"param_groups/.*lr of rank 1 .*{NUMBER}").matches(
        IntegrityError(said)
    )


def test_trained_parameters_are_looked_at_before_frozen_ones(tmp_path):
    """Adapters of a large model that no DDP holds: a few among thousands."""

    def items(rank):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 4) for _ in range(200)]
        for place, layer in enumerate(layers):
            layer.requires_grad_(place == 77)
        torch.manual_seed(rank)
        torch.nn.init.normal_(layers[77].weight)
        return {"model": torch.nn.Sequential(*layers)}

    assert "model/77.weight of rank 1 is not the same" in refusal(tmp_path, items)


def test_replicas_of_ranks_other_than_the_first_are_compared_too(tmp_path):
    def items(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        torch.manual_seed(rank)
        wrapped = DistributedDataParallel(
            torch.nn.Linear(30, 20), process_group=groups[rank // 2], init_sync=False
        )
        if rank == 1:
            torch.manual_seed(0)
            wrapped.module.reset_parameters()
        return {f"stage{rank // 2}": wrapped}

    assert "stage1/bias of rank 3 is not the same as rank 2's" in refusal(tmp_path, items, size=4)


def test_one_rank_looks_at_nothing(monkeypatch):
    state = TrackedState(
        {"state": {"x": torch.ones(3)}, "model": torch.nn.Linear(2, 2)}, rank=0, world_size=1
    )
    monkeypatch.setattr(witnesses, "_elements", lambda *_: pytest.fail("looked at something"))
    assert state.capture({}).witnesses == {}


def test_how_much_is_looked_at_is_bounded():
    chance = random.Random(1)
    for count in (0, 8):
        for _ in range(100):
            shape = [chance.randrange(1, 120) for _ in range(chance.randrange(4))]
            tensor = torch.zeros(shape, dtype=chance.choice([torch.bool, torch.float16, torch.complex128]))
            if chance.random() < 0.5 and len(shape) > 1:
                tensor = tensor.transpose(0, 1)
            found = witnesses._elements(tensor, count)
            assert found.ndim == 1
            assert found.nbytes <= 260 << 10
            assert not count or min(tensor.numel(), 4) <= found.numel() <= count


def test_witnesses_of_an_unfinished_commit_of_an_earlier_version_are_read():
    old = {"w": np.array([1.0, 2.0], "<f8").tobytes().hex()}
    near, far = ({"w": np.array([1.0, x], "<f8").tobytes().hex()} for x in (2.1, 3.0))
    assert witnesses.compare([(0, old), (1, near), (2, far)]) == {"w": (0, (2,))}
    for damaged in ("0.1:zz", "x:00", "0011"):
        with pytest.raises(ValueError, match=r".+"):
            witnesses.checked(damaged)


# ---------------------------------------------------------------- real ranks


class Experts(torch.nn.Module):
    """A trunk that all ranks share, and an expert that each has for itself."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(200, 150)
        self.experts = torch.nn.Linear(150, 120)

    def forward(self, x):
        return self.experts(self.trunk(x).tanh())


def train_differently(rank, size, folder, how):
    """Train and save on real ranks; returns what the commit says and how the tensors are spread."""
    torch.manual_seed(0)  # the experts begin alike, too
    net = Experts()
    if how == "frozen":
        net.experts.requires_grad_(False)
    if how == "experts":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            net, ["experts.weight", "experts.bias"]
        )
    model = DistributedDataParallel(net)
    net.experts.requires_grad_()
    if how == "local":
        alone = [dist.new_group([each]) for each in range(size)][rank]
        model.register_comm_hook(PostLocalSGDState(None, alone, 0), post_localSGD_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(1 + rank)
    for _ in range(5):
        model(torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run = RunDirectory(folder)
    state = TrackedState({"model": model, "optimizer": optimizer}, rank=rank, world_size=size)
    camera, staging = Camera(threads=1), writer(run, 1, rank)
    staging.write(header(run, size), camera.take(state.capture({}), stage=False))
    dist.barrier()
    said = ""
    if rank == 0:
        try:
            staging.commit(1)
            said = {name: record.layout.ranks for name, record in store.find(run, 1)[1].tensors.items()}
        except IntegrityError as error:
            said = str(error)
    dist.barrier()
    camera.close()
    staging.close()
    return said, {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("how", ["all", "experts", "local", "frozen"])
def test_what_ddp_does_not_keep_equal_is_refused(tmp_path, how):
    make_run(tmp_path)
    (said, one), (_, other) = run_ranks(train_differently, 2, tmp_path, how)
    differing = {name for name in one if not same_bits(one[name], other[name])}
    everything = {f"{part}.{kind}" for part in ("trunk", "experts") for kind in ("weight", "bias")}
    if how == "all":
        assert differing == set()
        assert said == {f"model/{name}": (0, 1) for name in everything}
    elif how == "local":
        assert differing == everything
        assert (
            "model/experts.bias of rank 1 is not the same as rank 0's (one of 4 such tensors), though" in said
        )
        assert "local SGD" in said
    else:
        assert {"experts.weight", "experts.bias"} <= differing
        assert "model/experts." in said
        assert ("only rank 0's would be stored" if how == "experts" else "frozen when it was wrapped") in said


def test_parameters_that_ddp_leaves_alone_and_ranks_have_alike_are_rank_zeros(tmp_path):
    def items(rank):
        torch.manual_seed(0)
        net = Experts()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["experts.weight"])
        return {"model": DistributedDataParallel(net)}

    _, manifest = save_as(make_run(tmp_path), 2, items)
    found = {name: record.layout.ranks for name, record in manifest.tensors.items()}
    assert {name for name, ranks in found.items() if ranks == (0,)} == {"model/experts.weight"}


def train_counting(kind):
    """Count tokens on each rank, as a tensor or as a number."""
    with hr.Run() as run:
        net = DistributedDataParallel(torch.nn.Linear(16, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        data = run.loader(Samples(), global_batch=12)
        state = {"tokens": kind(0)}
        run.track(model=net, optimizer=optimizer, data=data, state=state)
        for _, (_, x, y) in run.steps(data, until=3):
            (net(x).squeeze(-1) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            state["tokens"] += 1000 + run.rank


def test_a_run_says_why_it_is_not_saved(tmp_path):
    attempt = Attempt(tmp_path / "tensor", 2, train_counting, torch.tensor)
    assert 0 not in attempt.wait()
    assert "state/tokens of rank 1 is not the same as rank 0's" in attempt.log.read_text()
    assert RunDirectory(tmp_path / "tensor").checkpoint_names() == []
    attempt = Attempt(tmp_path / "number", 2, train_counting, int)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
