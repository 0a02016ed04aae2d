import errno
import os

import pytest
import torch
import torch.distributed as dist

from hpc_resume.errors import (
    BudgetSpent,
    CheckpointNotFound,
    FencedError,
    IntegrityError,
    MismatchError,
    RendezvousError,
    SaveError,
)
from hpc_resume.run.fault import Fault, Faults, before_the_start
from hpc_resume.run.history import FAULT, _fault
from hpc_resume.run.memory import OomKills
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.local import process_ticks

COUNTS = OomKills(boot="b", node=1)
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49300")


def environment(rank=0, size=2):
    return JobEnvironment.detect(
        {
            "HPC_RESUME_JOB_STATE": "x", "SUBMITIT_LOCAL_JOB_ID": "j", "SUBMITIT_LOCAL_NTASKS": str(size),
            "SUBMITIT_LOCAL_GLOBALID": str(rank), "SUBMITIT_LOCAL_LOCALID": str(rank),
        },
        hostname="n1", pid=1,
    )  # fmt: skip


class Ranks:
    """Ranks of this process that share a control store; time passes when they wait."""

    def __init__(self, folder, size=2, kills=0):
        self.now = 0.0
        self.store = dist.HashStore()
        self.ranks = []
        for rank in range(size):
            peers = Peers(environment(rank, size), self.store, None, "x")
            self.ranks.append(
                Faults(
                    environment(rank, size), peers, folder, COUNTS,
                    kills_since=lambda _: kills,
                    monotonic=lambda: self.now, pause=self.pause,
                )
            )  # fmt: skip

    def pause(self, seconds):
        self.now += seconds

    def __getitem__(self, rank):
        return self.ranks[rank]


@pytest.fixture
def ranks(tmp_path):
    return Ranks(tmp_path)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def wrapped():
    error = RuntimeError("the step failed")
    error.__cause__ = out_of_memory()
    return error


@pytest.mark.parametrize("error", [out_of_memory(), MemoryError("Unable to allocate"), wrapped()])
def test_out_of_memory_is_told_by_type(ranks, error):
    found = ranks[1].of(error, begun=False)
    assert (found.cause, found.mistake, found.nodes, found.exit_code) == (
        Cause.OUT_OF_MEMORY,
        False,
        (),
        None,
    )
    assert found.evidence.startswith("rank 1 on n1: ")


def test_words_alone_are_no_out_of_memory(ranks):
    assert ranks[0].of(ValueError("out of memory"), begun=True).cause is Cause.CRASH


@pytest.mark.parametrize("begun", [True, False])
def test_an_exception_is_a_mistake_only_before_the_first_step(ranks, begun):
    found = ranks[0].of(ValueError("something"), begun=begun)
    assert (found.cause, found.mistake, found.nodes) == (Cause.CRASH, not begun, ("n1",))
    assert found.evidence == "rank 0 on n1: ValueError: something"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_full_or_absent_disk_is_no_mistake_of_the_script(ranks, number):
    try:
        try:
            raise OSError(number, os.strerror(number), "samples.txt")
        except OSError as error:
            raise RuntimeError("could not write") from error
    except RuntimeError as error:
        found = ranks[0].of(error, begun=False)
    assert (found.cause, found.mistake, found.nodes) == (Cause.CRASH, False, ())


def test_what_keeps_a_run_from_beginning_may_pass_or_not():
    assert before_the_start(RendezvousError("rank 3 did not come"), "n1").cause is Cause.HANG
    assert before_the_start(dist.DistNetworkError("it timed out"), "n1").cause is Cause.HANG
    full = before_the_start(OSError(errno.ENOSPC, "full", "attempt.json"), "n1")
    assert (full.cause, full.nodes) == (Cause.CRASH, ())
    broken = before_the_start(
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "n1"
    )
    assert (broken.cause, broken.nodes) == (Cause.CRASH, ("n1",))
    assert before_the_start(PermissionError(errno.EACCES, "not yours"), "n1") is None
    assert before_the_start(KeyboardInterrupt(), "n1") is None
    assert before_the_start(SystemExit("gloo"), "n1") is None


