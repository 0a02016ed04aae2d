"""A run goes on from an earlier step: nothing is deleted, nobody commits beside it, and what is set aside stays so."""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint import commit
from hpc_resume.checkpoint import rollback as module
from hpc_resume.checkpoint.commit import finish_earlier_commits
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.prune import apply_pruning, plan_pruning
from hpc_resume.checkpoint.rollback import apply_rollback, plan_rollback, undo_rollback
from hpc_resume.checkpoint.store import find, newest_first
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import CheckpointNotFound, FencedError, IntegrityError, SaveError, UsageError
from hpc_resume.records import check_records
from hpc_resume.report.checkpoints import find_checkpoint, list_checkpoints
from hpc_resume.rollbacks import Rollback, active_names, path_of, read_rollbacks, set_aside
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.checkpoint.faulty import Faulty, Killed
from tests.checkpoint.story import UNSYNCED, World, begin

WORLD = World(2)
WHY = "the loss went up"


def steps(names):
    return sorted(map(checkpoint_step, names))


def roll_back(run, step, **options):
    return apply_rollback(run, plan_rollback(run, step), why=WHY, clock=lambda: 1.7e9, **options)


def sound(run):
    return [each for each in verify_run(run.root, threads=1) if run.attempts not in each.path.parents] == []


