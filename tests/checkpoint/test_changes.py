"""Saves that write only what has changed, and steady saves that lay nothing out."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.changes import Base, Changes
from hpc_resume.checkpoint.image import Piece, full_image
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.shard import ShardWriter
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from tests.checkpoint.fakes import CARELESS, header, make_run, same_bits, writer
from tests.checkpoint.shapes import quick

SHAPES = [(3,), (900, 100), (64, 64), (2, 100_000), ()]


@pytest.fixture(scope="module")
def shards():
    writer = ShardWriter(threads=2, fs=CARELESS)
    yield writer
    writer.close()


@quick
@given(data=st.data(), saves=st.integers(1, 4))
def test_runs_of_a_chain_of_saves_hold_what_is_there(shards, data, saves):
    pieces = tuple(Piece(f"t{i}", "float32", s, Box.whole(s)) for i, s in enumerate(SHAPES))
    cuts = tuple(piece.cut for piece in pieces)
    state = [np.full(piece.length, i, np.uint8) for i, piece in enumerate(pieces)]
    image = full_image(pieces)
    files = {("0000000000-00000000", "rank-00000-of-00001.h5"): laid_out(image, state)}
    base = Base(
        checkpoint="0000000000-00000000",
        file="rank-00000-of-00001.h5",
        pieces=pieces,
        image=image,
        checksums=all_checksums(state, cuts),
    )
    for save in range(1, saves + 1):
        for _ in range(data.draw(st.integers(0, 4))):
            piece = data.draw(st.integers(0, len(state) - 1))
            state[piece][data.draw(st.integers(0, len(state[piece]) - 1)) :][:5] += 1
        changes = Changes.since(base, shards, state, cuts)
        assert changes.checksums == all_checksums(state, cuts)
        image, own = changes.shard(state, cuts)
        assert sum(map(len, own)) == changes.changed_bytes <= changes.total_bytes == sum(map(len, state))
        name = f"{save:010d}-00000000", "rank-00000-of-00001.h5"
        files[name] = laid_out(image, own)
        for entry, content in zip(image.entries, state, strict=True):
            assert sum(run.length for run in entry.runs) == entry.length
            found = [
                files[name if run.file == 0 else image.files[run.file - 1]][
                    run.offset : run.offset + run.length
                ]
                for run in entry.runs
            ]
            assert np.array_equal(np.concatenate(found), content)
        base = Base(checkpoint=name[0], file=name[1], pieces=pieces, image=image, checksums=changes.checksums)
        assert base.refers <= {checkpoint for checkpoint, _ in files}


def all_checksums(arrays, cuts):
    return b"".join(
        xxhash.xxh3_64_intdigest(array[low:high].tobytes()).to_bytes(8, "little")
        for array, cut in zip(arrays, cuts, strict=True)
        for edges in cut
        for low, high in pairwise(edges)
    )


def laid_out(image, arrays):
    """The file's bytes, as far as they are the tensors'."""
    file = np.zeros(image.size_bytes, np.uint8)
    joined = np.concatenate([*arrays, np.zeros(0, np.uint8)])
    position = 0
    for offset, length in image.data:
        file[offset : offset + length] = joined[position : position + length]
        position += length
    return file


@pytest.mark.parametrize("stage", [True, False])
def test_a_steady_save_never_calls_hdf5(tmp_path, stage, monkeypatch):
    run = make_run(tmp_path)
    net = torch.nn.Linear(300, 200)
    state = TrackedState({"net": net}, rank=0, world_size=1)
    camera, staging = Camera(threads=1), writer(run, 1, 0)
    for step in range(1, 4):
        with torch.no_grad():
            net.weight += step
        private = {"rng": torch.full((9,), step, dtype=torch.uint8)}
        staging.write(header(run, 1, step), camera.take(state.capture(private), stage=stage))
        staging.committed(step, staging.commit(step))
        for module in [name for name in sys.modules if name.split(".")[0] == "h5py"]:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails from now on
    with pytest.raises(ImportError):
        full_image([])
    staging.close()
    camera.close()
    monkeypatch.undo()
    assert verify_run(tmp_path) == []
    name, manifest = store.find(run)
    fresh = torch.nn.Linear(300, 200)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        TrackedState({"net": fresh}, rank=0, world_size=1).restore(reader)
    assert same_bits(fresh.weight, net.weight)


def test_incremental_saves_restore_on_other_ranks(tmp_path):
    run = make_run(tmp_path)
    net = torch.nn.Linear(900, 500)
    state = TrackedState({"net": net}, rank=0, world_size=1)
    camera, staging = Camera(threads=1), writer(run, 1, 0, longest_chain=4)
    written = []
    for step in range(1, 4):
        with torch.no_grad():
            net.weight[step * 100] += step
        receipt = staging.write(header(run, 1, step), camera.take(state.capture({}), stage=True))
        staging.committed(step, staging.commit(step))
        written.append(receipt.written_bytes)
    staging.close()
    camera.close()
    assert max(written[1:]) < written[0] / 5
    name, manifest = store.find(run)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        for low, high in ((0, 250), (199, 302), (499, 500)):
            out = torch.empty(high - low, 900)
            reader.read("net/weight", Box((low, 0), (high - low, 900)), out)
            assert same_bits(out, net.weight[low:high])
        columns = torch.empty(500, 7)
        reader.read("net/weight", Box((0, 893), (500, 7)), columns)
        assert same_bits(columns, net.weight[:, 893:])