def test_a_file_that_is_not_there_is_a_mistake_of_the_script(ranks):
    assert ranks[0].of(FileNotFoundError(errno.ENOENT, "no such file"), begun=False).mistake


def test_a_broken_gpu_is_no_mistake_of_the_script(ranks):
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    found = ranks[0].of(error, begun=False)
    assert (found.mistake, found.nodes) == (False, ("n1",))


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (MismatchError("other shapes"), Cause.REFUSED, 2),
        (IntegrityError("damaged"), Cause.REFUSED, 4),
        (CheckpointNotFound("none"), Cause.REFUSED, 3),
        (FencedError("attempt 7 has begun"), Cause.CRASH, 1),
        (BudgetSpent("enough"), Cause.NO_PROGRESS, 1),
        (SaveError(errno.ENOSPC, "no space"), Cause.CRASH, None),
    ],
)
def test_errors_of_ours_keep_their_code_and_blame_no_node(ranks, error, cause, code):
    found = ranks[0].of(error, begun=True)
    assert (found.cause, found.exit_code, found.nodes, found.mistake) == (cause, code, (), False)
    assert found.fenced == isinstance(error, FencedError)


def test_a_rank_that_lost_a_peer_takes_the_peers_word(ranks):
    ranks[1].of(ValueError("something"), begun=False)
    found = ranks[0].of(LOST, begun=False)
    assert (found.cause, found.mistake, found.nodes) == (Cause.CRASH, True, ("n1",))
    assert found.evidence.startswith("rank 1 on n1: ValueError: something; rank 0: RuntimeError: [gloo")
    assert ranks.now == 0


def test_the_first_word_holds(ranks):
    first = ranks[1].of(out_of_memory(), begun=True)
    assert ranks[0].of(ValueError("later"), begun=True) == first


def test_the_word_lies_in_the_attempts_folder_too(ranks, tmp_path):
    found = ranks[1].of(ValueError("something"), begun=True)
    assert _fault(tmp_path / FAULT) == Verdict(cause=Cause.CRASH, evidence=found.evidence, nodes=("n1",))


def test_a_peer_that_nobody_knows_about(ranks):
    found = ranks[0].of(LOST, begun=True)
    assert (found.cause, found.nodes, found.mistake) == (Cause.UNKNOWN, (), False)
    assert ranks.now == pytest.approx(2.0, abs=0.1)


def test_a_collective_that_times_out_while_nobody_has_failed_is_a_hang(ranks):
    error = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv")
    assert ranks[0].of(error, begun=True).cause is Cause.HANG


@pytest.mark.parametrize("begun", [True, False])
def test_a_script_that_exits_with_an_error_tells_the_other_ranks(ranks, begun):
    neighbour(ranks[0], 1, alive=False)
    ranks[1].exits("no data", begun=begun)
    found = ranks[0].of(LOST, begun=begun)
    assert (found.cause, found.mistake, found.nodes) == (Cause.CRASH, not begun, ())
    assert found.evidence.startswith("rank 1 on n1: the script called sys.exit('no data'); rank 0: ")


@pytest.mark.parametrize("code", [None, 0, 75])
def test_a_script_that_exits_without_one_tells_nothing(ranks, tmp_path, code):
    ranks[1].exits(code, begun=True)
    assert ranks[0].find() is None
    assert not (tmp_path / FAULT).exists()


@pytest.mark.parametrize("cause", [OSError(errno.ESTALE, "stale"), OSError(errno.EMFILE, "too many")])
def test_what_this_rank_can_not_read_is_no_refusal(ranks, cause):
    error = IntegrityError("rank-00001-of-00002.h5: can't be read")
    error.__cause__ = cause
    found = ranks[1].of(error, begun=False)
    assert (found.cause, found.mistake, found.nodes, found.exit_code) == (Cause.CRASH, False, ("n1",), None)


def test_a_checkpoint_for_which_there_is_no_memory_is_no_refusal(ranks):
    error = IntegrityError("manifest.json: damaged (MemoryError: )")
    error.__cause__ = MemoryError()
    assert ranks[1].of(error, begun=False).cause is Cause.OUT_OF_MEMORY


