"""What happens inside an allocation, and what can be found out about a cluster: on the real Slurm."""

import os
import signal
from pathlib import Path

import pytest

from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from tests.slurm.test_runs import Scenario

ROOT = Path(__file__).parents[2]


def gap_s(run, attempt):
    """From the last sign of an attempt to the first one of the next."""
    folders = [run.root / f"attempts/{number:04d}/events.jsonl" for number in (attempt, attempt + 1)]
    before, after = map(read_events, folders)
    return after[0]["t"] - before[-1]["t"]


# -- started again in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_of_a_rank_restarts_in_place(cluster, rank):
    run = Scenario(cluster, f"in-place-{rank}", nodes=2, constraint="v100", steps=60)
    run.wait_for_progress()
    began = cluster.job(run.job)["StartTime"]
    os.kill(run.pid_of_rank(rank), signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    job = cluster.job(run.job)
    assert (job["Restarts"], job["StartTime"]) == ("0", began), run.log()
    assert "started again in place" in run.log()
    first, second = run.status()["attempts"]
    assert (first["job_id"], first["restart_count"]) == (second["job_id"], second["restart_count"])
    assert (first["cause"], second["cause"]) == ("unknown" if rank == 0 else "crash", "done")
    assert second["first_step"] >= 10
    assert first["steps_lost"] <= 10
    assert verify_run(run.root) == []
