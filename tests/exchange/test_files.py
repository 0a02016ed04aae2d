"""Export and import: what goes out is what others read, what comes in is what they wrote."""

import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.cli import main
from hpc_resume.exchange import torchfile
from hpc_resume.exchange.exporting import export_checkpoint
from hpc_resume.exchange.importing import import_checkpoint
from tests.commits import commit_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def of_type(dtype):
    """Every byte counts, odd shape."""
    count = 35 * dtype.itemsize
    raw = (torch.arange(count) % 2 if dtype == torch.bool else torch.arange(count) * 7 % 251).to(torch.uint8)
    return raw.view(dtype).view(5, 7)


def same_bytes(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(*flat)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.up = torch.nn.Linear(8, 257)
        self.head = torch.nn.Linear(8, 300, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net.head(net.embed(torch.arange(9))).sum().backward()
    optimizer.step()
    types = {name_of(dtype): of_type(dtype) for dtype in TYPES}
    odd = {"scalar": torch.tensor(1.5), "none": torch.zeros(0, 3)}
    extra = {
        "best": float("inf"),
        "when": (1, 2),
        "np": np.arange(5),
        "number": np.float32(2.5),
        3: [None, torch.ones(2)],
    }
    root = tmp_path_factory.mktemp("saved") / "run"
    commit_state(root, model=net, optimizer=optimizer, types=types, odd=odd, extra=extra)
    return root, net, optimizer


def tensors_of(root):
    with hr.Checkpoint(root) as ckpt:
        return ckpt.load(), ckpt.keys, ckpt.state("extra") if "extra" in ckpt.keys else None


@pytest.mark.parametrize("target", ["all.safetensors", "all.pt", "all"])
def test_out_and_in_again_is_the_same_checkpoint(saved, tmp_path, target):
    root = saved[0]
    export_checkpoint(root, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == [target]
    import_checkpoint(tmp_path / target, tmp_path / "back", step=7)
    assert verify_run(tmp_path / "back") == []
    before, keys, extra = tensors_of(root)
    after, keys_back, extra_back = tensors_of(tmp_path / "back")
    assert set(keys_back) == set(keys)
    assert before.keys() == after.keys() or after.keys() - before.keys() == set()
    assert all(same_bytes(tensor, after[name]) for name, tensor in before.items())
    assert extra_back["best"] == extra["best"]
    assert list(extra_back["when"]) == [1, 2]
    assert extra_back["number"] == 2.5
    if target != "all":  # DCP has no ties
        assert after["model/head.weight"] is after["model/embed.weight"]
    other = Net()
    with hr.Checkpoint(tmp_path / "back") as ckpt:
        ckpt.load_into(other)
    assert torch.equal(other.head.weight, saved[1].embed.weight)


def test_safetensors_of_a_model_is_what_the_package_reads(saved, tmp_path):
    root, net, _ = saved
    path = tmp_path / "model.safetensors"
    assert export_checkpoint(root, path, key="model") == 4
    read = safetensors.torch.load_file(path)
    assert read.keys() == {"embed.weight", "up.weight", "up.bias"}
    other = Net()
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert torch.equal(other.head.weight, net.head.weight)
    import_checkpoint(path, tmp_path / "run")
    with hr.Checkpoint(tmp_path / "run") as ckpt:
        assert ckpt.names("*head*") == []
        tied = Net()
        assert ckpt.load_into(tied).missing == ()
        assert torch.equal(tied.head.weight, net.head.weight)


def test_safetensors_of_every_type_and_another_type(saved, tmp_path):
    export_checkpoint(saved[0], tmp_path / "t.safetensors", key="types")
    read = safetensors.torch.load_file(tmp_path / "t.safetensors")
    for dtype in TYPES:
        assert same_bytes(read[name_of(dtype)], of_type(dtype)), dtype
    export_checkpoint(saved[0], tmp_path / "b.safetensors", names="model/up*", dtype="bfloat16")
    read = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert read.keys() == {"model/up.weight", "model/up.bias"}
    assert torch.equal(read["model/up.weight"], saved[1].up.weight.bfloat16())


@pytest.mark.parametrize("mmap", [True, False])
def test_a_torch_file_is_what_torch_reads(saved, tmp_path, mmap):
    root, net, optimizer = saved
    path = tmp_path / "all.pt"
    export_checkpoint(root, path)
    assert zipfile.ZipFile(path).testzip() is None
    read = torch.load(path, weights_only=True, mmap=mmap)
    assert read["model"]["head.weight"].data_ptr() == read["model"]["embed.weight"].data_ptr()
    assert all(read["types"][name_of(dtype)].data_ptr() % 64 == 0 for dtype in TYPES) or not mmap
    assert all(same_bytes(read["types"][name_of(dtype)], of_type(dtype)) for dtype in TYPES)
    assert (read["odd"]["scalar"].item(), read["odd"]["none"].shape) == (1.5, (0, 3))
    assert read["extra"]["np"].tolist() == [0, 1, 2, 3, 4]
    assert read["extra"][3][1].tolist() == [1, 1]
    Net().load_state_dict(read["model"])
    assert torch.equal(
        read["optimizer"]["state"]["embed.weight"]["exp_avg"], optimizer.state[net.embed.weight]["exp_avg"]
    )


def test_a_state_dict_alone_as_a_torch_file(saved, tmp_path):
    root, net, _ = saved
    export_checkpoint(root, tmp_path / "m.pt", key="model", dtype="float16")
    other = Net().half()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(other.up.weight, net.up.weight.half())


def test_a_dcp_folder_is_what_dcp_reads(saved, tmp_path):
    root, net, _ = saved
    export_checkpoint(root, tmp_path / "dcp")
    other = Net()
    state = {"model": other.state_dict(), "extra": {"best": 0.0, "when": None}}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert torch.equal(other.up.weight, net.up.weight)
    assert (state["extra"]["best"], state["extra"]["when"]) == (float("inf"), (1, 2))


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    types=st.lists(st.sampled_from(TYPES), min_size=6, max_size=6),
)
def test_torch_files_of_any_shapes(tmp_path_factory, shapes, types):
    path = tmp_path_factory.mktemp("any") / "x.pt"
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=False)]
    torchfile.write(path, {"list": tensors, "tied": (tensors[0], tensors[-1])})
    read = torch.load(path, weights_only=True)
    assert all(same_bytes(one, other) for one, other in zip(tensors, read["list"], strict=True))
    assert read["tied"][0].data_ptr() == read["list"][0].data_ptr()


