from hpc_resume.scheduler.base import NoScheduler
from hpc_resume.scheduler.connect import connect
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.slurm import SlurmScheduler


def connected(environ):
    return connect(JobEnvironment.detect(environ, hostname="here", pid=1), environ)


def test_without_a_scheduler_nothing_is_known_and_nothing_can_be_requeued():
    scheduler = connected({})
    assert isinstance(scheduler, NoScheduler)
    assert scheduler.facts().state == "NONE"
    assert scheduler.requeue() is False
    assert scheduler.node_type("here") is None


def test_slurm_is_asked_about_the_array_element():
    scheduler = connected({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "1"})
    assert isinstance(scheduler, SlurmScheduler)
    assert scheduler.job_id == "9_1"


def test_submitits_own_local_executor_is_no_scheduler():
    environ = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "1",
        "SUBMITIT_LOCAL_NTASKS": "1",
        "SUBMITIT_LOCAL_GLOBALID": "0",
        "SUBMITIT_LOCAL_LOCALID": "0",
    }
    assert isinstance(connected(environ), NoScheduler)