def test_later_ones_stay_and_are_not_the_newest_any_more(run):
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    done = roll_back(run, 20)
    assert (done.step, done.newest_step, steps(done.set_aside), steps(done.kept)) == (
        20,
        60,
        [30, 40, 60],
        [10, 20],
    )
    assert (done.number, done.after, done.why) == (1, 2, WHY)
    assert read_rollbacks(run) == (done,)
    assert [manifest.step for _, manifest in newest_first(run)] == [20, 10]
    assert steps(run.checkpoint_names()) == [10, 20, 30, 40, 60]
    assert {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")} == before
    assert run.attempt_numbers() == [1, 2]  # the attempt that stood for it has left nothing
    assert find(run)[1].step == 20
    assert find(run, 60)[1].step == 60  # it can still be looked at
    assert find_checkpoint(run.root, None)[1].step == 20
    with Checkpoint(run.root) as newest, Checkpoint(run.root, step=40) as later:
        assert (newest.step, later.step) == (20, 40)
    marked = {each.step: each.set_aside for each in list_checkpoints(run.root)}
    assert marked[20] is None
    assert marked[60].startswith("rolled back from step 60 to step 20 by ")
    shown = CliRunner().invoke(cli.main, ["show", str(run.root), "--step", "60"])
    assert "set aside: rolled back from step 60 to step 20 by " in shown.stdout
    assert "set aside" not in CliRunner().invoke(cli.main, ["show", str(run.root)]).stdout
    assert sound(run)


def test_a_step_that_is_done_again_stands_beside_the_one_that_is_set_aside(run):
    old = run.checkpoint_names()[2]
    roll_back(run, 20)
    attempt = begin(WORLD, run, promised := [])
    for step in (30, 40):
        attempt.save(step)
    attempt.close()
    assert steps(run.checkpoint_names()) == [10, 20, 30, 30, 40, 40, 60]
    assert old not in promised  # it is another attempt's, and so is its content id
    assert steps(active_names(run)) == [10, 20, 30, 40]
    assert next(iter(newest_first(run)))[0] == promised[-1]
    assert read_manifest(run.checkpoints / promised[-1]).parent == promised[0]
    assert find(run, 30)[0] == promised[0]
    assert sound(run)


def test_a_second_rollback_and_what_it_sets_aside(run):
    roll_back(run, 30)
    attempt = begin(WORLD, run, [])
    attempt.save(50)
    attempt.close()
    second = roll_back(run, 10)
    assert (second.number, second.after, steps(second.set_aside)) == (2, 3, [20, 30, 50])
    assert steps(active_names(run)) == [10]
    assert {each.number for each in set_aside(run).values()} == {1, 2}


def test_undoing_it_and_when_it_is_too_late(run):
    with pytest.raises(UsageError, match="no rollback to undo"):
        undo_rollback(run, why=WHY)
    roll_back(run, 20)
    undone = undo_rollback(run, why="a mistake", fs=UNSYNCED)
    assert (undone.number, undone.undoes, undone.set_aside) == (2, 1, ())
    assert steps(active_names(run)) == [10, 20, 30, 40, 60]
    roll_back(run, 40)
    attempt = begin(WORLD, run, [])
    attempt.save(50)
    attempt.close()
    with pytest.raises(UsageError, match=r"was committed since the rollback to step 40.*fork .* --at 60"):
        undo_rollback(run, why=WHY)
    assert steps(active_names(run)) == [10, 20, 30, 40, 50]
    assert list(check_records(run)) == []


def test_what_can_not_be_gone_on_from(run):
    with pytest.raises(
        CheckpointNotFound, match="no full checkpoint of step 25 to go on from; there are: 10, 20, 30"
    ):
        plan_rollback(run, 25)
    with pytest.raises(UsageError, match="goes on from anyway"):
        plan_rollback(run, 60)
    with pytest.raises(UsageError, match="give the reason"):
        apply_rollback(run, plan_rollback(run, 20), why="  ")
    shard = next((run.checkpoints / run.checkpoint_names()[1]).glob("rank*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="roll back to an older step"):
        plan_rollback(run, 20)
    assert read_rollbacks(run) == ()
    with pytest.raises(CheckpointNotFound, match="no run directory"):
        plan_rollback(RunDirectory(run.root / "nix"), 20)


def test_an_attempt_that_still_runs_can_commit_nothing_after_it(run):
    alive = begin(WORLD, run, [])
    alive.save(70)
    alive.write(80)  # all is there but the commit
    roll_back(run, 20)
    assert steps(active_names(run)) == [10, 20]  # 80 was committed in its stead, and set aside
    assert steps(run.checkpoint_names()) == [10, 20, 30, 40, 60, 70, 80]
    with pytest.raises(FencedError):
        alive.write(90)
    alive.close()
    following = begin(WORLD, run, promised := [])
    following.close()
    assert promised == []
    assert steps(active_names(run)) == [10, 20]


def test_an_attempt_that_begins_meanwhile_wins(run, monkeypatch):
    plan = plan_rollback(run, 20)
    finish = finish_earlier_commits

    def begin_meanwhile(*args, **options):
        finish(*args, **options)
        begin(WORLD, run, []).close()

    monkeypatch.setattr(module, "finish_earlier_commits", begin_meanwhile)
    with pytest.raises(FencedError, match="nothing was rolled back"):
        apply_rollback(run, plan, why=WHY)
    assert read_rollbacks(run) == ()
    assert steps(active_names(run)) == [10, 20, 30, 40, 60]
    assert run.attempt_numbers() == [1, 2, 3, 4]  # no gap
    assert list(check_records(run)) == []


def test_what_may_be_committed_later_keeps_it_from_being_rolled_back(run, monkeypatch):
    attempt = begin(WORLD, run, [])
    attempt.write(70)
    attempt.close()
    plan = plan_rollback(run, 20)
    monkeypatch.setattr(module, "finish_earlier_commits", lambda *_, **__: ([], ["the filesystem refused"]))
    with pytest.raises(SaveError, match="can't be committed now"):
        apply_rollback(run, plan, why=WHY)
    assert read_rollbacks(run) == ()


def test_a_kill_or_a_power_cut_at_any_call_of_it(origin, tmp_path):
    for at in range(1, 1000):
        base = tmp_path / str(at)
        shutil.copytree(origin, base)
        run = RunDirectory(base / "run")
        fs = Faulty(base, at=at)
        fs.sync_all()
        try:
            roll_back(run, 20, fs=fs)
        except Killed:
            late, early = tmp_path / f"{at}-late", tmp_path / f"{at}-early"
            fs.after_power_cut(late, names_late=True)
            fs.after_power_cut(early, names_late=False)
            for folder in (base, late, early):
                run = RunDirectory(folder / "run")
                assert steps(run.checkpoint_names()) == [10, 20, 30, 40, 60]
                assert steps(active_names(run)) in ([10, 20], [10, 20, 30, 40, 60])
                begin(WORLD, run, []).close()
                assert list(check_records(run)) == []
                shutil.rmtree(folder)
        else:
            assert at > 10
            return


def test_pruning_keeps_what_is_set_aside_unless_it_is_told_not_to(run):
    roll_back(run, 30)
    plan = plan_pruning(run, keep=1)
    kept = {checkpoint_step(name): why for name, why in plan.keep.items()}
    assert kept == {
        10: f"{run.checkpoint_names()[2]} refers to it",
        20: f"{run.checkpoint_names()[2]} refers to it",
        30: "newest full one",
        40: "set aside by a rollback",
        60: "set aside by a rollback",
    }
    apply_pruning(run, plan)
    assert sound(run)
    plan = plan_pruning(run, keep=1, every_steps=20, drop_set_aside=True)
    assert steps(plan.remove) == [40, 60]  # multiples, too
    apply_pruning(run, plan)
    assert steps(run.checkpoint_names()) == [10, 20, 30]
    assert sound(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes().replace(b"loss", b"lost")),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_bytes(read_as(path, number=3)),
        lambda path: path.write_bytes(read_as(path, to="../../etc")),
        lambda path: path.write_bytes(read_as(path, set_aside=["x"])),
        lambda path: path.write_bytes(read_as(path, set_aside=[])),
        lambda path: path.write_bytes(read_as(path, undoes=1)),
        lambda path: path.write_bytes(read_as(path, when=True)),
        lambda path: path.write_bytes(read_as(path, schema=2)),
    ],
)
def test_a_damaged_record_stops_everything_that_asks_for_the_newest(run, damage):
    roll_back(run, 40)
    roll_back(run, 20)
    path = path_of(run, 1)
    data = path.read_bytes()
    damage(path)
    if read_ok(run):  # of the same meaning
        assert steps(set_aside(run)) == [30, 40]
        return
    for ask in (
        find,
        active_names,
        lambda run: plan_pruning(run, keep=1),
        lambda run: plan_rollback(run, 10),
    ):
        with pytest.raises(IntegrityError, match=r"rollbacks.*0001\.json"):
            ask(run)
    assert any("rollbacks" in str(each.path) for each in verify_run(run.root, threads=1))
    if path.is_dir():
        path.rmdir()
    path.write_bytes(data)
    assert list(check_records(run)) == []


def read_as(path, **fields):
    """The record with other fields, sealed as whoever made it up would."""
    from hpc_resume.rundir import sealed

    record = {**json.loads(path.read_bytes()), **fields}
    return sealed({key: value for key, value in record.items() if key != "digest"})


def read_ok(run):
    try:
        read_rollbacks(run)
    except IntegrityError:
        return False
    return True


def test_its_sentence():
    done = Rollback(
        number=1, to="0000000020-0123abcd", set_aside=("0000000060-0123abcd",), kept=(), after=2, why=WHY,
        who="ada on n1", when=0.0,
    )  # fmt: skip
    assert done.sentence == "rolled back from step 60 to step 20 by ada on n1: the loss went up"


def test_a_name_that_is_taken_by_another_content_is_no_commit(run, monkeypatch):
    """Names hold eight digits of the content id: once in four billion redone steps they are the same."""

    class Taken(type(UNSYNCED)):
        def rename(self, source, target):
            super().rename(source, target)
            if target.parent.name == "checkpoints":
                raise FileExistsError(17, "File exists", str(target))

    attempt = begin(WORLD, run, [], fs=Taken())
    attempt.save(70)
    assert steps(attempt.promised) == [70]  # it is the same: renamed, and the answer was lost
    monkeypatch.setattr(commit, "read_manifest", lambda _: SimpleNamespace(content_id="0" * 32, attempt=0))
    attempt.write(80)
    with pytest.raises(IntegrityError, match="is there already, with another content"):
        attempt.commit(80)
    attempt.close()
