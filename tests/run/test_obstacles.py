"""Checkpoints that one rank, or none, can read while nothing is wrong with them: no valid one is put aside for it."""

import errno
import os
import resource
from pathlib import Path

import pytest

from hpc_resume.checkpoint import manifest as manifests
from hpc_resume.checkpoint.shardfile import ShardFile
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import IntegrityError
from hpc_resume.files import may_be_damage, may_pass, obstacle
from hpc_resume.journal import Journal, read_events
from hpc_resume.run import openfiles
from hpc_resume.run.candidates import Candidates, read_through
from hpc_resume.run.probing import OTHER, SAME
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import ValidationSettings
from tests.checkpoint.story import three_saves
from tests.ranks import Attempt
from tests.run.training import train

ELSEWHERE = [
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
]


@pytest.fixture
def run(tmp_path):
    return three_saves(tmp_path)


@pytest.fixture
def refuse(monkeypatch):
    """Have reading manifests of some checkpoints fail."""
    real = manifests.read_regular

    def refuse(number, names):
        def read(path, **options):
            if path.parent.name in names:
                raise OSError(number, os.strerror(number))
            return real(path, **options)

        monkeypatch.setattr(manifests, "read_regular", read)

    return refuse


def again(number=None):
    """Read a file as rank 0 does that looks whether it can."""

    def read(path):
        assert path.name == "manifest.json"
        if number is not None:
            raise OSError(number, os.strerror(number))

    return read


def candidates(run, read=read_through):
    return Candidates(run, ValidationSettings(), Journal(run.root / "events.jsonl"), read=read)


@pytest.mark.parametrize("number", ELSEWHERE)
def test_what_tells_nothing_of_a_checkpoint_sets_none_aside(run, refuse, number):
    names = run.checkpoint_names()
    refuse(number, names[-1:])
    with pytest.raises(IntegrityError, match=f"{names[-1]}/manifest.json: can't be read") as caught:
        candidates(run).newest()
    assert obstacle(caught.value).errno == number
    assert (run.checkpoint_names(), list(run.quarantine.iterdir())) == (names, [])


def test_a_manifest_that_can_be_read_the_second_time_is_not_passed_over(run, refuse):
    names = run.checkpoint_names()
    refuse(errno.EIO, names[-1:])
    with pytest.raises(IntegrityError):
        candidates(run, again()).newest()
    with pytest.raises(OSError, match="Stale"):  # rank 0 itself is no witness
        candidates(run, again(errno.ESTALE)).newest()
    assert run.checkpoint_names() == names


def test_what_can_not_be_read_is_set_aside_as_soon_as_an_older_one_can(run, refuse):
    names = run.checkpoint_names()
    refuse(errno.EIO, names[1:])
    chosen = candidates(run, again(errno.EIO))
    assert chosen.newest() == names[0]
    assert not chosen.judge(names[0], OTHER, "0.1 instead of 0.2")
    assert run.checkpoint_names() == names
    chosen = candidates(run, again(errno.EIO))
    assert chosen.newest() == names[0]
    assert chosen.judge(names[0], SAME, "")
    assert run.checkpoint_names() == names[:1]
    aside = read_events(run.root / "events.jsonl", {"quarantined"})
    assert [event["checkpoint"] for event in aside] == [names[2], names[1]]
    assert "manifest.json: can't be read (Input/output error)" in aside[0]["reason"]


def test_where_none_can_be_read_none_is_set_aside(run, refuse):
    names = run.checkpoint_names()
    refuse(errno.EIO, names)
    chosen = candidates(run, again(errno.EIO))
    assert chosen.newest() is None
    assert list(chosen.unread) == names[::-1]
    assert run.checkpoint_names() == names


def test_none_is_set_aside_while_it_is_not_known_who_needs_its_bytes(run, refuse):
    names = run.checkpoint_names()
    chosen = candidates(run)
    refuse(errno.ESTALE, names[-1:])
    with pytest.raises(IntegrityError):
        chosen.set_aside(names[0], "damaged")
    assert run.checkpoint_names() == names


