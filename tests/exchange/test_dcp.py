"""``torch.distributed.checkpoint`` with this format as its storage, beside its own storage: real ranks, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.exchange import dcpwriter
from hpc_resume.rundir import RunDirectory
from tests.commits import commit_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Net(torch.nn.Module):
    """257 rows: uneven on any number of ranks; a bf16 weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(33, 257)
        self.norm = torch.nn.BatchNorm1d(257)
        self.down = torch.nn.Linear(257, 3, bias=False)

    def forward(self, x):
        return self.down(self.norm(self.up(x))).sum()


def build(kind, size, seed):
    torch.manual_seed(seed)
    net = Net()
    if kind == "ddp":
        net = DistributedDataParallel(net)
    elif kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01 * seed)
    torch.manual_seed(seed + 10)
    net(torch.randn(8, 33)).backward()
    optimizer.step()
    return net, optimizer


def state_of(net, optimizer, rest):
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
        "train": rest,
    }


def rest(size, seed):
    """What trainers add: numbers, strings, a tensor on a 2-d mesh, one without elements, a tuple with one in it."""
    mesh = init_device_mesh("cpu", (size,))
    column = distribute_tensor(torch.arange(30.0).view(3, 10) * seed, mesh, [Shard(1)])
    return {
        "step": 12 * seed,
        "lr": 0.1 * seed,
        "name": f"run {seed}",
        "column": column,
        "scalar": torch.tensor(2.5 * seed),
        "none": torch.zeros(0, 4),
        "pair": (seed, torch.arange(4) * seed),
        "list": [torch.ones(2) * seed, {"deep": torch.ones(1, dtype=torch.bfloat16) * seed}],
        "low": torch.full((70,), 1.5 * seed).to(torch.float8_e4m3fn),
    }


def plain(value):
    """A state with whole tensors, to be compared."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, torch.Tensor):
        eight_bits = value.is_floating_point() and value.itemsize == 1  # no pipe takes them
        return value.view(torch.uint8).clone() if eight_bits else value.clone()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{path}.{number}")
    else:
        assert a == b, path


def save(rank, size, folder, kind):
    net, optimizer = build(kind, size, 1)
    state = state_of(net, optimizer, rest(size, 1))
    first = plain(state)
    dcp.save(state, checkpoint_id=f"{folder}/theirs")
    writer = hr.DcpWriter(f"{folder}/ours", step=40)
    dcp.save(state, storage_writer=writer)
    net(torch.ones(8, 33)).backward()
    optimizer.step()
    later = state_of(net, optimizer, rest(size, 3))
    expected = plain(later)
    future = dcp.async_save(later, storage_writer=writer)
    with torch.no_grad():  # training goes on; no collectives meanwhile, which are the saving thread's
        for parameter in net.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).zero_()
    future.result()
    return first, expected, writer.committed


def load(rank, size, folder, kind):
    found = []
    for reader in (
        dcp.FileSystemReader(f"{folder}/theirs"),
        hr.DcpReader(f"{folder}/ours", step=40),
        hr.DcpReader(f"{folder}/ours"),
    ):
        net, optimizer = build(kind, size, 2)
        state = state_of(net, optimizer, rest(size, 2))
        dcp.load(state, storage_reader=reader)
        found.append(plain(state))
    return found


@pytest.mark.parametrize(
    ("kind", "others"), [("fsdp", [("fsdp", 3), ("plain", 1)]), ("ddp", [("ddp", 3), ("fsdp", 1)])]
)
def test_what_dcp_loads_from_this_format_is_what_it_loads_from_its_own(tmp_path, kind, others):
    saved = run_ranks(save, 2, str(tmp_path), kind)
    assert verify_run(tmp_path / "ours") == []
    run = RunDirectory(tmp_path / "ours")
    assert [name[:10] for name in run.checkpoint_names()] == ["0000000040", "0000000041"]
    assert saved[0][2] == run.checkpoint_names()[1]
    for other, size in others:
        for theirs, ours, newest in run_ranks(load, size, str(tmp_path), other):
            same(theirs, ours)
            same(ours["model"], saved[0][0]["model"])
            same(newest, saved[0][1])
    with hr.Checkpoint(tmp_path / "ours", step=40) as ckpt:
        assert torch.equal(ckpt["model/up.weight"], saved[0][0]["model"]["up.weight"])
        train = ckpt.state("train")
        same(plain(train), saved[0][0]["train"])
        net = Net()
        assert ckpt.load_into(net).missing == ()
        assert torch.equal(net.norm.running_mean, saved[0][0]["model"]["norm.running_mean"])


def failing(rank, size, folder):
    """Rank 1's disk is full, then it is not."""
    writer = hr.DcpWriter(folder)
    state = {"a": distribute_tensor(torch.arange(64.0), init_device_mesh("cpu", (size,)), [Shard(0)])}
    real = dcpwriter.ShardWriter.write

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if rank == 1:
        dcpwriter.ShardWriter.write = full
    with pytest.raises(dcp.api.CheckpointException, match="No space left"):
        dcp.save(state, storage_writer=writer)
    names = RunDirectory(Path(folder)).checkpoint_names()
    dist.barrier()
    dcpwriter.ShardWriter.write = real
    dcp.save(state, storage_writer=writer)
    return names


