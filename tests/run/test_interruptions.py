"""A run on real ranks, interrupted in every way that a test can play without a scheduler."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.dtypes import torch_dtype
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.shardfile import ShardFile
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from hpc_resume.run.metrics import Metrics
from hpc_resume.run.saving import Saver
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt
from tests.run.training import GLOBAL_BATCH, train


def events(run_dir, attempt, kind=None):
    found = read_events(run_dir / "attempts" / f"{attempt:04d}" / "events.jsonl")
    return [event for event in found if kind is None or event["event"] == kind]


def ended(run_dir, attempt):
    (event,) = events(run_dir, attempt, "ended")
    return event


def tensors(run_dir):
    """All tensors of the newest checkpoint, every rank's generators included."""
    run = RunDirectory(run_dir)
    name, manifest = store.find(run)
    found = {}
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        for key, record in manifest.tensors.items():
            found[key] = torch.empty(record.shape, dtype=torch_dtype(record.dtype))
            reader.read(key, Box.whole(record.shape), found[key])
        for rank in range(manifest.world_size):
            own = reader.private(rank, f"ranks/{rank:05d}/")
            found.update({f"{rank}/{key}": tensor for key, tensor in own.items() if "rng" in key})
    return manifest, found


def samples_by_step(run_dir):
    """Samples of each step over all ranks, in order; a step done twice counts by its last attempt."""
    steps = {}
    for path in sorted(run_dir.glob("samples-*.txt")):
        _, attempt, rank = path.stem.split("-")
        for line in path.read_text().splitlines():
            step, *indices = map(int, line.split())
            steps.setdefault(step, {}).setdefault(int(attempt), {})[int(rank)] = indices
    return {
        step: [index for _, part in sorted(attempts[max(attempts)].items()) for index in part]
        for step, attempts in sorted(steps.items())
    }


def losses(run_dir):
    found = {}
    for path in sorted(run_dir.glob("attempts/*/metrics-rank-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], {}).setdefault(path.parent.name, []).append(row["loss"])
    return np.array([np.mean(by[max(by)]) for _, by in sorted(found.items())])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same training without interruptions, on 2 ranks."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    attempt = Attempt(run_dir, 2, train, 40)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    return run_dir


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, kind):
    if kind == "fsdp":
        uninterrupted = tmp_path / "whole"
        assert Attempt(uninterrupted, 2, train_fsdp).wait() == [0, 0]
    run_dir = tmp_path / "run"
    for at in (7, 20):
        attempt = Attempt(run_dir, 2, train_slowly if kind == "ddp" else train_fsdp_slowly, 40)
        attempt.tell(end_time=time.time() + 3600)
        attempt.wait_for_step(at)
        attempt.signal(signal.SIGUSR2)
        assert attempt.wait() == [75, 75], attempt.log.read_text()
    assert Attempt(run_dir, 2, train if kind == "ddp" else train_fsdp, 40).wait() == [0, 0]
    one, expected = tensors(uninterrupted)
    two, found = tensors(run_dir)
    assert one.step == two.step == 40
    assert one.samples == two.samples == 40 * GLOBAL_BATCH
    assert one.objects == two.objects
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert samples_by_step(uninterrupted) == samples_by_step(run_dir)
    assert np.array_equal(losses(uninterrupted), losses(run_dir))
    assert verify_run(run_dir) == []


def train_fsdp(steps=40):
    train(steps, kind="fsdp")


def train_slowly(steps=40):
    train(steps, step_s=0.02)


def train_fsdp_slowly(steps=40):
    train(steps, step_s=0.02, kind="fsdp")


def test_other_numbers_of_ranks_see_the_same_batches_and_nearly_the_same_losses(tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert Attempt(whole, 2, train_fsdp).wait() == [0, 0]
    for size, at in ((2, 8), (1, 16), (3, 24)):
        attempt = Attempt(run_dir, size, train_fsdp_slowly, 40)
        attempt.wait_for_step(at)
        attempt.signal(signal.SIGTERM)
        assert attempt.wait() == [75] * size, attempt.log.read_text()
    assert Attempt(run_dir, 4, train_fsdp_slowly, 40).wait() == [0] * 4
    assert samples_by_step(whole) == samples_by_step(run_dir)
    # Sums over ranks are rounded in another order; 40 steps of AdamW let that grow a little.
    assert np.allclose(losses(whole), losses(run_dir), rtol=1e-4, atol=0)
    assert [ended(run_dir, n)["cause"] for n in (1, 2, 3, 4)] == ["signal"] * 3 + ["done"]


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path):
    attempt = Attempt(tmp_path / "run", 3, train_slowly, 400)
    attempt.tell(preempt_time=time.time())
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGTERM, ranks=[2])
    assert attempt.wait() == [75] * 3, attempt.log.read_text()
    (asked,) = events(tmp_path / "run", 1, "stop_requested")
    assert (asked["rank"], asked["cause"]) == (2, "preemption")
    last = ended(tmp_path / "run", 1)
    assert last["step"] == store.find(RunDirectory(tmp_path / "run"))[1].step
    assert max(samples_by_step(tmp_path / "run")) + 1 == last["step"]


