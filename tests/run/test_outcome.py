"""What becomes of a checkpoint: ranks of one process, a store in memory, a clock of the test's own."""

import datetime as dt
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.errors import FencedError, RendezvousError
from hpc_resume.policy.saving import patience_s
from hpc_resume.run.outcome import Outcomes, Part
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.environment import JobEnvironment
from tests.checkpoint.story import World, begin


class Gone(dist.Store):
    """The connection of a rank whose rank 0 has died."""

    def _gone(self, *_):
        raise RuntimeError("Connection reset by peer")

    wait = get = set = add = check = compare_set = _gone


class Impatient(dist.Store):
    """A store in memory whose waits end at once, and cost the test's clock what they should."""

    def __init__(self, inner, clock):
        super().__init__()
        self.inner, self.clock = inner, clock

    def wait(self, keys, timeout):
        if not self.inner.check(keys):
            self.clock.pause(timeout / dt.timedelta(seconds=1))
            raise RuntimeError("wait timeout")

    def __getattribute__(self, name):
        if name in {"get", "set", "add", "check", "compare_set"}:
            return getattr(self.inner, name)
        return super().__getattribute__(name)


class Clock:
    def __init__(self):
        self.now = 1000.0
        self.passing = lambda: None

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.now += seconds
        self.passing()


class RealClock:
    def __call__(self):
        return time.monotonic()

    def pause(self, seconds):
        time.sleep(seconds)


class Ranks:
    """Some ranks at their last save."""

    def __init__(self, root, world, *, store=None, clock=None, dead_after_s=30.0):
        self.world = world
        self.attempt = begin(world, RunDirectory(root / "run"), [])
        self.store = store or dist.HashStore()
        self.clock = clock or Clock()
        self.dead_after_s = dead_after_s
        self.parts = {}
        self.knowing = set()  # ranks that know of a failed one

    def outcomes(self, rank):
        def failed():
            return rank in self.knowing

        words = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "1",
            "SUBMITIT_LOCAL_NTASKS": str(self.world.size),
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }
        environment = JobEnvironment.detect(words, hostname=f"gpu{rank}", pid=1)
        store = self.store if isinstance(self.store, Gone) else Impatient(self.store, self.clock)
        peers = Peers(environment, store, None, "x")
        peers.store = store
        return Outcomes(
            peers,
            peers,
            self.attempt.stagings[rank],
            environment,
            dead_after_s=self.dead_after_s,
            threads=1,
            failed=failed,
            monotonic=self.clock,
            pause=self.clock.pause,
        )

    def write(self, step, ranks, *, count_in=True):
        self.attempt.write(step, ranks)
        for rank in ranks:
            header = self.world.header(self.attempt.run, self.attempt.number, step)
            part = Part(
                number=0, details={}, header=header, captured=self.world.captured(rank, step), own_s=2.0
            )
            part.done_s = self.clock()
            part.began_s = part.done_s - part.own_s
            self.parts[rank] = part
            if count_in:
                self.outcomes(rank).count_in(step, part)

    def wait(self, rank, step=10, **options):
        return self.outcomes(rank).wait(step, self.parts[rank], **options)

    def manifest(self):
        (name,) = self.attempt.run.checkpoint_names()
        assert self.world.assert_whole(self.attempt.run.checkpoints / name) == 10
        return name, read_manifest(self.attempt.run.checkpoints / name)


@pytest.fixture
def replicas(tmp_path):
    return Ranks(tmp_path, World(3, replicated=True))


def test_the_last_to_count_in_commits_and_all_hear_of_it(replicas):
    replicas.write(10, [0, 1, 2])
    name, manifest = replicas.manifest()
    assert manifest.missing_ranks == ()
    for rank in range(3):
        assert replicas.outcomes(rank).known(replicas.parts[rank])
        assert replicas.wait(rank) == {"name": name, "took_s": 2.0}
    assert replicas.clock.now == 1000.0