def test_an_error_of_the_system_knows_its_file_and_ours_names_it(run, monkeypatch):
    name = run.checkpoint_names()[0]
    folder = run.checkpoints / name
    manifest = manifests.read_manifest(folder)
    path = folder / manifest.shards[0].file

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = ShardFile.open(folder, manifest, 0)
    monkeypatch.setattr(os, "preadv", fails)
    for read in (
        lambda: file.read(0, 0, memoryview(bytearray(8))),
        lambda: ShardFile.open(folder, manifest, 0),
    ):
        with pytest.raises(IntegrityError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ")
        assert (obstacle(caught.value).errno, obstacle(caught.value).filename) == (errno.EIO, str(path))
    file.close()
    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(IntegrityError) as caught:
        ShardFile.open(folder, manifest, 0)
    assert obstacle(caught.value).filename == str(path)


def test_damage_is_no_obstacle(run):
    folder = run.checkpoints / run.checkpoint_names()[0]
    manifest = manifests.read_manifest(folder)
    path = folder / manifest.shards[0].file
    for harm in (lambda: os.truncate(path, 100), path.unlink, path.mkdir):
        harm()
        with pytest.raises(IntegrityError) as caught:
            ShardFile.open(folder, manifest, 0)
        assert obstacle(caught.value) is None
    assert not may_pass(caught.value)


def test_only_an_error_of_input_and_output_may_be_damage():
    assert may_be_damage(OSError(errno.EIO, ""))
    assert not any(may_be_damage(OSError(number, "")) for number in ELSEWHERE)
    assert not may_be_damage(obstacle(MemoryError()))


def test_as_many_files_may_be_open_as_the_hard_limit_lets(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(openfiles, "_ENOUGH", soft)
    few = soft // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        openfiles.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
        monkeypatch.setattr(openfiles, "_ENOUGH", few)
        openfiles.raise_limit()  # never lowers it
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------- ranks


def refusing(real, number, newest):
    """Read, but no shards: of all checkpoints, or of one."""

    def read(fd, *args):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.suffix == ".h5" and newest in {None, path.parent.name}:
            raise OSError(number, os.strerror(number))
        return real(fd, *args)

    return read


def train_where(steps, number=None, ranks=(), newest=None):
    """Train; some ranks can't read shards, of all checkpoints or of one."""
    if int(os.environ["SUBMITIT_LOCAL_GLOBALID"]) in ranks:
        for call in ("preadv", "read"):
            setattr(os, call, refusing(getattr(os, call), number, newest))
    train(steps, every_steps=2)


@pytest.fixture
def trained(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_where, 6)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    return RunDirectory(tmp_path / "run")


def events(run, attempt, kind):
    return read_events(run.attempt(attempt) / "events.jsonl", {kind})


@pytest.mark.parametrize(("number", "rank"), [(errno.ESTALE, 0), (errno.EMFILE, 1), (errno.EIO, 1)])
def test_what_one_rank_can_not_read_is_its_nodes_trouble(trained, number, rank):
    names = trained.checkpoint_names()
    attempt = Attempt(trained.root, 2, train_where, 8, number, [rank])
    assert attempt.wait(40) == [75, 75], attempt.log.read_text()
    (last,) = events(trained, 2, "ended")
    assert [last[key] for key in ("cause", "decision", "nodes")] == [
        "crash",
        "continue",
        [os.uname().nodename],
    ]
    assert f"rank {rank} on" in last["evidence"]
    assert str(trained.checkpoints / names[-1] / "rank-0000") in last["evidence"]
    assert os.strerror(number) in last["evidence"]
    assert (trained.checkpoint_names(), list(trained.quarantine.iterdir())) == (names, [])
    attempt = Attempt(trained.root, 2, train_where, 8)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert events(trained, 3, "restored")[0]["checkpoint"] == names[-1]


def test_what_no_rank_can_read_is_set_aside_and_an_older_one_serves(trained):
    names = trained.checkpoint_names()
    attempt = Attempt(trained.root, 2, train_where, 8, errno.EIO, [0, 1], names[-1])
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (aside,) = events(trained, 2, "quarantined")
    assert aside["checkpoint"] == names[-1]
    assert events(trained, 2, "restored")[0]["checkpoint"] == names[-2]
    assert verify_run(trained.root) == []


def test_where_nothing_can_be_read_the_attempt_ends_and_the_run_goes_on(trained):
    names = trained.checkpoint_names()
    attempt = Attempt(trained.root, 2, train_where, 8, errno.EIO, [0, 1])
    assert attempt.wait(40) == [75, 75], attempt.log.read_text()
    (last,) = events(trained, 2, "ended")
    assert (last["cause"], last["decision"]) == ("crash", "continue")
    assert "none of its checkpoints can be read, and nothing was set aside" in last["evidence"]
    assert (trained.checkpoint_names(), list(trained.quarantine.iterdir())) == (names, [])