def test_a_cancel_saves_and_is_not_continued(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_slowly, 400)
    attempt.wait_for_step(5)
    attempt.tell(state="COMPLETING")
    attempt.signal(signal.SIGTERM)
    assert attempt.wait() == [1, 1]
    last = ended(tmp_path / "run", 1)
    assert (last["cause"], last["decision"]) == ("cancel", "stop")
    assert store.find(RunDirectory(tmp_path / "run"))[1].step == last["step"]


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_any_rank_leaves_a_run_that_continues(tmp_path, victim):
    run_dir = tmp_path / "run"
    chance = random.Random(victim)
    committed = 0
    for turn in range(4):
        attempt = Attempt(run_dir, 2, train_often, 100_000, job=f"job-{turn}")
        attempt.wait_until(lambda number=turn + 1: committing_attempt(run_dir) == number)
        time.sleep(chance.random() * 0.05)  # anywhere in a step or a save
        attempt.signal(signal.SIGKILL, ranks=[victim])
        time.sleep(0.03)
        attempt.signal(signal.SIGTERM, ranks=[1 - victim])  # as srun -K and the embedded scheduler do
        codes = attempt.wait()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 75, attempt.log.read_text()  # the other one asks to be continued
        assert verify_run(run_dir) == []
        assert committed_step(run_dir) >= committed
        committed = committed_step(run_dir)
    attempt = Attempt(run_dir, 2, train_often, committed + 3, job="job-last")
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (restored,) = events(run_dir, 5, "restored")
    assert restored["step"] >= committed


def train_often(steps):
    train(steps, every_steps=2, stop={"agreement_s": 2, "watchdog_s": 2})


def committed_step(run_dir):
    names = RunDirectory(run_dir).checkpoint_names()
    return int(names[-1].split("-")[0]) if names else 0


def committing_attempt(run_dir):
    """Which attempt has committed the newest checkpoint: each begins with finishing what the one before has left."""
    run = RunDirectory(run_dir)
    names = run.checkpoint_names()
    return read_manifest(run.checkpoints / names[-1]).attempt if names else 0


def test_two_owners_never_publish_in_one_run(tmp_path):
    run_dir = tmp_path / "run"
    old = Attempt(run_dir, 1, train_often_slowly, 100_000)
    old.wait_until(lambda: bool(committed_step(run_dir)))
    new = Attempt(run_dir, 1, train_often_slowly, 100_000, job="job-2")
    assert old.wait() == [1], old.log.read_text()
    assert "attempt 2 has begun" in old.log.read_text()
    new.wait_until(lambda: events(run_dir, 2, "restored"))
    new.signal(signal.SIGUSR2)
    assert new.wait() == [75]
    run = RunDirectory(run_dir)
    manifests = [manifest for _, manifest in store.newest_first(run)]
    begun = events(run_dir, 2, "restored")[0]["step"]
    assert all(m.attempt == 2 for m in manifests if m.step > begun)
    assert verify_run(run_dir) == []


