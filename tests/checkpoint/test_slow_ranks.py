"""Ranks that are slow or dead, survivors that stand in for them, and committers that get in each other's way."""

import pytest

from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.standin import keepers, substitute
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import IntegrityError
from hpc_resume.rundir import RunDirectory
from tests.checkpoint.faulty import Faulty
from tests.checkpoint.story import World, begin

WORLD = World(3, replicated=True)
DEAD = 2


def stand_in(attempt, step, *, by, rank=DEAD):
    world = attempt.world
    part = substitute(world.captured(by, step), rank, own_rank=by)
    assert part is not None
    header = world.header(attempt.run, attempt.number, step)
    snapshot = Camera(threads=1).take(part, stage=False)
    return attempt.stagings[by].write(header, snapshot, rank=rank)


def assert_committed_once(run, step, *, missing):
    names = [name for name in run.checkpoint_names() if int(name[:10]) == step]
    assert len(names) == 1
    assert WORLD.assert_whole(run.checkpoints / names[0]) == step
    manifest = read_manifest(run.checkpoints / names[0])
    assert set(manifest.missing_ranks) in missing
    assert verify_run(run.root, threads=1) == []
    return names[0]


def next_save_is_good(attempt, name):
    """What ranks believe of the last commit is true: an incremental save on top of it can be read."""
    for staging in attempt.stagings:
        staging.committed(10, name)
    attempt.write(20)
    last = attempt.commit(20)
    assert read_manifest(attempt.run.checkpoints / last).refers == (name,)
    assert WORLD.assert_whole(attempt.run.checkpoints / last) == 20


def test_a_checkpoint_is_completed_from_replicas(tmp_path):
    attempt = begin(WORLD, RunDirectory(tmp_path / "run"), [])
    attempt.write(10, [0, 1])
    assert attempt.stagings[0].missing(10) == [DEAD]
    with pytest.raises(IntegrityError, match="receipts of ranks 2 of 3 are missing"):
        attempt.commit(10)
    stand_in(attempt, 10, by=1)
    assert attempt.stagings[0].missing(10) == []
    name = attempt.commit(10, rank=0)
    assert_committed_once(attempt.run, 10, missing=[{DEAD}])
    # The dead one was only slow: it learns that it comes too late, and leaves nothing behind.
    header = WORLD.header(attempt.run, attempt.number, 10)
    snapshot = Camera(threads=1).take(WORLD.captured(DEAD, 10), stage=False)
    assert attempt.stagings[DEAD].write(header, snapshot) is None
    assert attempt.commit(10, rank=DEAD) == name
    assert list((attempt.run.attempt(1) / "staging").iterdir()) == []
    assert_committed_once(attempt.run, 10, missing=[{DEAD}])
    next_save_is_good(attempt, name)
    attempt.close()


@pytest.mark.parametrize("take_over", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_two_ranks_commit_at_once_and_see_different_stand_ins(tmp_path, take_over, late):
    """At each call of one commit another rank commits too, which may know one more stand-in."""
    for at in range(1, 1000):
        run = RunDirectory(tmp_path / f"run{at}")
        attempt = begin(WORLD, run, [])
        attempt.write(10, [0, 1])
        stand_in(attempt, 10, by=1)
        if not late:
            stand_in(attempt, 10, by=0)

        def other(attempt=attempt, results=(results := [])):
            if late:
                stand_in(attempt, 10, by=0)
            results.append(attempt.stagings[1].commit(10, take_over=take_over))

        fs = Faulty(tmp_path, at=at, fault=other)
        attempt.stagings[0]._fs = fs
        results.append(attempt.stagings[0].commit(10))
        if set(results) == {None}:  # each left it to the other
            results.append(attempt.stagings[1].commit(10, take_over=True))
        name = assert_committed_once(run, 10, missing=[{DEAD}])
        assert set(results) <= {name, None}
        attempt.close()
        if not fs.hit:
            assert at > 8
            return


def test_a_slow_rank_comes_at_any_moment_of_the_commit_without_it(tmp_path):
    for at in range(1, 1000):
        run = RunDirectory(tmp_path / f"run{at}")
        attempt = begin(WORLD, run, [])
        attempt.write(10, [0, 1])
        stand_in(attempt, 10, by=0)

        def come(attempt=attempt):
            attempt.write(10, [DEAD])

        fs = Faulty(tmp_path, at=at, fault=come)
        attempt.stagings[0]._fs = fs
        name = attempt.stagings[0].commit(10)
        assert name == assert_committed_once(run, 10, missing=[{DEAD}, set()])
        assert attempt.stagings[DEAD].commit(10) == name
        next_save_is_good(attempt, name)
        attempt.close()
        assert_nothing_is_refused(run)
        if not fs.hit:
            assert at > 8
            return


def test_the_commit_without_a_slow_rank_comes_at_any_moment_of_its_write(tmp_path):
    for at in range(1, 1000):
        run = RunDirectory(tmp_path / f"run{at}")
        attempt = begin(WORLD, run, [])
        attempt.write(10, [0, 1])
        stand_in(attempt, 10, by=0)

        def commit(attempt=attempt, names=(names := [])):
            names.append(attempt.stagings[0].commit(10))

        fs = Faulty(tmp_path, at=at, fault=commit)
        slow = attempt.stagings[DEAD]
        slow._fs = slow._writer._fs = fs
        attempt.write(10, [DEAD])
        if not fs.hit:
            commit()
        assert names == [assert_committed_once(run, 10, missing=[{DEAD}, set()])]
        assert slow.commit(10) == names[0]
        next_save_is_good(attempt, names[0])
        attempt.close()
        assert_nothing_is_refused(run)
        if not fs.hit:
            assert at > 8
            return


def assert_nothing_is_refused(run):
    """The next attempt clears away what a slow rank has left of a committed step."""
    before = run.checkpoint_names()
    begin(WORLD, run, promised := []).close()
    assert promised == []
    assert run.checkpoint_names() == before
    assert list(run.root.rglob("refused.txt")) == []
    assert [path for path in run.root.rglob("*") if path.parent.name in {"staging", "unfinished"}] == []


def test_who_holds_what_a_rank_stores_follows_by_rule():
    assert keepers(WORLD.structure, 1, 3) == {0, 1, 2}
    rows = World(2)
    assert keepers(rows.structure, 0, 2) == {0}
    assert keepers(rows.structure, 1, 2) == {1}
    for rank in range(3):
        for other in range(3):
            assert substitute(WORLD.captured(other, 1), rank, own_rank=other) is not None
    assert substitute(rows.captured(0, 1), 1, own_rank=0) is None