def test_a_save_that_fails_on_one_rank_commits_nothing(tmp_path):
    assert run_ranks(failing, 2, str(tmp_path / "run")) == [[], []]
    assert len(RunDirectory(tmp_path / "run").checkpoint_names()) == 1
    assert verify_run(tmp_path / "run") == []


def test_the_step_stands_in_the_folders_name_or_is_counted(tmp_path):
    state = {"a": torch.arange(3)}
    writer = hr.DcpWriter(tmp_path / "other")
    dcp.save(state, checkpoint_id=tmp_path / "step-120", storage_writer=writer)
    for _ in range(2):
        dcp.save(state, checkpoint_id=tmp_path / "last-7", storage_writer=hr.DcpWriter(tmp_path))
    steps = {path.parent.parent.name: [] for path in tmp_path.glob("*/checkpoints/*")}
    for path in sorted(tmp_path.glob("*/checkpoints/*")):
        steps[path.parent.parent.name].append(int(path.name[:10]))
    assert steps == {"step-120": [120], "last-7": [0, 1]}
    assert len(RunDirectory(tmp_path / "last-7").attempt_numbers()) == 1


def test_what_only_running_code_could_load_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(
        dcp.api.CheckpointException, match=r"StateError: train.path: can't be loaded without running code"
    ):
        dcp.save({"train": {"path": Path("/x")}}, storage_writer=hr.DcpWriter(tmp_path / "run"))
    assert RunDirectory(tmp_path / "run").checkpoint_names() == []


def test_a_run_of_ours_is_no_place_for_it(tmp_path):
    RunDirectory(tmp_path).create("x")
    (tmp_path / "attempts/0001").mkdir()
    (tmp_path / "attempts/0001/attempt.json").write_text("{}")
    with pytest.raises(dcp.api.CheckpointException, match=r"is the folder of a run of hr\.Run"):
        dcp.save({"a": torch.ones(1)}, storage_writer=hr.DcpWriter(tmp_path))


def test_a_second_owner_fences_the_first(tmp_path):
    writer = hr.DcpWriter(tmp_path)
    dcp.save({"a": torch.ones(1)}, storage_writer=writer)
    commit_state(tmp_path, 9, a={"a": torch.ones(1)})
    with pytest.raises(dcp.api.CheckpointException, match="another process has begun to write there"):
        dcp.save({"a": torch.ones(1)}, storage_writer=writer)


def test_cached_plans_are_refused_by_name(tmp_path):
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    with pytest.raises(dcp.api.CheckpointException, match="enable_plan_caching=False"):
        dcp.save({"a": torch.ones(1)}, storage_writer=hr.DcpWriter(tmp_path), planner=planner)


def test_dcp_reads_what_a_run_has_saved_and_its_damage_shows(tmp_path):
    torch.manual_seed(3)
    net, optimizer = build("plain", 1, 1)
    tied = torch.nn.ModuleDict({"a": net, "b": net.up})
    folder = commit_state(
        tmp_path, model=tied, optimizer=torch.optim.SGD(tied.parameters(), lr=0.5), extra={"best": 2}
    )
    other = torch.nn.ModuleDict({"a": Net(), "b": torch.nn.Linear(33, 257)})
    state = {"model": other.state_dict(), "extra": {"best": 0}}
    dcp.load(state, storage_reader=hr.DcpReader(tmp_path))
    assert state["extra"] == {"best": 2}
    assert torch.equal(other["b"].weight, net.up.weight)
    assert torch.equal(other["a"].up.weight, net.up.weight)
    path = folder / "rank-00000-of-00001.h5"
    data = bytearray(path.read_bytes())
    data[data.index(net.up.weight.detach().numpy().tobytes()[:64])] ^= 1
    path.write_bytes(data)
    with pytest.raises(dcp.api.CheckpointException, match="are not what was written"):
        dcp.load(state, storage_reader=hr.DcpReader(tmp_path))
    assert optimizer is not None


def resume(rank, size, folder):
    """A run of ours goes on from what DCP has saved, on as many ranks: there are no generators in it."""
    with hr.Run(folder) as run:
        net, optimizer = torch.nn.Linear(4, 4), None
        net = DistributedDataParallel(net) if size > 1 else net
        optimizer = torch.optim.AdamW(net.parameters())
        run.track(model=net, optimizer=optimizer)
        done = run.step
        for _, batch in run.steps([torch.ones(2, 4)] * 20, until=12):
            net(batch).sum().backward()
            optimizer.step()
        return done, run.step


def test_a_run_goes_on_from_what_dcp_has_saved(tmp_path, monkeypatch):
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    dcp.save(
        {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)},
        storage_writer=hr.DcpWriter(tmp_path, step=10),
    )
    assert resume(0, 1, tmp_path) == (10, 12)
