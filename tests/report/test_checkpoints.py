import pytest

from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.manifest import Manifest, ShardRecord, shard_file
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.report.checkpoints import describe, find_checkpoint, list_checkpoints
from hpc_resume.report.tables import checkpoint_table, contents_table
from hpc_resume.rundir import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path)
    run.create("gpt")
    return run


def commit(run, step, world_size=2, **differing):
    shards = tuple(
        ShardRecord(
            file=shard_file(rank, world_size),
            rank=rank,
            node="n1",
            size_bytes=500,
            index=(0, 9),
            table=(16, 8),
            digest="0" * 32,
            rest="0" * 16,
        )
        for rank in range(world_size)
    )
    fields = {
        "run_id": "r", "attempt": 1, "step": step, "samples": 8 * step, "reason": "cadence", "content": "full",
        "note": "", "parent": None, "refers": (), "missing_ranks": (), "created": 1.7e9, "world_size": world_size,
        "shards": shards, "structure": Structure({}), "objects": {"model": {}}, "differing_ranks": (),
        "node_type": "pair", "config": None, "environment": {}, "costs": {},
    }  # fmt: skip
    manifest = Manifest(**(fields | differing))
    folder = run.checkpoints / manifest.name
    folder.mkdir()
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest


def test_checkpoints_are_listed_by_step(run):
    for step in (300, 20, 1000):
        commit(run, step)
    found = list_checkpoints(run.root)
    assert [each.step for each in found] == [20, 300, 1000]
    assert (found[0].world_size, found[0].node_type, found[0].size_bytes, found[0].problem) == (
        2,
        "pair",
        1000,
        None,
    )


def test_a_damaged_one_is_listed_with_what_is_wrong(run):
    commit(run, 20)
    damaged = commit(run, 30)
    path = run.checkpoints / damaged.name / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"cadence", b"cadencf"))
    sound, broken = list_checkpoints(run.root)
    assert sound.problem is None
    assert (broken.name, broken.step) == (damaged.name, 30)
    assert "manifest.json" in broken.problem
    lines = checkpoint_table("", list_checkpoints(run.root)).lines()
    assert any("damaged" in line for line in lines)
    with pytest.raises(IntegrityError):
        find_checkpoint(run.root, None)


def test_the_newest_or_the_one_of_a_step_is_found(run):
    for step in (20, 300):
        commit(run, step)
    assert find_checkpoint(run.root, None)[1].step == 300
    assert find_checkpoint(run.root, 20)[1].step == 20
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 7; there are: 20, 300"):
        find_checkpoint(run.root, 7)


def test_contents_are_described(run):
    commit(run, 20, world_size=1)
    described = describe(*find_checkpoint(run.root, None))
    assert (described["samples"], described["objects"], described["shards"][0]["node"]) == (
        160,
        ["model"],
        "n1",
    )
    table = contents_table(described)
    assert "by 1 rank of attempt 1" in table.title
    assert table.note == "besides: model"


def test_a_partial_one_says_so_and_why(run):
    older = commit(run, 10)
    structure = Structure({"model/w": TensorRecord((4, 2), "float32", Layout.replicated((0, 1)))})
    commit(
        run, 20, content="model", note="9 s were left", missing_ranks=(1,), refers=(older.name,), structure=structure
    )  # fmt: skip
    assert [each.content for each in list_checkpoints(run.root)] == ["full", "model"]
    assert list_checkpoints(run.root)[1].to_json()["note"] == "9 s were left"
    lines = checkpoint_table("", list_checkpoints(run.root)).lines()
    assert "cadence, model only" in lines[2]
    assert "model only" not in lines[1]
    assert lines[3] == "step 20: the model only: 9 s were left; it is not resumed from"
    lines = contents_table(describe(*find_checkpoint(run.root, None))).lines()
    assert lines[2].split() == ["model/w", "4", "x", "2", "float32", "32", "B", "2"]
    assert lines[3].splitlines() == [
        "besides: model",
        "the model only: 9 s were left; it is not resumed from",
        "ranks that died while it was saved: 1; others wrote what they held alike",
        f"unchanged bytes lie in: {older.name}",
    ]