def test_a_dead_rank_is_stood_in_for_by_one_other(replicas):
    replicas.write(10, [0, 1])
    assert replicas.wait(0, last=True) == replicas.wait(1, last=True)
    name, manifest = replicas.manifest()
    assert manifest.missing_ranks == (2,)
    assert [shard.file for shard in manifest.shards][2] == "rank-00002-of-00003.by-00000.h5"
    assert 1030 < replicas.clock.now < 1060
    assert json.loads(replicas.store.get("committed/0"))["name"] == name


def test_the_next_one_stands_in_if_that_has_not_helped(replicas):
    replicas.write(10, [0, 1])  # rank 0 dies after its receipt
    replicas.wait(1, last=True)
    _, manifest = replicas.manifest()
    assert [shard.file for shard in manifest.shards][2] == "rank-00002-of-00003.by-00001.h5"
    assert 1060 < replicas.clock.now < 1090


def test_rank_0_and_the_store_are_gone(tmp_path):
    ranks = Ranks(tmp_path, World(3, replicated=True), store=Gone())
    ranks.write(10, [1, 2])
    outcome = ranks.wait(1, last=True)
    name, manifest = ranks.manifest()
    assert outcome["name"] == name == ranks.wait(2, last=True)["name"]
    assert manifest.missing_ranks == (0,)
    assert manifest.objects == {"step": 10}


def test_the_one_that_counted_in_last_died_before_its_commit(replicas):
    replicas.write(10, [0, 1, 2], count_in=False)
    replicas.store.add("receipts/0", 3)
    outcomes = {replicas.wait(rank)["name"] for rank in (1, 2)}
    assert outcomes == {replicas.manifest()[0]}
    assert replicas.clock.now < 1030  # nothing is missing, so nobody need be counted as dead


def test_a_commit_that_was_begun_by_a_dead_rank_is_taken_over(replicas):
    replicas.write(10, [0, 1, 2], count_in=False)
    folder = replicas.attempt.stagings[0].folder(10)
    (folder / "shards").rename(folder / "sealed-0123abcd")  # and then it was killed
    assert replicas.wait(1)["name"] == replicas.manifest()[0]
    assert replicas.clock.now > 1030


def test_what_nobody_else_holds_is_given_up_in_time_and_kept(tmp_path):
    ranks = Ranks(tmp_path, World(2))
    ranks.write(10, [0])
    outcome = ranks.wait(0, last=True, left_s=100.0)
    assert "the shards of ranks 1 did not come within 70 s" in outcome["error"]
    assert ranks.clock.now < 1100
    assert ranks.attempt.run.checkpoint_names() == []
    assert len(list(ranks.attempt.stagings[0].folder(10).glob("shards/*.h5"))) == 1


def test_in_the_background_a_slow_rank_is_waited_for(tmp_path):
    ranks = Ranks(tmp_path, World(2))
    ranks.write(10, [0])

    def eight_minutes_later():
        if ranks.clock.now > 1000 + 480 and 1 not in ranks.parts:
            ranks.write(10, [1])

    ranks.clock.passing = eight_minutes_later
    assert ranks.wait(0)["name"] == ranks.manifest()[0]
    assert 1480 < ranks.clock.now < 1580


@pytest.mark.parametrize(("own_s", "patience"), [(2.0, 600), (100.0, 1120)])
def test_in_the_background_a_rank_that_takes_ten_times_as_long_is_given_up(tmp_path, own_s, patience):
    """It may be dead, on a node of its own; if it is not, training goes on without this one checkpoint."""
    ranks = Ranks(tmp_path, World(2))
    ranks.write(10, [0])
    ranks.parts[0].own_s = own_s
    assert f"the shards of ranks 1 did not come within {patience} s" in ranks.wait(0)["error"]
    assert ranks.clock.now < 1000 + 1.3 * patience


def test_who_says_first_what_has_become_of_it_decides_for_all(replicas):
    replicas.write(10, [0, 1])
    part = Part(number=0, details={})
    replicas.outcomes(2).fail(part, OSError(28, "No space left on device", "/scratch/x.h5"))
    replicas.outcomes(1).fail(replicas.parts[1], ValueError("second"))
    answers = [replicas.wait(rank, last=True) for rank in (0, 1)]
    message = "rank 2 on gpu2: [Errno 28] No space left on device: '/scratch/x.h5'"
    assert answers == [{"error": message}] * 2
    replicas.write(10, [2], count_in=False)
    replicas.store.add("receipts/0", -2)
    assert replicas.wait(2, last=True) == {"error": message}


