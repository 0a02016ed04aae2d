import dataclasses
import subprocess

import pytest
import torch

from hpc_resume.checkpoint.manifest import MANIFEST, read_manifest
from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.check import check_times
from hpc_resume.scheduler.command import Completed
from tests.commits import commit_state

CONFIG = "Configuration data as of now\nKillWait                = 5 sec\nPreemptType             = {}\n"
PARTITIONS = """\
PartitionName=main
   AllocNodes=ALL Default=YES QoS=N/A
   GraceTime=0 Hidden=NO
   PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=OFF

PartitionName=low
   AllocNodes=ALL Default=NO QoS=N/A
   GraceTime=20 Hidden=NO
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=REQUEUE

PartitionName=top
   AllocNodes=ALL Default=NO QoS=N/A
   GraceTime=0 Hidden=NO
   PriorityJobFactor=1 PriorityTier=100 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=REQUEUE
"""


def slurm(preempt_type="preempt/partition_prio"):
    answers = {"config": CONFIG.format(preempt_type), "partition": PARTITIONS}
    return lambda words, _: Completed(code=0, out=answers[words[2]], err="")


@pytest.fixture
def saved(tmp_path):
    """A run whose only checkpoint took 43 s."""
    path = commit_state(tmp_path, step=4000, state={"weight": torch.zeros(1000)}) / MANIFEST
    manifest = read_manifest(path.parent)
    slow = dataclasses.replace(manifest, costs={**manifest.costs, "write_s": 43.0})
    path.write_bytes(slow.to_bytes())
    path.parent.rename(path.parent.with_name(slow.name))
    return tmp_path


def settings(run_dir, **changes):
    usual = {"scheduler": "slurm", "time_limit_s": 3600, "run_dir": str(run_dir)}
    partition = changes.pop("partition", None)
    return Config(**{**usual, "node_types": [{"partition": partition}], **changes})


@pytest.mark.parametrize(
    ("partition", "warnings"),
    [("low", 1), ("main,low", 1), ("main", 0), (None, 0), ("top", 0), ("unheard-of", 0)],
)
def test_the_partitions_grace_time_against_the_measured_save(saved, partition, warnings):
    found = check_times(settings(saved, partition=partition), runner=slurm())
    assert len(found) == warnings
    for each in found:
        assert each.startswith(
            "grace time of partition low is 20 s, KillWait 5 s, but saving this run took 43 s (step 4000)"
        )


def test_who_is_preempted_by_quality_of_service_is_not_known_here(saved):
    assert check_times(settings(saved, partition="low"), runner=slurm("preempt/qos")) == []


def test_a_new_run_has_settings_only(tmp_path):
    assert check_times(settings(tmp_path / "new", partition="low"), runner=slurm()) == []


def test_slurm_that_does_not_answer_refuses_nothing(saved):
    config = settings(saved, partition="low")
    assert check_times(config, runner=lambda *_: Completed(code=1, out="", err="no")) == []

    def missing(words, _):
        raise FileNotFoundError(words[0])

    def silent(words, timeout_s):
        raise subprocess.TimeoutExpired(words, timeout_s)

    assert check_times(config, runner=missing) == check_times(config, runner=silent) == []


def test_what_can_never_work_is_refused(saved):
    with pytest.raises(UsageError, match=r"time limit is 40 s, but saving this run took 43 s .*: no attempt"):
        check_times(settings(saved, time_limit_s=40, warning_lead_s=5), runner=slurm())


def test_the_embedded_scheduler_says_it_in_its_settings(saved):
    config = {"scheduler": "local", "stop": {"kill_wait_s": 2}}
    node_types = [{"name": "short", "preempt_after_s": 100, "grace_s": 20}, {"name": "calm", "grace_s": 1}]
    (only,) = check_times(settings(saved, **config, node_types=node_types))
    assert only.startswith("grace time of node type short is 20 s, KillWait 2 s, but saving")


def test_a_damaged_manifest_tells_nothing(saved):
    path = next(saved.glob("checkpoints/*/manifest.json"))
    path.write_bytes(path.read_bytes().replace(b"43", b"44"))
    assert check_times(settings(saved, partition="low"), runner=slurm()) == []
