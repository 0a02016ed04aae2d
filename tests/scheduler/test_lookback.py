import pytest
import stamina

from hpc_resume.scheduler.base import PastJob, Whereabouts
from hpc_resume.scheduler.slurm import SlurmScheduler
from tests.scheduler.test_slurm import FakeSlurm, job

# As Slurm 22.05.8 prints it.
NODE = """\
NodeName={name} Arch=x86_64 CoresPerSocket=16
   NodeAddr=127.0.0.1 NodeHostName=vm Version=22.05.8
   State={state} ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A
   Partitions=main,low,low0,high
   BootTime={boot} SlurmdStartTime=1795544000

"""
DISABLED = (1, "Slurm accounting storage is disabled")


@pytest.fixture(autouse=True)
def _no_waiting():
    with stamina.set_testing(testing=True, attempts=3, cap=True):
        yield


def nodes(**states):
    return "".join(
        NODE.format(name=name, state=state, boot=1000) if isinstance(state, str)
        else NODE.format(name=name, state="IDLE", boot=state)
        for name, state in states.items()
    )  # fmt: skip


def look_back(job_id="9_3", own_restarts=1, **answers):
    fake = FakeSlurm(**{"sacct": DISABLED, "scontrol_show": nodes(big1="IDLE", big2="MIXED"), **answers})
    past = Whereabouts(
        job_id=job_id, restart_count=0, nodes=("big1", "big2"), began_s=5000.0, last_sign_s=6000.0
    )
    return SlurmScheduler("9_3", own_restarts=own_restarts, runner=fake).look_back(past)


def test_where_nothing_is_known():
    assert look_back(own_restarts=0) == PastJob()
    assert look_back() == PastJob(requeued=True)
    assert look_back(scontrol_show=FileNotFoundError()) == PastJob()
    assert look_back(scontrol_show=(1, "slurmctld is down")) == PastJob(requeued=True)


@pytest.mark.parametrize("state", ["DOWN", "DOWN*", "IDLE+NOT_RESPONDING", "FAIL", "IDLE*"])
def test_a_node_that_is_down_or_silent(state):
    found = look_back(scontrol_show=nodes(big1="ALLOCATED", big2=state))
    assert found.failed_nodes == ("big2",)
    assert found.evidence == f"node big2: State={state}"


def test_a_node_that_was_booted_since():
    assert look_back(scontrol_show=nodes(big1=5900, big2=6100)).failed_nodes == ("big2",)


@pytest.mark.parametrize("state", ["IDLE", "MIXED+DRAIN", "FAILING", "IDLE+CLOUD+POWERED_DOWN", "ALLOCATED"])
def test_other_states_are_no_failure(state):
    assert look_back(scontrol_show=nodes(big1=state, big2=state)).failed_nodes == ()


def test_other_nodes_are_not_asked_about():
    assert look_back(scontrol_show=nodes(small1="DOWN")).failed_nodes == ()


def test_accounting_has_a_row_for_each_start():
    rows = "4000|PREEMPTED|0:0\n4990|OUT_OF_MEMORY|0:125\n7000|RUNNING|0:0\nUnknown|PENDING|0:0\n"
    found = look_back(sacct=rows)
    assert (found.state, found.evidence) == ("OUT_OF_MEMORY", "sacct: State=OUT_OF_MEMORY")
    assert look_back(sacct="4990|CANCELLED by 1000|0:0\n").state == "CANCELLED"
    assert look_back(sacct="4990|COMPLETED|0:0\n").state == ""
    assert look_back(sacct="7000|RUNNING|0:0\n").state == ""
    assert look_back(sacct=FileNotFoundError()).requeued


def test_a_job_before_this_one_is_asked_for_its_end():
    answers = [job("NODE_FAIL"), nodes(big1="IDLE", big2="IDLE")]
    found = look_back("8", scontrol_show=answers)
    assert (found.state, found.requeued) == ("NODE_FAIL", False)
    assert "job 8: JobState=NODE_FAIL" in found.evidence
    # One that still runs says nothing about its end, and one that Slurm has forgotten nothing at all.
    for answer in (job("RUNNING"), (1, "Invalid job id specified")):
        assert look_back("8", scontrol_show=[answer, nodes(big1="IDLE")]).state == ""
