"""On the real Slurm: ranks that srun has not started itself, but torchrun or a shell."""

import sys

import pytest

from hpc_resume.checkpoint.verify import verify_run
from tests.slurm.scenario import Scenario

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SHELL = ("bash", "-c", '"$@"; exit $?', "-", sys.executable)


@pytest.mark.parametrize("signal", ["USR2", "TERM"])
def test_a_warned_torchrun_waits_while_its_ranks_save(cluster, signal):
    run = Scenario(cluster, f"torchrun-{signal}", constraint="v100", launcher=TORCHRUN, step_s=0.3)
    run.wait_for_progress()
    cluster.run("scancel", f"--signal={signal}", run.job)
    assert run.wait_until_over() == "COMPLETED", run.log()
    found = run.status()
    assert (found["state"], found["steps_lost"]) == ("done", 0), run.log()
    first, _ = found["attempts"]
    assert (first["cause"], first["world_size"]) == ("signal", 2)
    assert f"SIG{signal}" in first["evidence"]
    assert "dies of" not in run.log()
    assert verify_run(run.root) == []


def test_a_shell_that_would_die_of_a_warning_is_told(cluster):
    run = Scenario(cluster, "in-a-shell", constraint="v100", launcher=SHELL, steps=200)
    run.wait_for_progress()
    assert "(process " in run.log()
    assert "which this rank was started by, dies of SIGUSR2 and SIGTERM" in run.log()
    cluster.run("scancel", "--signal=USR2", run.job)
    # It does: the step is over, and its ranks are killed in the midst of their save, at best after it.
    run.wait_for(lambda: "User defined signal 2" in run.log(), 60, "the shell dies")
    assert run.wait_until_over() == "COMPLETED", run.log()
    assert verify_run(run.root) == []