def test_in_from_a_plain_torch_file(tmp_path):
    net = Net()
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    torch.save(net.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("plain.pt", "old.pth"):
        import_checkpoint(tmp_path / name, tmp_path / f"run-{name}")
        with hr.Checkpoint(tmp_path / f"run-{name}") as ckpt:
            assert (ckpt.keys, ckpt.step, ckpt.manifest.reason) == (("model",), 0, "import")
            assert ckpt.stored_as("model/head.weight") == "model/embed.weight"
            assert isinstance(ckpt.state("model"), OrderedDict)


def test_in_from_several_safetensors(tmp_path):
    (tmp_path / "hf").mkdir()
    for number in range(2):
        safetensors.torch.save_file(
            {f"layer{number}.w": torch.full((3,), number)}, tmp_path / f"hf/model-{number}.safetensors"
        )
    import_checkpoint(tmp_path / "hf", tmp_path / "run", key="net", name="theirs")
    with hr.Checkpoint(tmp_path / "run") as ckpt:
        assert ckpt.names() == ["net/layer0.w", "net/layer1.w"]
        assert ckpt["net/layer1.w"].tolist() == [1, 1, 1]
    safetensors.torch.save_file({"layer0.w": torch.zeros(1)}, tmp_path / "hf/more.safetensors")
    with pytest.raises(hr.UsageError, match="stands in another one"):
        import_checkpoint(tmp_path / "hf", tmp_path / "other")


def test_a_run_goes_on_from_an_import(saved, tmp_path):
    export_checkpoint(saved[0], tmp_path / "x.safetensors", names="[mo][op][dt]*")
    import_checkpoint(tmp_path / "x.safetensors", tmp_path / "run", step=5)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    with hr.Run(tmp_path / "run") as run:
        run.track(model=net, optimizer=optimizer)
        assert run.step == 5
        assert torch.equal(net.up.weight, saved[1].up.weight)
        assert torch.equal(
            optimizer.state[net.embed.weight]["exp_avg"], saved[2].state[saved[1].embed.weight]["exp_avg"]
        )
        for _ in run.steps([1, 2], until=6):
            pass


class Unstorable:
    pass


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: torch.save({"a": Unstorable()}, path), hr.StateError, "can't be loaded without running code.*Unstorable"),
        (lambda path: torch.save([torch.ones(2)], path), hr.UsageError, "holds a list.*--key"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and then nothing"), hr.IntegrityError, "no sound file"),
        (lambda path: path.write_bytes(b""), hr.IntegrityError, "no sound file|without running code"),
        (lambda path: torch.save({1: {"a": torch.ones(2)}}, path), hr.UsageError, "tracked keys are strings"),
        (lambda path: torch.save({"a": {"b": torch.ones(2).to_sparse()}}, path), hr.StateError, "a/b: a tensor of layout"),
    ],
    ids=["object", "list", "torn", "empty", "keys", "sparse"],
)  # fmt: skip
def test_what_cannot_come_in_leaves_nothing_behind(tmp_path, make, error, message):
    make(tmp_path / "x.pt")
    with pytest.raises(error, match=message):
        import_checkpoint(tmp_path / "x.pt", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_tensor_that_fails_on_its_way_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    export_checkpoint(saved[0], tmp_path / "x.safetensors")
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    (tmp_path / "x.safetensors").write_bytes(data[:-5])
    with pytest.raises(hr.IntegrityError, match="no sound safetensors file"):
        import_checkpoint(tmp_path / "x.safetensors", tmp_path / "run")
    monkeypatch.setattr(
        hr.Checkpoint, "load_names", lambda *_, **__: (_ for _ in ()).throw(hr.IntegrityError("bad"))
    )
    for target in ("y.safetensors", "y.pt"):
        with pytest.raises(hr.IntegrityError, match="bad"):
            export_checkpoint(saved[0], tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_line(saved, tmp_path):
    shown = call("export", saved[0], "--to", tmp_path / "m.pt", "--names", "model/*", "--dtype", "bfloat16")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, f"{tmp_path / 'm.pt'}\n", "4 tensors\n")
    shown = call("import", tmp_path / "m.pt", "--into", tmp_path / "runs/m", "--step", 3)
    assert shown.exit_code == 0
    assert Path(shown.stdout.strip()).name.startswith("0000000003-")
    shown = call("show", tmp_path / "runs/m")
    assert (shown.exit_code, "model/up.weight" in shown.stdout) == (0, True)
    assert call("verify", tmp_path / "runs/m").exit_code == 0
    assert "waiting" in call("status", tmp_path / "runs/m").stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("export", "RUN", "--to", "DIR/there.pt"), 2, "is there already"),
        (("export", "RUN", "--to", "DIR/x.onnx"), 2, "what shall that be?"),
        (("export", "RUN", "--to", "DIR/no/x.pt"), 2, "mkdir -p"),
        (("export", "RUN", "--to", "DIR/x.pt", "--dtype", "bfloat61"), 2, "did you mean bfloat16"),
        (("export", "RUN", "--to", "DIR/x.pt", "--names", "nix*"), 2, "no tensor that fits 'nix*'"),
        (("export", "RUN", "--to", "DIR/x.pt", "--key", "modl"), 2, "there are: model, optimizer"),
        (("export", "RUN", "--to", "DIR/x.pt", "--step", "8"), 3, "no checkpoint of step 8; there are: 7"),
        (("export", "DIR/nix", "--to", "DIR/x.pt"), 3, "neither a run's folder"),
        (("import", "DIR/there.pt", "--into", "RUN"), 2, "an import makes a new folder"),
        (("import", "DIR/nix", "--into", "DIR/r"), 3, "no such file"),
        (("import", "DIR", "--into", "DIR/r"), 3, "holds neither"),
        (("import", "DIR/there.pt", "--into", "DIR/r", "--step", "-1"), 2, "counted from 0"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message_and_writes_nothing(saved, tmp_path, words, code, message):
    torch.save({"a": torch.ones(1)}, tmp_path / "there.pt")
    filled = [word.replace("RUN", str(saved[0])).replace("DIR", str(tmp_path)) for word in words]
    shown = call(*filled)
    assert (shown.exit_code, shown.stdout) == (code, "")
    assert message in shown.stderr
    assert "Traceback" not in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]


def test_without_the_package_the_extra_is_named(saved, tmp_path, monkeypatch):
    export_checkpoint(saved[0], tmp_path / "x.safetensors", key="model")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    shown = call("import", tmp_path / "x.safetensors", "--into", tmp_path / "r")
    assert (shown.exit_code, "pip install 'hpc_resume[exchange]'" in shown.stderr) == (2, True)


def test_what_safetensors_cannot_hold_is_named(tmp_path):
    commit_state(tmp_path / "run", model={"wide": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(hr.StateError, match=r"model/wide \(complex128\)"):
        export_checkpoint(tmp_path / "run", tmp_path / "x.safetensors")