def neighbour(faults, rank, *, alive):
    pid = os.getpid()
    faults._neighbours = {rank: (pid, process_ticks(pid) - (0 if alive else 1), COUNTS)}


@pytest.mark.parametrize(("kills", "cause"), [(0, Cause.CRASH), (1, Cause.OUT_OF_MEMORY)])
def test_a_rank_of_this_node_whose_process_is_gone(tmp_path, kills, cause):
    ranks = Ranks(tmp_path, kills=kills)
    neighbour(ranks[0], 1, alive=False)
    found = ranks[0].of(LOST, begun=True)
    assert found.cause is cause
    assert f"rank 1 on n1: its process ({os.getpid()}) is gone" in found.evidence
    assert ("for want of memory" in found.evidence) == bool(kills)
    assert found.nodes == (() if kills else ("n1",))  # memory is no fault of the node
    assert found.mistake is False


def test_a_rank_that_leaves_by_itself_is_not_dead(ranks):
    neighbour(ranks[0], 1, alive=False)
    ranks[1].leave()
    assert ranks[0].find() is None


def test_a_rank_that_lives_is_not_dead(ranks):
    neighbour(ranks[0], 1, alive=True)
    assert ranks[0].find() is None


def test_a_killed_data_worker_needs_the_kernels_word(tmp_path):
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert Ranks(tmp_path, kills=1)[0].of(error, begun=True).cause is Cause.OUT_OF_MEMORY
    assert Ranks(tmp_path, kills=0)[0].of(error, begun=True).cause is Cause.CRASH


@pytest.mark.parametrize("cause", [Cause.CANCEL, Cause.NODE_FAILURE])
def test_what_is_certain_stays_when_no_boundary_comes(ranks, cause):
    neighbour(ranks[0], 1, alive=False)
    found = ranks[0].behind(
        Verdict(cause=cause, evidence="SIGTERM"), "no step ended within 60 s", no_hang=False
    )
    assert found.cause is cause


def test_no_boundary_and_nobody_dead_is_a_hang(ranks):
    asked = Verdict(cause=Cause.TIME_LIMIT, evidence="SIGUSR2; 100 s before the time limit")
    found = ranks[0].behind(asked, "no step ended within 60 s", no_hang=False)
    assert found.cause is Cause.HANG
    assert found.evidence == (
        "no step ended within 60 s; asked to stop by SIGUSR2; 100 s before the time limit"
    )


def test_a_last_save_that_takes_too_long_is_no_hang(ranks):
    neighbour(ranks[0], 1, alive=False)
    asked = Verdict(cause=Cause.TIME_LIMIT, evidence="SIGUSR2")
    found = ranks[0].behind(asked, "the last checkpoint was not committed", no_hang=True)
    assert found.cause is Cause.TIME_LIMIT
    assert found.evidence == "the last checkpoint was not committed; asked to stop by SIGUSR2"


def test_no_boundary_because_a_rank_is_dead(ranks):
    neighbour(ranks[0], 1, alive=False)
    asked = Verdict(cause=Cause.SIGNAL, evidence="SIGTERM", already_requeued=True)
    found = ranks[0].behind(asked, "the ranks could not agree", no_hang=False)
    assert (found.cause, found.nodes, found.already_requeued) == (Cause.CRASH, ("n1",), True)
    assert found.evidence.startswith("rank 1 on n1: its process")


def test_without_a_store_a_rank_speaks_for_itself(tmp_path):
    class Gone(dist.HashStore):
        def check(self, *_):
            raise RuntimeError("Connection reset by peer")

        compare_set = set = check

    peers = Peers(environment(), Gone(), None, "x")
    peers.store = Gone()
    faults = Faults(environment(), peers, tmp_path, OomKills.read(), pause=lambda _: None)
    assert faults.of(ValueError("x"), begun=True).cause is Cause.CRASH
    neighbour(faults, 1, alive=False)
    assert faults.of(RendezvousError("rank 0 is gone"), begun=True).cause is Cause.CRASH


def test_there_and_back():
    fault = Fault(cause=Cause.HANG, evidence="e", nodes=("a",), mistake=True, exit_code=2)
    assert Fault.from_json(fault.to_json()) == fault
