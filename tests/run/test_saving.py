"""Saves on real ranks that die, fail, are slow, or come too late."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.ranks import Attempt
from tests.run.training import train


def events(run_dir, attempt, kind):
    found = read_events(run_dir / "attempts" / f"{attempt:04d}" / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def own_rank():
    return int(os.environ["SUBMITIT_LOCAL_GLOBALID"])


def within_saves(do):
    """Have ``do(header)`` called in each save of a process, and what it returns at each write in it."""
    from hpc_resume.checkpoint.staging import Staging
    from hpc_resume.files import Filesystem
    from hpc_resume.run import leaving

    leaving._HEAD_START_S = 0.5  # the dead need no time to read the last word
    write, pwrite = Staging.write, Filesystem.pwrite
    now = {}

    def write_watched(self, header, *args, **options):
        now["fault"] = do(header)
        try:
            return write(self, header, *args, **options)
        finally:
            now["fault"] = None

    def pwrite_watched(self, fd, data, offset):
        if now.get("fault") is not None:
            now["fault"](fd, data, offset)
        return pwrite(self, fd, data, offset)

    Staging.write, Filesystem.pwrite = write_watched, pwrite_watched


def die_half_way(fd, data, offset):
    os.pwrite(fd, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in_its_last_shard(steps, victim, kind="ddp"):
    within_saves(lambda header: die_half_way if header.reason == "stop" and own_rank() == victim else None)
    train(steps, step_s=0.02, kind=kind, checkpoint={"every_steps": 5, "every_s": None, "dead_after_s": 0.5})


def test_survivors_complete_a_checkpoint_from_their_replicas(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 3, dying_in_its_last_shard, 400, 1)
    attempt.wait_for_step(7)
    attempt.tell(end_time=time.time() + 60)  # not before: it would stop by its own clock
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [75, -signal.SIGKILL, 75], attempt.log.read_text()
    run = RunDirectory(run_dir)
    name, manifest = store.find(run)
    assert (manifest.reason, manifest.missing_ranks) == ("stop", (1,))
    assert [event["checkpoint"] for event in events(run_dir, 1, "saved")][-1] == name
    assert verify_run(run_dir) == []
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for folder, size in ((run_dir, 3), (copy, 2)):
        attempt = Attempt(folder, size, train, manifest.step + 2)
        assert attempt.wait() == [0] * size, attempt.log.read_text()
        (restored,) = events(folder, 2, "restored")
        assert (restored["step"], restored["checkpoint"]) == (manifest.step, name)
        assert verify_run(folder) == []


def noted(notes, rank):
    """Have what a rank has captured last lie in a file."""
    from hpc_resume.checkpoint.state import TrackedState

    capture = TrackedState.capture

    def capture_noted(self, *args):
        captured = capture(self, *args)
        if own_rank() == rank:
            torch.save({name: leaf.detach().clone() for name, leaf in captured.leaves.items()}, notes)
        return captured

    TrackedState.capture = capture_noted


def dying_leader(steps, notes, optimizer):
    noted(notes, 1)
    within_saves(lambda header: die_half_way if header.reason == "stop" and own_rank() == 0 else None)
    checkpoint = {"every_steps": 5, "every_s": None, "dead_after_s": 0.5}
    train(steps, step_s=0.02, optimizer=optimizer, checkpoint=checkpoint)


@pytest.mark.parametrize(("size", "optimizer"), [(2, "AdamW"), (3, "AdamW"), (3, "Adafactor")])
def test_survivors_complete_a_checkpoint_without_rank_0(tmp_path, size, optimizer):
    run_dir, notes = tmp_path / "run", tmp_path / "notes"
    attempt = Attempt(run_dir, size, dying_leader, 400, str(notes), optimizer)
    attempt.wait_for_step(7)
    attempt.tell(end_time=time.time() + 60)  # not before: it would stop by its own clock
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [-signal.SIGKILL, *[75] * (size - 1)], attempt.log.read_text()
    run = RunDirectory(run_dir)
    name, manifest = store.find(run)
    assert (manifest.reason, manifest.missing_ranks) == ("stop", (0,)), attempt.log.read_text()
    assert verify_run(run_dir) == []
    captured = torch.load(notes)
    with Checkpoint(run_dir) as ckpt:
        assert set(ckpt) == captured.keys()
        assert all(torch.equal(ckpt[each], captured[each]) for each in captured)
        assert ckpt.state("meta") == {"best": 0}
        assert ckpt.state("scheduler")["last_epoch"] == manifest.step
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for resumed, folder in ((size, run_dir), (1, copy)):
        attempt = Attempt(folder, resumed, continued, manifest.step + 2, optimizer)
        assert attempt.wait() == [0] * resumed, attempt.log.read_text()
        assert events(folder, 2, "restored")[0]["checkpoint"] == name
        assert verify_run(folder) == []


def continued(steps, optimizer):
    train(steps, optimizer=optimizer)


def test_a_dead_rank_whose_part_nobody_holds_is_no_checkpoint_but_kept(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, dying_in_its_last_shard, 400, 1, "fsdp")
    attempt.wait_for_step(7)
    attempt.tell(end_time=time.time() + 4)
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [75, -signal.SIGKILL], attempt.log.read_text()
    (failed,) = events(run_dir, 1, "save_failed")
    assert "the shards of ranks 1 did not come" in failed["why"]
    assert "SaveError" in attempt.log.read_text()
    run = RunDirectory(run_dir)
    older = checkpoint_step(run.checkpoint_names()[-1])
    assert older < failed["step"]
    attempt = Attempt(run_dir, 2, train_fsdp, older + 2)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert events(run_dir, 2, "restored")[0]["step"] == older
    (refused,) = events(run_dir, 2, "unfinished_checkpoint")
    assert "receipts of ranks 1 of 2 are missing" in refused["reason"]
    (folder,) = (run.attempt(1) / "unfinished").iterdir()
    assert refused["reason"] in (folder / "refused.txt").read_text()
    assert (folder / "shards" / "rank-00000-of-00002.h5").exists()
    assert verify_run(run_dir) == []


def train_fsdp(steps):
    train(steps, kind="fsdp")


def full(fd, data, offset):
    raise OSError(28, "No space left on device")


def failing(steps, *at):
    """The disk is full for rank 1 in the saves of some steps."""
    within_saves(lambda header: full if header.step in at and own_rank() == 1 else None)
    train(steps, every_steps=4)


def test_a_failed_background_save_is_reported_and_the_next_one_is_good(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, failing, 14, 4)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (failed,) = events(run_dir, 1, "save_failed")
    assert failed["step"] == 4
    assert failed["why"].startswith("rank 1 on ")
    assert "No space left on device: '" in failed["why"]  # ... and where
    assert "the checkpoint of step 4 FAILED and is not there" in attempt.log.read_text()
    assert "the last checkpoint is of step 0" in attempt.log.read_text()
    assert [event["step"] for event in events(run_dir, 1, "saved")] == [8, 12, 14]
    run = RunDirectory(run_dir)
    assert [checkpoint_step(name) for name in run.checkpoint_names()] == [8, 12, 14]
    assert list((run.attempt(1) / "staging").iterdir()) == []
    assert verify_run(run_dir) == []


def test_three_failed_saves_in_a_row_end_the_attempt_on_all_ranks(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, failing, 100_000, 8, 12, 16)
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert [event["step"] for event in events(run_dir, 1, "save_failed")] == [8, 12, 16]
    message = "SaveError: 3 checkpoints in a row were not committed, the last one of step 16: rank 1 on"
    assert message in attempt.log.read_text()  # a rank may learn it from the other one's leaving
    attempt = Attempt(run_dir, 2, train, 6)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert events(run_dir, 2, "restored")[0]["step"] == 4
    assert verify_run(run_dir) == []


def test_a_failed_last_save_is_an_error(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, failing, 6, 6)
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert "SaveError: the checkpoint of step 6 was not committed: rank 1 on" in attempt.log.read_text()
    assert [event["step"] for event in events(run_dir, 1, "saved")] == [4]
    assert events(run_dir, 1, "ended")[0]["decision"] == "continue"
    attempt = Attempt(run_dir, 2, train, 6)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert checkpoint_step(RunDirectory(run_dir).checkpoint_names()[-1]) == 6


def slow(steps, notes):
    from hpc_resume.checkpoint import arena
    from hpc_resume.checkpoint.staging import Staging

    within_saves(lambda header: lambda *_: time.sleep(0.02))
    made, write, busy = arena.Arena.__init__, Staging.write, []

    def make(self, *args, **options):
        made(self, *args, **options)
        with Path(notes).open("a") as file:
            file.write("arena\n")

    def write_alone(self, *args, **options):
        assert not busy
        busy.append(1)
        try:
            return write(self, *args, **options)
        finally:
            busy.pop()

    arena.Arena.__init__, Staging.write = make, write_alone
    train(steps, every_steps=1)


def test_a_save_that_is_due_waits_for_the_one_before(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 1, slow, 12, str(tmp_path / "notes"))
    assert attempt.wait() == [0], attempt.log.read_text()
    saved = events(run_dir, 1, "saved")
    assert [event["step"] for event in saved] == list(range(1, 13))
    assert sum(event["blocked_s"] for event in saved[1:-1]) > 0.02 * 10
    assert (tmp_path / "notes").read_text().split() == ["arena"]  # memory does not grow
    assert verify_run(run_dir) == []


def on_a_slow_disk(steps):
    """Whatever is measured, a whole save takes ten seconds."""
    from hpc_resume.policy.saving import Estimate

    def add(self, **measured):
        self.write_bytes_per_s = measured["state_bytes"] / 10

    Estimate.add = add
    train(steps, every_steps=5, step_s=0.02)


def test_with_too_little_time_only_the_model_is_saved_and_not_resumed_from(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir, 2, on_a_slow_disk, 400)
    attempt.wait_until(lambda: bool(RunDirectory(run_dir).checkpoint_names()))
    attempt.wait_for_step(8)
    attempt.tell(end_time=time.time() + 9)  # 9 s of which 6.3 are counted on: not 10, but 4
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [75, 75], attempt.log.read_text()
    run = RunDirectory(run_dir)
    names = run.checkpoint_names()
    manifest = read_manifest(run.checkpoints / names[-1])
    assert manifest.content == "model"
    assert "s were left; everything needs 10 s by measurement" in manifest.note
    assert {name.split("/")[0] for name in manifest.tensors} == {"model"}
    (said,) = [event for event in events(run_dir, 1, "saved") if event["reason"] == "stop"]
    assert (said["content"], said["note"]) == ("model", manifest.note)
    listed = CliRunner().invoke(cli.main, ["ls", str(run_dir)]).stdout
    assert "model only" in listed.splitlines()[-1]
    shown = CliRunner().invoke(cli.main, ["show", str(run_dir), "--step", str(manifest.step)]).stdout
    assert f"the model only: {manifest.note}" in shown
    newest = [name for name in names if read_manifest(run.checkpoints / name).content == "full"][-1]
    attempt = Attempt(run_dir, 2, train, checkpoint_step(newest) + 3)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (passed,) = events(run_dir, 2, "passed_over")
    assert (passed["checkpoint"], passed["why"]) == (names[-1], manifest.note)
    assert events(run_dir, 2, "restored")[0]["checkpoint"] == newest
    assert verify_run(run_dir) == []


def slow_to_save(steps, reason):
    def slow(header):
        if header.reason != reason:
            return None
        Path(os.environ["HPC_RESUME_RUN_DIR"], "saving").touch()
        return lambda *_: time.sleep(0.7)

    within_saves(slow)
    train(steps, step_s=0.02, stop={"agreement_s": 5, "watchdog_s": 1})


def test_the_watchdog_does_not_cut_a_last_save_short(tmp_path):
    attempt = Attempt(tmp_path / "run", 1, slow_to_save, 400, "stop")
    attempt.wait_for_step(3)
    attempt.signal(signal.SIGTERM)
    assert attempt.wait() == [75], attempt.log.read_text()
    (ended,) = events(tmp_path / "run", 1, "ended")
    assert "no step ended" not in ended["why"]
    assert store.find(RunDirectory(tmp_path / "run"))[1].step == ended["step"]


def test_nor_one_after_the_last_step(tmp_path):
    """There is no boundary any more at which it would stop: the run is done."""
    attempt = Attempt(tmp_path / "run", 1, slow_to_save, 20, "done")
    attempt.wait_until((tmp_path / "run" / "saving").exists)
    attempt.signal(signal.SIGTERM)
    assert attempt.wait() == [0], attempt.log.read_text()
    (ended,) = events(tmp_path / "run", 1, "ended")
    assert (ended["cause"], ended["step"]) == ("done", 20)
    assert store.find(RunDirectory(tmp_path / "run"))[1].step == 20
