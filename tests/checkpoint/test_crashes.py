"""Faults at every call of a run that saves: no committed step is lost, none is torn, and the run can go on."""

import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from hpc_resume.checkpoint.commit import claim_attempt, finish_earlier_commits
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import FencedError, UsageError
from hpc_resume.files import DISK
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.checkpoint.faulty import Faulty, Killed
from tests.checkpoint.story import World, begin


@pytest.fixture
def here(tmp_path):
    """A folder in memory where there is such a filesystem: nothing here is about disks."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


WORLDS = {size: World(size) for size in (1, 2)}


def tell(world, base, fs, promised, *, stage=False):
    """Two attempts: a whole save, two incremental ones of which one is not committed, and what follows."""
    run = RunDirectory(base / "run")
    first = begin(world, run, promised, fs, stage=stage)
    try:
        first.save(10)
        first.save(20)
        first.write(30)
    finally:
        first.close()
    second = begin(world, run, promised, fs, stage=stage)
    try:
        second.save(40)
    finally:
        second.close()


def count_calls(world, base):
    fs = Faulty(base)
    promised = []
    tell(world, base, fs, promised)
    assert [checkpoint_step(name) for name in promised] == [10, 20, 30, 40]
    return fs


def assert_all_whole(world, run, *, verify=True, but=()):
    for name in set(run.checkpoint_names()) - set(but):
        assert world.assert_whole(run.checkpoints / name, verify=verify) == checkpoint_step(name)


def assert_goes_on(world, base, promised):
    """Whatever has happened in ``base``: what was promised is there and whole, and a new attempt saves."""
    run = RunDirectory(base / "run")
    found = run.checkpoint_names()
    assert set(promised) <= set(found)
    assert_all_whole(world, run, verify=False)
    attempt = begin(world, run, [])
    attempt.write(50)
    assert attempt.commit(50) is not None
    attempt.close()
    assert verify_run(run.root, threads=1) == []  # of all: that nothing has changed what was whole, too
    assert_all_whole(world, run, verify=False, but=found)
    assert set(found) <= set(run.checkpoint_names())
    assert checkpoint_step(run.checkpoint_names()[-1]) == 50


def base_of(here, number):
    base = here / str(number)
    base.mkdir()
    return base


def test_the_story_itself(here):
    world = WORLDS[2]
    fs = count_calls(world, base_of(here, 0))
    run = RunDirectory(here / "0" / "run")
    assert_all_whole(world, run)
    assert verify_run(run.root) == []
    refers = [len(world_refers(run, name)) for name in run.checkpoint_names()]
    assert refers == [0, 1, 2, 0]  # the second refers to the first, the third to both
    kinds = {line.split()[0] for line in fs.log}
    assert kinds == {
        "open",
        "pwrite",
        "truncate",
        "fsync",
        "fsync_dir",
        "rename",
        "link",
        "mkdir",
        "rmdir",
        "unlink",
    }


def world_refers(run, name):
    from hpc_resume.checkpoint.manifest import read_manifest

    return read_manifest(run.checkpoints / name).refers


def test_a_kill_or_a_power_cut_at_any_call(here):
    world = WORLDS[2]
    calls = count_calls(world, base_of(here, 0)).calls
    assert calls > 60
    for at in range(1, calls + 1):
        base = base_of(here, at)
        fs, promised = Faulty(base, at=at), []
        with pytest.raises(Killed):
            tell(world, base, fs, promised, stage=at % 3 == 0)
        # Names that are late change with an fsync only; bytes that are late are there only between two.
        late_names = at == 1 or fs.log[-2].startswith("fsync")
        for names_late in [True] * late_names + [False] * fs.unsynced:
            cut = here / f"{at}-{names_late}"
            fs.after_power_cut(cut, names_late=names_late)
            assert_goes_on(world, cut, promised)
            shutil.rmtree(cut)
        assert_goes_on(world, base, promised)
        shutil.rmtree(base)


def test_a_kill_in_the_middle_of_a_write(here):
    world = WORLDS[2]
    log = count_calls(world, base_of(here, 0)).log
    writes = [at for at, line in enumerate(log, 1) if line.startswith("pwrite")]
    for at in writes:
        base = base_of(here, at)
        promised = []
        with pytest.raises(Killed):
            tell(world, base, Faulty(base, at=at, fault="half"), promised)
        assert_goes_on(world, base, promised)
        shutil.rmtree(base)


@pytest.mark.parametrize("size", [1, 2])
def test_a_kill_while_the_next_attempt_finishes_what_it_found(here, size):
    world = WORLDS[size]
    origin = base_of(here, "origin")
    run = RunDirectory(origin / "run")
    first = begin(world, run, [])
    first.save(10)
    first.write(20)
    first.close()
    for at in range(1, 1000):
        base = here / str(at)
        shutil.copytree(origin, base)
        fs = Faulty(base, at=at)
        try:
            claim_attempt(RunDirectory(base / "run"), fs=fs)
            finish_earlier_commits(RunDirectory(base / "run"), fs=fs)
        except Killed:
            assert_goes_on(world, base, first.promised)
            names = RunDirectory(base / "run").checkpoint_names()
            assert [checkpoint_step(name) for name in names] == [10, 20, 50]  # by whoever came last
            shutil.rmtree(base)
        else:
            assert at > 15
            return


@pytest.mark.parametrize("kind", ["in turn", "stale", "late", "full"])
def test_an_error_at_any_call(here, kind):
    """The save that it hits fails with that error and leaves nothing; the next one is good."""
    world = WORLDS[2]
    calls = count_calls(world, base_of(here, 0)).calls
    for at in range(1, calls + 1):
        base = base_of(here, at)
        in_turn = [errno.EIO, errno.ENOSPC, errno.EDQUOT][at % 3]
        fault = {"in turn": in_turn, "stale": errno.ESTALE, "late": "late", "full": errno.ENOSPC}[kind]
        fs = Faulty(base, at=at, fault=fault, lasting=kind == "full")
        run, promised = RunDirectory(base / "run"), []
        first = begin_in_the_end(world, run, promised, fs)
        first.save(10)
        first.save(20)
        first.close()
        if fs.full:
            assert [path for path in base.rglob(".*") if path.suffix == ".tmp"] == []
            fs.full = False
        second = begin_in_the_end(world, run, promised, fs)
        second.save(30)
        second.save(40)
        second.close()
        failures = first.failures + second.failures
        if kind != "full":
            assert len(failures) <= 1
        for error in failures:
            assert str(base) in str(error) or kind in {"late", "stale"}, error
        assert set(promised) <= set(run.checkpoint_names())
        if fs.hit not in {"unlink", "rmdir"}:  # then something may be left, which nobody minds
            assert leftovers(run) == [], (at, fs.log[at - 1])
        if at % 4 == 0:
            assert_goes_on(world, base, promised)
        else:
            assert_all_whole(world, run)
        shutil.rmtree(base)


def begin_in_the_end(world, run, promised, fs):
    """Begin an attempt; a scheduler would start it again if that fails."""
    for _ in range(100):
        try:
            return begin(world, run, promised, fs)
        except (OSError, UsageError):  # as which a run directory that can't be made is told
            fs.full = False
    raise AssertionError("no attempt could begin")


def leftovers(run):
    """Everything that a run without saves under way should not hold."""
    return [
        path
        for path in run.root.rglob("*")
        if path.suffix == ".tmp"
        or path.name.startswith((".claim", ".run.json"))
        or (path.parent.name in {"staging", "unfinished"} and any(path.iterdir()))
    ]


def test_short_writes_are_gone_on_with(here):
    world = WORLDS[2]
    log = count_calls(world, base_of(here, 0)).log
    for at in [at for at, line in enumerate(log, 1) if line.startswith("pwrite")]:
        base = base_of(here, at)
        fs, promised = Faulty(base, at=at, fault="short"), []
        tell(world, base, fs, promised)
        assert len(promised) == 4
        assert fs.calls == len(log) + 1
        assert_all_whole(world, RunDirectory(base / "run"))
        shutil.rmtree(base)


class SecondOwner:
    """Begins an attempt, saves and ends, while the first attempt is in the middle of something."""

    def __init__(self, world, run):
        self.world, self.run = world, run
        self.promised, self.left = [], None

    def __call__(self):
        attempt = begin(self.world, self.run, self.promised)
        assert_all_whole(self.world, self.run, verify=False)
        attempt.write(60)
        assert attempt.commit(60) is not None
        attempt.close()
        self.left = self.run.checkpoint_names()


def test_a_second_owner_that_still_writes_commits_nothing_more(here):
    """At each call of the first attempt a second one begins, saves, and ends; then the first one goes on."""
    world = WORLDS[2]
    fenced = 0
    for at in range(1, 1000):
        base = base_of(here, at)
        run, mine = RunDirectory(base / "run"), []
        second = SecondOwner(world, run)
        fs = Faulty(base, at=at, fault=second)
        try:
            first = begin(world, run, mine, fs)
            for step in (10, 20):
                first.write(step)
                first.commit(step)
            first.close()
        except FencedError:
            fenced += 1
            assert run.checkpoint_names() == second.left  # nothing more, and nothing less
        assert set(mine) | set(second.promised) <= set(run.checkpoint_names())
        assert_goes_on_after(world, run)
        shutil.rmtree(base)
        if second.left is None:
            break
    assert fenced > 15


def assert_goes_on_after(world, run):
    assert_all_whole(world, run, verify=False)
    attempt = begin(world, run, [])
    attempt.write(70)
    assert attempt.commit(70) is not None
    attempt.close()
    assert verify_run(run.root, threads=1) == []


@pytest.mark.parametrize("direct", ["", "open", "write"])
def test_where_o_direct_is_refused_the_page_cache_serves(tmp_path, direct):
    world = World(2, rows=24)
    base = base_of(tmp_path, 0)
    promised = []
    for stage in (False, True):
        fs = Faulty(base, direct=direct)
        attempt = begin(world, RunDirectory(base / "run"), promised, fs, threads=2, stage=stage)
        attempt.save(10 + 100 * stage)
        attempt.save(20 + 100 * stage)
        attempt.close()
        assert attempt.failures == []
    assert len(promised) == 4
    assert_all_whole(world, RunDirectory(base / "run"))


def test_a_write_that_fails_waits_for_the_other_threads_before_it_closes_the_file(here):
    """Else their late writes go to whatever file has its number next."""
    world = World(1, rows=100)
    base = base_of(here, 0)
    closed = []

    class Slow(Faulty):
        def pwrite(self, fd, data, offset):
            assert fd not in closed
            if offset == 0:
                raise OSError(errno.ENOSPC, "full")
            done.wait(0.05)
            assert fd not in closed
            return super().pwrite(fd, data, offset)

        def close(self, fd):
            closed.append(fd)
            super().close(fd)

    done = threading.Event()
    run = RunDirectory(base / "run")
    begin(world, run, []).close()
    attempt = begin(world, run, [], threads=2)
    attempt.stagings[0]._writer._fs = Slow(base)
    attempt.save(10)
    attempt.close()
    assert "full" in str(attempt.failures[0])
    assert str(run.root) in str(attempt.failures[0])
    assert run.checkpoint_names() == []


def test_the_real_one_syncs_what_it_writes(here, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    DISK.write_file(here / "file", b"x" * 10)
    assert len(synced) == 2  # the file, the folder
    assert (here / "file").read_bytes() == b"x" * 10
