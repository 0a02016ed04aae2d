"""A run that begins at a checkpoint of another one: its bytes are shared, and neither can hurt the other."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest

from hpc_resume.checkpoint.commit import claim_attempt, committed_by
from hpc_resume.checkpoint.fork import _named_records, apply_fork, plan_fork
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.prune import apply_pruning, plan_pruning
from hpc_resume.checkpoint.rollback import apply_rollback, plan_rollback
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.files import Filesystem
from hpc_resume.lineage import lineage_path, read_lineage
from hpc_resume.provenance.source import read_source
from hpc_resume.provenance.sources import Sources
from hpc_resume.rundir import RunDirectory, checkpoint_step, sealed
from tests.checkpoint.faulty import Faulty, Killed
from tests.checkpoint.story import UNSYNCED, World, begin

WORLD = World(2)


def steps(names):
    return sorted(map(checkpoint_step, names))


def make(run, step, target, **options):
    options = {"name": "new", "why": "a higher rate", "fs": UNSYNCED, "clock": lambda: 1.7e9, **options}
    return apply_fork(plan_fork(run, step), target, **options)


def verify(root):
    return [each for each in verify_run(root, threads=1) if "attempts" not in each.path.parts]


def inodes(run):
    return {path.relative_to(run.root): path.stat().st_ino for path in run.checkpoints.rglob("*.*")}


def test_what_a_fork_refers_to_comes_along_and_takes_no_space(run, tmp_path):
    lineage = make(run, 30, tmp_path / "new", settings={"entry.kwargs.lr": 0.1})
    new = RunDirectory(tmp_path / "new")
    assert steps(new.checkpoint_names()) == [10, 20, 30]
    assert inodes(new).items() <= inodes(run).items()
    assert verify(new.root) == verify(run.root) == []
    assert new.identity()["run_id"] != run.identity()["run_id"]
    assert new.identity()["name"] == "new"
    assert read_lineage(new) == lineage
    assert read_lineage(run) is None
    assert (lineage.parent.step, lineage.how, lineage.attempt) == (30, "links", 1)
    assert lineage.parent.run_id == run.identity()["run_id"]
    assert lineage.shared == {
        name: read_manifest(run.checkpoints / name).content_id for name in run.checkpoint_names()[:3]
    }
    assert lineage.settings == {"entry.kwargs.lr": 0.1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


def test_pruning_or_deleting_the_parent_leaves_the_fork_whole_and_the_other_way_round(run, tmp_path):
    make(run, 30, tmp_path / "new")
    apply_pruning(run, plan_pruning(run, keep=1))
    assert 30 not in steps(run.checkpoint_names())
    new = RunDirectory(tmp_path / "new")
    assert verify(new.root) == []
    for name in new.checkpoint_names():
        WORLD.assert_whole(new.checkpoints / name)
    make(run, 60, tmp_path / "other")
    shutil.rmtree(run.root)
    assert verify(new.root) == verify(tmp_path / "other") == []


def test_a_fork_goes_on_and_is_forked(run, tmp_path):
    make(run, 40, tmp_path / "b")
    second = RunDirectory(tmp_path / "b")
    attempt = begin(WORLD, second, promised := [])
    for step in (50, 60):
        attempt.save(step)
    attempt.close()
    assert read_manifest(second.checkpoints / promised[0]).run_id == second.identity()["run_id"]
    assert verify(second.root) == []
    lineage = make(second, 60, tmp_path / "c", name="c")
    assert [(each.name, each.step) for each in lineage.ancestors] == [("new", 60), ("story", 40)]
    assert lineage.sentence.startswith(
        f"forked from step 60 of new ({tmp_path / 'b'}), which was forked from step 40"
    )
    shared = make(RunDirectory(tmp_path / "b"), 40, tmp_path / "d")  # of the first one's checkpoint
    assert [each.step for each in shared.ancestors] == [40, 40]
    shutil.rmtree(run.root)
    shutil.rmtree(second.root)
    assert verify(tmp_path / "c") == verify(tmp_path / "d") == []


def test_the_parents_attempts_are_not_taken_for_the_forks_own(run, tmp_path):
    """Both number them from 1, and a fork that is rolled back does a step again that its parent had saved."""
    make(run, 30, tmp_path / "new")
    new = RunDirectory(tmp_path / "new")
    apply_rollback(new, plan_rollback(new, 20), why="again", fs=UNSYNCED)
    assert committed_by(run, 1, 30) is not None
    assert committed_by(new, 1, 30) is None
    attempt = begin(WORLD, new, promised := [])
    attempt.save(30)
    attempt.close()
    assert steps(promised) == [30]
    assert steps(new.checkpoint_names()) == [10, 20, 30, 30]
    assert verify(new.root) == []


def test_only_what_the_lineage_names_may_be_another_runs(run, tmp_path):
    make(run, 40, tmp_path / "new")
    new = RunDirectory(tmp_path / "new")
    name = run.checkpoint_names()[0]
    shutil.copytree(run.checkpoints / name, new.checkpoints / name)
    assert [each.problem for each in verify(new.root)] == [f"belongs to run {run.identity()['run_id']}"]


def test_what_is_set_aside_can_be_forked(run, tmp_path):
    apply_rollback(run, plan_rollback(run, 20), why="the loss went up", fs=UNSYNCED)
    assert make(run, None, tmp_path / "a").parent.step == 20
    assert make(run, 60, tmp_path / "b").parent.step == 60
    assert verify(tmp_path / "b") == []


class NoLinks(Filesystem):
    """The disk, without waiting for it, and without links to files of other runs."""

    def fsync(self, fd):
        pass

    def link(self, source, target):
        if source.name.startswith(".run.json"):
            super().link(source, target)
            return
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
@pytest.mark.parametrize("reflinks", [True, False])
def test_where_links_can_not_be_made_files_are_copied(run, tmp_path, monkeypatch, number, reflinks):
    fs = NoLinks()
    fs.number = number
    if not reflinks:

        def refuse(*_):
            raise OSError(errno.EXDEV, "another filesystem")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    lineage = make(run, 30, tmp_path / "new", fs=fs)
    new = RunDirectory(tmp_path / "new")
    assert lineage.how == "copies"
    assert not inodes(new).items() & inodes(run).items()
    assert verify(new.root) == []


def test_copies_are_made_if_that_is_wanted_and_verified(run, tmp_path):
    assert make(run, 30, tmp_path / "new", copy=True).how == "copies"
    damage(run, 40)
    with pytest.raises(IntegrityError, match="its copy is not right"):
        make(run, 40, tmp_path / "other", copy=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


def damage(run, step):
    name = next(name for name in run.checkpoint_names() if checkpoint_step(name) == step)
    shard = next((run.checkpoints / name).glob("rank*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return shard


def test_a_damaged_checkpoint_is_not_forked(run, tmp_path):
    shard = damage(run, 10)
    with pytest.raises(IntegrityError, match="fork at an older step"):
        plan_fork(run, 30, verify=True)  # which refers to it
    assert plan_fork(run, 30).checkpoint == run.checkpoint_names()[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="is no file of"):
        plan_fork(run, 30)
    shard.unlink()
    with pytest.raises(IntegrityError, match="can't be read"):
        plan_fork(run, 30)
    shard.symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="is no file of"):
        plan_fork(run, 30)
    with pytest.raises(
        CheckpointNotFound, match="no full checkpoint of step 31; there are: 10, 20, 30, 40, 60"
    ):
        plan_fork(run, 31)


def test_a_folder_that_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(UsageError, match="is there already"):
        make(run, 30, tmp_path / "new")
    (tmp_path / "new" / "mine").unlink()
    make(run, 30, tmp_path / "new")  # an empty one will do
    assert verify(tmp_path / "new") == []
    with pytest.raises(UsageError, match="can't be made a run directory"):
        make(run, 30, tmp_path / "run" / "run.json" / "new")


def test_the_configurations_come_along(run, tmp_path):
    config = Config(name="new", run_dir=str(tmp_path / "new"))
    make(run, 40, tmp_path / "new", config=config)
    assert [path.name for path in (tmp_path / "new/configs").iterdir()] == [f"{config.digest()}.yaml"]


def test_the_source_that_a_checkpoint_names_comes_along(run, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text("print('trains')")
    digest = Sources.of(run).keep(read_source(tmp_path / "code/train.py"))
    manifest = read_manifest(run.checkpoints / run.checkpoint_names()[-1])
    named = set(_named_records(run, replace(manifest, environment={"source": digest})))
    assert {path.name for path in named} == {f"{digest}.zip", f"{digest}.json"}
    for other in ("../../../etc/passwd", "0" * 16, None, 3):
        assert not set(_named_records(run, replace(manifest, environment={"source": other})))


def test_a_kill_at_any_call_of_it_leaves_nothing_that_looks_like_a_run(origin, tmp_path):
    for at in range(1, 1000):
        base = tmp_path / str(at)
        shutil.copytree(origin, base)
        run = RunDirectory(base / "run")
        fs = Faulty(base, at=at)
        fs.sync_all()
        try:
            make(run, 30, base / "new", fs=fs)
        except Killed:
            assert verify(run.root) == []
            if (base / "new").exists():  # renamed, and killed before the folder was synced
                assert verify(base / "new") == []
            shutil.rmtree(base)
        else:
            assert at > 20
            assert verify(base / "new") == []
            return


@pytest.mark.parametrize(
    "fields",
    [
        {"run_id": "another"},
        {"ancestors": []},
        {"ancestors": [{"run_id": "r", "name": "n", "path": "p", "checkpoint": "../../x"}]},
        {"shared": {}},
        {"shared": {"0000000040-00000000": "0" * 31}},
        {"shared": ["x"]},
        {"settings": []},
        {"attempt": -1},
        {"when": "now"},
        {"why": "\ud800"},
        {"schema": 2},
    ],
)
def test_a_lineage_that_is_made_up_is_refused(run, tmp_path, fields):
    make(run, 40, tmp_path / "new")
    new = RunDirectory(tmp_path / "new")
    path = lineage_path(new)
    record = {**json.loads(path.read_bytes()), **fields}
    path.write_bytes(sealed({key: value for key, value in record.items() if key != "digest"}))
    with pytest.raises(IntegrityError, match=r"lineage\.json"):
        read_lineage(new)
    assert {each.path.name for each in verify(new.root)} == {"lineage.json", "manifest.json"}


def test_a_flipped_byte_in_the_lineage_is_found(run, tmp_path):
    make(run, 40, tmp_path / "new")
    path = lineage_path(RunDirectory(tmp_path / "new"))
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert verify(tmp_path / "new"), place


def test_a_fork_has_attempts_of_its_own(run, tmp_path):
    make(run, 40, tmp_path / "new")
    assert claim_attempt(RunDirectory(tmp_path / "new")) == 1
