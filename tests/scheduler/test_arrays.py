import os
import subprocess

import pytest

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.arrays import SlurmArrays, is_submit_limit
from hpc_resume.scheduler.command import Completed

CONFIG = """Configuration data as of 2026-11-24T17:49:00
MaxArraySize            = {size}
MaxJobCount             = 10000
SchedulerParameters     = {parameters}
"""


def slurm(out="", *, code=0, err="", asked=None):
    def run(words, timeout_s):
        if asked is not None:
            asked.append(list(words))
        return Completed(code=code, out=out, err=err)

    return SlurmArrays(run)


@pytest.mark.parametrize(
    ("size", "parameters", "largest"),
    [(1001, "bf_interval=1", 1001), (1001, "bf_interval=1,max_array_tasks=100,x=2", 100), (4, "(null)", 4)],
)
def test_how_large_an_array_may_be(size, parameters, largest):
    assert slurm(CONFIG.format(size=size, parameters=parameters)).largest_array() == largest


def test_a_site_without_arrays():
    with pytest.raises(SchedulerError, match="allows no job arrays"):
        slurm(CONFIG.format(size=0, parameters="")).largest_array()
    with pytest.raises(SchedulerError, match="no MaxArraySize"):
        slurm("nothing of the kind\n").largest_array()


def test_all_jobs_in_one_question():
    asked = []
    states = slurm("9_0 RUNNING\n9_1 PENDING\n12 COMPLETED\n", asked=asked).job_states()
    assert states == {"9_0": "RUNNING", "9_1": "PENDING", "12": "COMPLETED"}
    assert asked == [
        ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
    ]


def test_jobs_of_colleagues_are_asked_for_too():
    asked = []
    slurm("", asked=asked).job_states({1007, 1002})
    assert "--user=1002,1007" in asked[0]


def test_no_answer_is_an_error():
    with pytest.raises(SchedulerError, match=r"squeue .*: slurm_load_jobs error"):
        slurm(code=1, err="slurm_load_jobs error: Unable to contact slurm controller").job_states()

    def missing(words, timeout_s):
        raise FileNotFoundError

    def late(words, timeout_s):
        raise subprocess.TimeoutExpired(words, timeout_s)

    with pytest.raises(SchedulerError, match="no squeue on PATH"):
        SlurmArrays(missing).job_states()
    with pytest.raises(SchedulerError, match="no answer within 60 s"):
        SlurmArrays(late).job_states()


@pytest.mark.parametrize(
    ("complaint", "limit"),
    [
        ("sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed", True),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", True),
        ("sbatch: error: AssocGrpSubmitJobsLimit", True),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", True),
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", False),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit", False),
    ],
)
def test_a_limit_on_submitted_jobs_is_told_from_other_refusals(complaint, limit):
    assert is_submit_limit(complaint) is limit
