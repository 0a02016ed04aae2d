"""Checkpoints of every released schema stay readable for ever, by us and by the reader in docs/format.md."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.rundir import RunDirectory
from tests.golden.make import CHANGED, FULL, make, state

FOLDER = Path(__file__).parent
FORMAT = Path(__file__).parents[2] / "docs" / "format.md"
ARCHIVES = sorted(FOLDER.glob("schema-*.zip"))


@pytest.fixture(params=[*ARCHIVES, None], ids=lambda path: path.stem if path else "of-today")
def run(request, tmp_path):
    """The run of an archive, and one that is written now."""
    if request.param is None:
        make(tmp_path / "run")
    else:
        with zipfile.ZipFile(request.param) as packed:
            packed.extractall(tmp_path)
    return RunDirectory(tmp_path / "run")


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert all(same(a[key], b[key]) for key in a)
    elif isinstance(a, list | tuple) and not isinstance(a, torch.Size):
        assert len(a) == len(b)
        assert all(map(same, a, b))
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (
            a.contiguous().reshape(-1).view(torch.uint8).tolist() == b.reshape(-1).view(torch.uint8).tolist()
        )
    else:
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    return True


def test_archives_are_small_and_there_is_one_of_the_present_schema():
    assert [path.name for path in ARCHIVES] == ["schema-2.zip"]
    assert all(path.stat().st_size < 50_000 for path in ARCHIVES)


def test_it_verifies_clean(run):
    assert verify_run(run.root) == []


@pytest.mark.parametrize("step", [FULL, CHANGED])
def test_it_restores_to_what_was_saved(run, step):
    name, manifest = store.find(run, step)
    assert len(manifest.refers) == (step == CHANGED)
    found = {"tensors": {}, "objects": {}}
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        TrackedState(found, rank=0, world_size=1).restore(reader)
    assert same(state(step), found)
    assert found["tensors"]["tied"][0] is found["tensors"]["tied"][1]


def plain_reader():
    """Run the reader that the page shows; it knows nothing of hpc_resume."""
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT.read_text(), re.DOTALL)
    assert "hpc_resume" not in code
    assert len(code.splitlines()) <= 36
    names = {"__name__": "reader"}
    exec(compile(code, FORMAT.name, "exec"), names)
    return names["read_tensor"]


@pytest.mark.parametrize("step", [FULL, CHANGED])
def test_the_reader_in_the_page_reads_it(run, step):
    read_tensor = plain_reader()
    name, manifest = store.find(run, step)
    folder = run.checkpoints / name
    tensors = state(step)["tensors"]
    assert read_tensor(folder, "tensors/matrix").tolist() == tensors["matrix"].tolist()
    assert read_tensor(folder, "tensors/columns/inside").tolist() == tensors["columns"]["inside"].tolist()
    assert read_tensor(folder, "tensors/scalar") == step
    assert read_tensor(folder, "tensors/slash%2Fand%25").tolist() == [True, True, True]
    for name in ("bfloat16", "int64", "complex64"):
        shown = read_tensor(folder, f"tensors/{name}")
        expected = tensors[name].view(torch.int16).numpy() if name == "bfloat16" else tensors[name].numpy()
        assert shown.tolist() == expected.tolist()
    assert set(manifest.tensors) >= {"objects/array", "tensors/float8/0"}


def test_the_page_tells_the_numbers_of_today():
    from hpc_resume.checkpoint import blocks, image, index, layout, manifest, objects

    page = FORMAT.read_text()
    for number in (
        f"schema {manifest.SCHEMA}",
        f"{blocks.BLOCK_BYTES // 1024} KiB",
        f"{blocks.TABLE_BLOCK_BYTES // 1024} KiB",
        f"{blocks._TABLE_ROWS:,} rows",
        f"{blocks._TABLE_ROW_BYTES:,} bytes",
        f"{blocks.SEGMENT_BYTES // 2**20} MiB",
        f"{blocks.SINGLE_BLOCK_BYTES // 1024} KiB",
        ", ".join(map(str, blocks._ROW_CUTS)),
        f"{blocks._SHORTEST_CUT_BYTES // 1024} KiB",
        f"{image.PACKED_BELOW_BYTES:,} bytes",
        f"{layout.WHOLE_BELOW_BYTES // 1024} KiB",
        f"{manifest.MAX_BYTES // 2**20} MiB",
        f"{index.LONGEST_BYTES // 2**20} MiB",
        f"{index.MAX_FILES} files",
        f"{objects.MAX_DEPTH} deep",
        *(
            f"`{tag}`"
            for tag in (*objects.TENSOR_TAGS, objects.SAME_TAG, objects.TENSORS_TAG, *objects._DECODERS)
        ),
        *(
            f"`{field}`"
            for field in (
                "run_id",
                "refers",
                "differing_ranks",
                "missing_ranks",
                "layouts",
                "kinds",
                "digest",
                "rest",
            )
        ),
    ):
        assert number in page, number