def train_often_slowly(steps):
    train(steps, every_steps=2, step_s=0.02)


def test_damage_is_quarantined_and_the_older_checkpoint_serves(tmp_path):
    run_dir = tmp_path / "run"
    assert Attempt(run_dir, 2, train_often, 10).wait() == [0, 0]
    run = RunDirectory(run_dir)
    names = run.checkpoint_names()
    shard = run.checkpoints / names[-1] / "rank-00001-of-00002.h5"
    flip_in_tensor(shard, run.checkpoints / names[-1])
    manifest = run.checkpoints / names[-2] / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"samples"', b'"sampels"'))
    assert {finding.path for finding in verify_run(run_dir)} == {shard, manifest}
    attempt = Attempt(run_dir, 2, train_often, 12)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    aside = events(run_dir, 2, "quarantined")
    assert [event["checkpoint"] for event in aside] == [names[-1], names[-2]]
    assert "xxh3 differs" in aside[0]["reason"]
    assert events(run_dir, 2, "restored")[0]["checkpoint"] == names[-3]
    assert len(list(run.quarantine.glob("*.json"))) == 2
    assert verify_run(run_dir) == []


def flip_in_tensor(shard, folder):
    file = ShardFile.open(folder, read_manifest(folder), int(shard.name.split("-")[1]))
    entry = next(entry for entry in file.index.entries if not entry.name.startswith("ranks/"))
    file.close()
    data = bytearray(shard.read_bytes())
    data[entry.runs[0].offset + entry.length // 2] ^= 1
    shard.write_bytes(data)


def test_without_any_whole_checkpoint_the_run_stops_instead_of_starting_over(tmp_path):
    run_dir = tmp_path / "run"
    assert Attempt(run_dir, 1, train, 4).wait() == [0]
    for path in run_dir.glob("checkpoints/*/rank*"):
        os.truncate(path, path.stat().st_size - 1)
    attempt = Attempt(run_dir, 1, train, 8)
    assert attempt.wait() == [4]
    assert "no checkpoint is whole any more" in attempt.log.read_text()


def train_with_a_mistake(steps, fail_at):
    train(steps, fail_at=fail_at)


def test_an_exception_before_the_first_step_is_not_repeated(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_with_a_mistake, 10, 0)
    assert attempt.wait() == [1, 1]
    assert "ValueError: something in the script" in ended(tmp_path / "run", 1)["why"]


def train_on_a_gpu_that_fails(steps):
    Metrics.flush = lambda _: (_ for _ in ()).throw(RuntimeError("CUDA error: unspecified launch failure"))
    Metrics.maybe_flush = lambda _: None  # nor does it fail before, where steps take long
    train(steps, fail_at=3)


def test_a_crash_has_its_last_word_though_metrics_can_not_be_read_any_more(tmp_path):
    attempt = Attempt(tmp_path / "run", 1, train_on_a_gpu_that_fails, 10)
    assert attempt.wait() == [75]
    assert "ValueError: something in the script" in ended(tmp_path / "run", 1)["why"]


def train_with_a_mistake_on_rank_1(steps, fail_at):
    train(steps, fail_at=fail_at if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1" else None)


def test_the_last_word_names_the_rank_that_was_wrong(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_with_a_mistake_on_rank_1, 10, 0)
    assert attempt.wait() == [1, 1], attempt.log.read_text()
    last = ended(tmp_path / "run", 1)
    node = os.uname().nodename
    assert last["evidence"].startswith(f"rank 1 on {node}: ValueError: something in the script; rank 0: ")
    assert (last["cause"], last["nodes"], last["decision"]) == ("crash", [node], "stop")


def test_when_the_budget_is_spent_no_rank_asks_to_be_continued(tmp_path):
    attempts = [Attempt(tmp_path / "run", 2, train_with_a_mistake_on_rank_1, 10, 3).wait() for _ in range(3)]
    assert attempts == [[75, 75], [75, 75], [1, 1]]
    last = ended(tmp_path / "run", 3)
    assert (last["cause"], last["decision"]) == ("crash", "stop")
    assert "no progress in 3 attempts in a row (budget.max_idle)" in last["because"]


def test_a_run_that_makes_no_progress_stops_with_a_clear_last_word(tmp_path):
    codes = [Attempt(tmp_path / "run", 1, train_with_a_mistake, 10, 3).wait()[0] for _ in range(3)]
    assert codes == [75, 75, 1]
    last = ended(tmp_path / "run", 3)
    assert (last["cause"], last["decision"]) == ("crash", "stop")
    assert "no progress in 3 attempts in a row" in last["why"]
    # The scheduler may restart it all the same (a node failure): it refuses at once.
    attempt = Attempt(tmp_path / "run", 1, train, 10)
    assert attempt.wait() == [1]
    assert "no progress in 3 attempts in a row" in attempt.log.read_text()
    assert ended(tmp_path / "run", 4)["cause"] == "no_progress"
    # A person who submits it anew is another job.
    assert Attempt(tmp_path / "run", 1, train, 10, job="job-2").wait() == [0]


def train_with_a_rank_that_is_slow_to_leave(steps):
    settle = Saver._settle
    if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "1":
        Saver._settle = lambda saver, step, **how: (time.sleep(1), settle(saver, step, **how))
    train(steps)


def test_rank_0_stays_until_all_ranks_know_that_the_run_is_done(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_with_a_rank_that_is_slow_to_leave, 5)
    assert attempt.wait() == [0, 0], attempt.log.read_text()


def train_that_hangs(steps, hang_at):
    train(steps, hang_at=hang_at, stop={"agreement_s": 5, "watchdog_s": 1}, checkpoint={"every_steps": 2})


def test_the_watchdog_leaves_when_no_step_boundary_comes(tmp_path):
    attempt = Attempt(tmp_path / "run", 1, train_that_hangs, 10, 5)
    attempt.wait_for_step(5)
    attempt.signal(signal.SIGUSR1)
    assert attempt.wait(20) == [75]
    last = ended(tmp_path / "run", 1)
    assert "no step ended within 1 s" in last["why"]
    assert committed_step(tmp_path / "run") == 4


def catches(pid, number):
    """Whether a process has a handler for a signal; before that, it would die of it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_before_the_first_step_is_not_lost(tmp_path):
    attempt = Attempt(tmp_path / "run", 2, train_slowly, 1000)
    attempt.wait_until((tmp_path / "run" / "attempts" / "0001").exists)
    attempt.wait_until(lambda: all(catches(process.pid, signal.SIGUSR2) for process in attempt.processes))
    attempt.signal(signal.SIGUSR2)
    assert attempt.wait() == [75, 75]


def test_an_attempt_that_died_before_its_commit_is_finished_by_the_next(tmp_path):
    run_dir = tmp_path / "run"
    assert -signal.SIGKILL in Attempt(run_dir, 2, dying_before_commit, 6).wait()
    assert RunDirectory(run_dir).checkpoint_names() == []
    attempt = Attempt(run_dir, 1, train, 8)
    assert attempt.wait() == [0], attempt.log.read_text()
    (finished,) = events(run_dir, 2, "finished_commit")
    assert finished["checkpoint"].startswith("0000000004-")
    assert events(run_dir, 2, "restored")[0]["step"] == 4


def dying_before_commit(steps):
    from hpc_resume.checkpoint.staging import Staging

    def die(self, step, **_):
        os.kill(os.getpid(), signal.SIGKILL)  # all receipts are there: this rank was the last

    Staging.commit = die
    train(steps, every_steps=4)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.run.training import train
train(12, run_dir={run_dir!r})
"""


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_the_same_script_under_other_launchers(tmp_path, launcher):
    root = Path(__file__).parents[2]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=str(root), run_dir=str(tmp_path / "run")))
    words = [sys.executable, str(script)]
    if launcher == "torchrun":
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
        ]
    subprocess.run(words, check=True, timeout=300, capture_output=True)
    _, manifest = store.find(RunDirectory(tmp_path / "run"))
    assert (manifest.step, manifest.world_size) == (12, 2 if launcher == "torchrun" else 1)