def test_a_failure_after_the_commit_changes_nothing(replicas):
    replicas.write(10, [0, 1, 2])
    replicas.outcomes(2).fail(replicas.parts[2], OSError("too late"))
    assert replicas.wait(0)["name"] == replicas.manifest()[0]


def test_in_the_background_a_run_without_rank_0_is_not_waited_for(tmp_path):
    ranks = Ranks(tmp_path, World(2), store=Gone())
    ranks.write(10, [1])
    with pytest.raises(RendezvousError, match="rank 0 is gone"):
        ranks.wait(1)


def test_in_the_background_a_rank_that_is_known_to_have_failed_is_not_waited_for(tmp_path):
    ranks = Ranks(tmp_path, World(2))
    ranks.write(10, [0])
    ranks.clock.passing = lambda: ranks.clock.now > 1015 and ranks.knowing.add(0)
    with pytest.raises(RendezvousError, match="a rank has failed, and the shards of ranks 1 of step 10"):
        ranks.wait(0)
    assert 1015 < ranks.clock.now < 1025


@pytest.mark.parametrize("store", [None, Gone()])
def test_before_it_leaves_a_rank_does_not_wait_for_what_nobody_can_finish(tmp_path, store):
    """Written in the background, so that the live state has moved on; the time belongs to the save that follows."""
    ranks = Ranks(tmp_path, World(2, replicated=True), store=store)
    ranks.write(10, [1])
    ranks.parts[1].captured = ranks.parts[1].header = None
    ranks.knowing.add(1)
    outcome = ranks.wait(1, last=True, left_s=60.0)
    why = "a rank has failed" if store is None else "rank 0 is gone"
    assert outcome == {"error": f"{why}, and the shards of ranks 0 of step 10 have not come"}
    assert ranks.clock.now < 1010


def test_what_a_failed_rank_has_written_is_committed_nevertheless(tmp_path):
    ranks = Ranks(tmp_path, World(2))
    ranks.knowing.add(0)
    ranks.write(10, [0])
    ranks.write(10, [1], count_in=False)
    assert ranks.wait(0)["name"] == ranks.manifest()[0]


def test_a_fenced_rank_hears_of_it(replicas):
    replicas.write(10, [0, 1])
    begin(replicas.world, replicas.attempt.run, [])
    with pytest.raises(FencedError, match="attempt 2 has begun"):
        replicas.wait(0, last=True)


def test_without_rank_0_a_commit_that_another_rank_has_begun_is_waited_for(tmp_path):
    ranks = Ranks(tmp_path, World(3), store=Gone())
    ranks.write(10, [0, 1, 2])
    begun = ranks.attempt.stagings[1].commit

    def commit(step, *, take_over):
        assert ranks.clock.now < 1100
        return begun(step) if take_over else None

    ranks.attempt.stagings[2].commit = commit
    assert ranks.wait(2)["name"] == ranks.manifest()[0]
    assert ranks.clock.now > 1030


def test_all_survivors_at_once(tmp_path):
    """Real threads and the real clock: whoever is first commits, and all say the same."""
    ranks = Ranks(tmp_path, World(4, replicated=True), clock=RealClock(), dead_after_s=3.0)
    ranks.write(10, [0, 1, 2])
    for part in ranks.parts.values():
        part.done_s -= 3.1  # all see at once that rank 3 is dead, and two of them that rank 0 has not helped
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda rank: ranks.wait(rank, last=True), range(3)))
    assert [answer["name"] for answer in answers] == [ranks.manifest()[0]] * 3


def test_patience():
    assert patience_s(2.0, None) == 140.0
    assert patience_s(0.0, 1000.0) == 120.0
    assert patience_s(60.0, 100.0) == 70.0
    assert patience_s(60.0, 0.0) == 0.0
