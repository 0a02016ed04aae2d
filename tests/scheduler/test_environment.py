import pytest

from hpc_resume.errors import UsageError
from hpc_resume.scheduler.environment import JobEnvironment

SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_PARTITION": "main",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURMD_NODENAME": "big2",
}
TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "1",
}
LOCAL = {
    "HPC_RESUME_JOB_STATE": "/runs/a/jobs/7/state.json",
    "HPC_RESUME_RESTART_COUNT": "2",
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "7",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
}


def detect(*environs, parent_pid=None, **changes):
    environ = {}
    for each in (*environs, changes):
        environ.update(each)
    environ = {name: value for name, value in environ.items() if value is not None}
    return JobEnvironment.detect(environ, hostname="here", pid=99, parent_pid=parent_pid)


def test_plain_python_is_one_process():
    env = detect()
    assert (env.kind, env.job_id, env.rank, env.world_size) == ("plain", None, 0, 1)
    assert (env.node, env.rendezvous, env.master) == ("here", "plain-99", None)
    assert not env.launcher_requeues


def test_srun_task():
    env = detect(SRUN, SLURM_RESTART_COUNT="2", HPC_RESUME_BATCH="1", HPC_RESUME_NODE_TYPE="main/a100")
    assert (env.kind, env.job_id, env.restart_count) == ("slurm", "12", 2)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (3, 4, 1, 2)
    assert (env.node, env.partition, env.node_type) == ("big2", "main", "main/a100")
    assert env.rendezvous == "slurm-12-2-0"
    assert env.launcher_requeues


def test_a_smaller_step_of_a_larger_job():
    # SLURM_NTASKS was exported by sbatch for the job; the step has its own numbers
    env = detect(
        SRUN, SLURM_PROCID="0", SLURM_NODEID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1",
        SLURM_STEP_TASKS_PER_NODE="1",
    )  # fmt: skip
    assert (env.rank, env.world_size, env.local_world_size) == (0, 1, 1)


@pytest.mark.parametrize(
    ("listed", "node", "expected"), [("2(x3),1", 3, 1), ("2(x3),1", 2, 2), ("4", 0, 4), ("1,3", 1, 3)]
)
def test_tasks_on_this_node(listed, node, expected):
    env = detect(
        SRUN, SLURM_STEP_TASKS_PER_NODE=listed, SLURM_NODEID=str(node), SLURM_LOCALID="0"
    )  # fmt: skip
    assert env.local_world_size == expected


def test_jobs_that_go_on_from_each_other_are_one_chain():
    slurm = {"SLURM_JOB_ID": "12"}
    assert detect(slurm).chain == "12"
    assert detect({**slurm, "HPC_RESUME_CHAIN": "7"}).chain == "7"
    assert detect({}).chain is None


def test_array_element_is_never_named_by_its_bare_number():
    # the last element that is split off has the array's own id as SLURM_JOB_ID
    env = detect(SRUN, SLURM_JOB_ID="9", SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="1")
    assert env.job_id == "9_1"
    assert env.rendezvous == "slurm-9_1-0-0"


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(None, id="batch script"),
        pytest.param("4294967291", id="batch step"),
        pytest.param("4294967290", id="interactive step of salloc"),
        pytest.param("batch", id="by name"),
    ],
)
def test_python_without_srun_is_one_process_of_the_job(step):
    env = detect(SRUN, SLURM_STEP_ID=step, SLURM_PROCID="0", SLURM_NODEID="0", SLURM_LOCALID="0")
    assert (env.kind, env.job_id, env.rank, env.world_size) == ("slurm", "12", 0, 1)
    assert env.rendezvous == "slurm-12-0-pid-99"


def test_torchrun_keeps_its_own_store():
    env = detect(TORCHRUN, parent_pid=5)
    assert (env.kind, env.job_id) == ("torchrun", None)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (2, 4, 0, 2)
    assert env.master == ("node1", 29500)
    assert env.restart_count == 1
    assert env.rendezvous == "torchrun-abc-1"  # two nodes: two parents


def test_two_torchruns_on_one_node_differ():
    one_node = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}
    first = detect(TORCHRUN, one_node, parent_pid=5).rendezvous
    second = detect(TORCHRUN, one_node, parent_pid=6).rendezvous
    assert first != second


def test_torchrun_inside_slurm_has_its_ranks_and_the_jobs_id():
    env = detect(SRUN, TORCHRUN, SLURM_RESTART_COUNT="3")
    assert (env.kind, env.job_id, env.restart_count) == ("slurm", "12", 3)
    assert (env.rank, env.world_size) == (2, 4)
    assert env.master == ("node1", 29500)
    assert env.rendezvous == "slurm-12-3-0-torchrun-abc-1"
    assert detect(SRUN, TORCHRUN, SLURM_STEP_ID="1").rendezvous == "slurm-12-0-1-torchrun-abc-1"


def test_ranks_exported_by_hand_as_torchrun_does():
    env = detect(RANK="1", WORLD_SIZE="2", MASTER_ADDR="node1", MASTER_PORT="1234", LOCAL_RANK="1")
    assert (env.kind, env.rank, env.world_size, env.master) == ("torchrun", 1, 2, ("node1", 1234))


def test_our_one_machine_scheduler():
    env = detect(LOCAL)
    assert (env.kind, env.job_id, env.restart_count) == ("local", "7", 2)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (1, 2, 1, 2)
    assert env.rendezvous == "local-7-2-0"
    assert detect(LOCAL, HPC_RESUME_STEP="1").rendezvous == "local-7-2-1"  # started again in place


def test_our_one_machine_scheduler_inside_an_interactive_slurm_job():
    assert detect(SRUN, LOCAL).kind == "local"
    assert detect(SRUN, LOCAL).node == "here"


def test_submitits_own_local_executor():
    env = detect(LOCAL, HPC_RESUME_JOB_STATE=None)
    assert (env.kind, env.rank, env.world_size) == ("submitit-local", 1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "0"}, "SLURM_STEP_NUM_TASKS"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(2)"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID"),
        ({**TORCHRUN, "RANK": "4"}, "RANK"),
        ({**TORCHRUN, "RANK": None}, "RANK"),
        ({**TORCHRUN, "MASTER_PORT": None}, "MASTER_PORT"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({**LOCAL, "SUBMITIT_LOCAL_NTASKS": None}, "SUBMITIT_LOCAL_NTASKS"),
        ({**LOCAL, "HPC_RESUME_RESTART_COUNT": "-1"}, "HPC_RESUME_RESTART_COUNT"),
    ],
)
def test_a_contradiction_names_the_variable(changes, named):
    with pytest.raises(UsageError, match=rf"^{named}[= ]"):
        detect(changes)
