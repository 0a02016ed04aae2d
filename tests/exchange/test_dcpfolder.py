"""Hostile and damaged ``.metadata``: one clear error, nothing run, nothing left changed."""

import contextlib
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

import hpc_resume as hr
from hpc_resume.exchange import dcpfolder
from hpc_resume.exchange.importing import import_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    dcp.save({"model": {"a": torch.arange(12.0).view(3, 4)}, "lr": 0.5}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def rewrite(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/hpc-resume-was-run",)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Runs(), "posix.system"),
        (subprocess.Popen, "subprocess.Popen"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
        (dcp.FileSystemReader, "torch.distributed.checkpoint.filesystem.FileSystemReader"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_than_dcps_own_records_is_refused_by_name(folder, tmp_path, value, named):
    rewrite(folder, lambda metadata: setattr(metadata, "planner_data", {"x": value}))
    with pytest.raises(hr.IntegrityError, match=f"refused: it names {named}"):
        import_checkpoint(folder, tmp_path / "run")
    assert not Path("/tmp/hpc-resume-was-run").exists()
    assert not (tmp_path / "run").exists()


def other_file(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../../etc/passwd"


def past_the_end(metadata):
    for info in metadata.storage_data.values():
        info.length = 1 << 40


def negative(metadata):
    for info in metadata.storage_data.values():
        info.offset = -1


def lost_chunk(metadata):
    metadata.state_dict_metadata["model.a"].chunks.clear()


def twice(metadata):
    metadata.state_dict_metadata["model.a"].chunks *= 2


def unstored(metadata):
    del metadata.storage_data[MetadataIndex("model.a", torch.Size([0, 0]))]


def other_shape(metadata):
    metadata.state_dict_metadata["model.a"].size = torch.Size([4, 3])
    metadata.state_dict_metadata["model.a"].chunks[0].sizes = torch.Size([4, 3])


def other_type(metadata):
    metadata.state_dict_metadata["model.a"].properties.dtype = torch.float64


def contradiction(metadata):
    metadata.planner_data["lr"] = ("model", "a", "b")


def long_list(metadata):
    metadata.planner_data["lr"] = ("list", 1 << 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_file, "no file of the folder"),
        (past_the_end, "ends before byte"),
        (negative, "stored at byte -1"),
        (lost_chunk, "do not tile"),
        (twice, "do not tile"),
        (unstored, "stored nowhere"),
        (other_shape, "another tensor is stored there"),
        (other_type, "float64 was announced"),
        (contradiction, "no container|two values"),
        (long_list, "place"),
        (lambda metadata: {"not": "metadata"}, "a dict in place of a Metadata"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_lies_are_one_error(folder, tmp_path, change, message):
    rewrite(folder, change)
    with pytest.raises(hr.IntegrityError, match=message):
        import_checkpoint(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_pickle_sets_on_an_admitted_class_does_not_outlive_it(folder):
    hostile = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x08\x00\x00\x00__init__"
        b"ctorch\nfloat32\ns\x86b."
    )
    (folder / ".metadata").write_bytes(hostile)
    before = vars(dcp.Metadata).copy()
    with pytest.raises(hr.IntegrityError):
        dcpfolder.read(folder)
    assert vars(dcp.Metadata) == before


@pytest.mark.parametrize("step", [1, 7])
def test_damage_at_any_byte_ends_in_our_error_or_none(folder, step):
    path = folder / ".metadata"
    whole = path.read_bytes()
    for at in range(0, len(whole), step):
        cut = whole[:at] if step > 1 else whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :]
        path.write_bytes(cut)
        with contextlib.suppress(hr.IntegrityError, hr.StateError):
            dcpfolder.read(folder)


def test_a_claim_of_many_bytes_takes_no_memory(folder):
    for hostile in (
        b"\x80\x04r\xff\xff\xff\xff.",  # a memo of four thousand million places
        b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"x.",
    ):
        (folder / ".metadata").write_bytes(hostile)
        with pytest.raises(hr.IntegrityError):
            dcpfolder.read(folder)


def test_a_saved_object_that_would_run_code_is_refused_by_name(tmp_path):
    dcp.save({"model": {"a": torch.ones(2)}, "bad": Runs}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(hr.StateError, match=r"bad: .*can't be loaded without running code"):
        import_checkpoint(tmp_path / "dcp", tmp_path / "run")
