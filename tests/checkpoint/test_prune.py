"""Deleting checkpoints of a run with incremental ones, interrupted anywhere."""

import errno
import json
import os
import shutil

import pytest
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint.prune import apply_pruning, plan_pruning
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.untrusted import read_regular
from tests.checkpoint.faulty import Faulty, Killed
from tests.checkpoint.story import World, begin, two_attempts

WORLD = World(2)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Steps 10 to 30 refer to 10; then comes another attempt: 40 is whole, 60 refers to it. Journals say so."""
    base = tmp_path_factory.mktemp("origin")
    run = RunDirectory(base / "run")
    for attempt in two_attempts(WORLD, run):
        journal = run.attempt(attempt.number) / "events.jsonl"
        saved = [{"event": "saved", "checkpoint": name} for name in attempt.promised]
        last = {"t": 1.0, "event": "ended", "decision": "continue", "why": "time limit"}
        journal.write_text("".join(json.dumps(each) + "\n" for each in [*saved, last]))
    return base


def steps(names):
    return sorted(map(checkpoint_step, names))


def assert_whole(run, expected):
    assert steps(run.checkpoint_names()) == expected
    for name in run.checkpoint_names():
        WORLD.assert_whole(run.checkpoints / name)
    found = verify_run(run.root, threads=1)
    assert [
        each for each in found if run.attempts not in each.path.parents
    ] == []  # they have no records here


def call(*words):
    return CliRunner().invoke(cli.main, ["prune", *map(str, words)])


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"keep": 1}, [40, 60]),
        ({"keep": 2}, [40, 60]),
        ({"keep": 3}, [10, 20, 30, 40, 60]),
        ({"keep": 1, "every_steps": 20}, [10, 20, 40, 60]),
        ({"keep": 1, "pinned_steps": [10]}, [10, 40, 60]),
    ],
)
def test_what_is_kept_can_be_read(run, options, left):
    plan = plan_pruning(run, **options)
    assert steps(plan.keep) == left
    assert_whole(run, [10, 20, 30, 40, 60])
    apply_pruning(run, plan)
    assert_whole(run, left)
    assert plan_pruning(run, **options).remove == ()


def test_a_damaged_newest_one_does_not_count(run):
    (shard, *_) = sorted((run.checkpoints / run.checkpoint_names()[-1]).glob("rank*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    plan = plan_pruning(run, keep=1)
    assert plan.keep[run.checkpoint_names()[-1]] == "damaged, kept for inspection"
    assert plan.keep[run.checkpoint_names()[-2]] == "newest full one"


@pytest.fixture
def unreadable(monkeypatch):
    """Parts of paths of files that the server does not give out just now."""
    parts = set()

    def read(path, **options):
        if any(part in str(path) for part in parts):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_regular(path, **options)

    for module in ("manifest", "receipt"):
        monkeypatch.setattr(f"hpc_resume.checkpoint.{module}.read_regular", read)
    return parts


def test_nothing_is_deleted_while_it_is_not_known_what_is_needed(run, unreadable):
    plan = plan_pruning(run, keep=1)
    names = run.checkpoint_names()
    unreadable.add(f"{names[-1]}/manifest.json")  # which refers to the one before it
    with pytest.raises(IntegrityError, match=r"Stale file handle.*nothing is deleted"):
        plan_pruning(run, keep=1)
    with pytest.raises(IntegrityError, match=r"Stale file handle.*nothing is deleted"):
        apply_pruning(run, plan)
    assert run.checkpoint_names() == names


def test_what_can_not_be_read_just_now_is_committed_later(run, unreadable):
    attempt = begin(WORLD, run, [])
    attempt.write(80)
    attempt.close()
    unreadable.add("/receipts/")
    with pytest.raises(IntegrityError, match="Stale file handle"):
        plan_pruning(run, keep=1)
    begin(WORLD, run, promised := []).close()
    assert promised == []
    unreadable.clear()
    begin(WORLD, run, promised).close()
    assert steps(promised) == [80]


def test_what_may_still_be_committed_keeps_what_it_refers_to(run):
    attempt = begin(WORLD, run, [])
    attempt.save(70)
    attempt.write(80)  # refers to 70, and all receipts are there
    attempt.close()
    second = begin(WORLD, RunDirectory(run.root), [])  # it commits 80
    second.save(90)
    second.write(100)
    for staging in second.stagings:
        staging.close()
    plan = plan_pruning(run, keep=1)
    assert steps(plan.keep) == [90]
    apply_pruning(run, plan)
    third = begin(WORLD, run, promised := [])
    third.close()
    assert steps(promised) == [100]
    assert_whole(run, [90, 100])


def test_a_kill_or_a_power_cut_at_any_call_of_it(origin, tmp_path):
    for at in range(1, 1000):
        base = tmp_path / str(at)
        shutil.copytree(origin, base)
        run = RunDirectory(base / "run")
        fs = Faulty(base, at=at)
        fs.sync_all()
        try:
            apply_pruning(run, plan_pruning(run, keep=1), fs=fs)
        except Killed:
            late, early = tmp_path / f"{at}-late", tmp_path / f"{at}-early"
            fs.after_power_cut(late, names_late=True)
            fs.after_power_cut(early, names_late=False)
            for folder in (base, late, early):
                run = RunDirectory(folder / "run")
                left = steps(run.checkpoint_names())
                assert_whole(run, left)
                assert left[-2:] == [40, 60]
                apply_pruning(run, plan_pruning(run, keep=1))
                assert_whole(run, [40, 60])
                assert [path for path in run.pruned.iterdir() if path.is_dir()] == []
                shutil.rmtree(folder)
        else:
            assert at > 20
            return


def test_a_plan_that_is_not_true_any_more_deletes_nothing(run):
    plan = plan_pruning(run, keep=1)
    attempt = begin(WORLD, run, [])
    attempt.save(70)
    attempt.close()
    with pytest.raises(UsageError, match="plan again"):
        apply_pruning(run, plan)
    assert_whole(run, [10, 20, 30, 40, 60, 70])


def test_a_pin_must_be_there(run):
    with pytest.raises(CheckpointNotFound, match="step 11 to pin; there are: 10, 20, 30, 40, 60"):
        plan_pruning(run, keep=1, pinned_steps=[11])


def test_the_command_plans_and_does_it_only_if_told(run):
    shown = call(run.root, "--keep", 1)
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[0] == "3 checkpoints to be deleted, 2 kept"
    assert "newest full one" in shown.stdout
    assert "nothing was deleted; do it with --apply" in shown.stderr
    assert_whole(run, [10, 20, 30, 40, 60])
    planned = json.loads(call(run.root, "--keep", 1, "--json").stdout)
    assert steps(planned["would_remove"]) == [10, 20, 30]
    shown = call(run.root, "--keep", 1, "--apply")
    assert shown.stdout.splitlines()[0] == "3 checkpoints deleted"
    assert_whole(run, [40, 60])
    assert call(run.root, "--keep", 0).exit_code == 2


def test_the_command_refuses_while_an_attempt_is_alive(run):
    attempt = begin(WORLD, run, [])
    attempt.close()
    journal = run.attempt(attempt.number) / "events.jsonl"
    journal.write_text('{"t": 99999999999.0, "event": "begun"}\n')
    shown = call(run.root, "--keep", 1, "--apply")
    assert shown.exit_code == 2
    assert "an attempt is alive" in shown.stderr
    assert_whole(run, [10, 20, 30, 40, 60])
    assert call(run.root, "--keep", 1).exit_code == 0
