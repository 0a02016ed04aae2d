import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_resume.run.memory import OomKills

BOOT = "b00t"


@pytest.fixture
def node(tmp_path):
    """A node's /proc and /sys, with the control groups of a Slurm job."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/sys/kernel/random/boot_id", f"{BOOT}\n")
    write("proc/vmstat", "nr_free_pages 1\noom_kill 4\noom_kill_x 9\n")
    write("proc/self/cgroup", f"4:cpu,memory:/slurm/job_7/task_1\n0::/{JOB}/step_0/user/task_1\n")
    write(f"sys/fs/cgroup/{JOB}/memory.events", "low 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n")
    write(f"sys/fs/cgroup/{JOB}/step_0/user/task_1/memory.events", "oom_kill 0\n")
    write("sys/fs/cgroup/memory/slurm/job_7/task_1/memory.oom_control", "under_oom 0\noom_kill 1\n")
    return tmp_path


JOB = "system.slice/slurmstepd.scope/job_7"


def test_the_group_of_the_whole_job_counts(node):
    path = node / "sys/fs/cgroup" / JOB / "memory.events"
    assert OomKills.read(node) == OomKills(boot=BOOT, node=4, group=str(path), in_group=2)


def test_version_1_counts_in_the_groups_own_file(node):
    (node / "proc/self/cgroup").write_text("0::/\n4:cpu,memory:/slurm/job_7/task_1\n1:name=systemd:/\n")
    path = node / "sys/fs/cgroup/memory/slurm/job_7/task_1/memory.oom_control"
    assert OomKills.read(node) == OomKills(boot=BOOT, node=4, group=str(path), in_group=1)


def test_without_control_groups_only_the_nodes_kills_are_counted(node):
    (node / "proc/self/cgroup").write_text("0::/user.slice\n")
    assert OomKills.read(node) == OomKills(boot=BOOT, node=4)
    (node / "proc/self/cgroup").unlink()
    (node / "proc/vmstat").unlink()
    assert OomKills.read(node) == OomKills(boot=BOOT, node=0)


def test_another_jobs_kills_are_not_ours(node):
    before = OomKills.read(node)
    (node / "proc/vmstat").write_text("oom_kill 9\n")
    assert before.since(node) == 0
    Path(before.group).write_text("oom_kill 3\n")
    assert before.since(node) == 1
    Path(before.group).unlink()  # Slurm has cleaned up: what is left is the node's count
    assert before.since(node) == 5


def test_counts_of_another_boot_say_nothing(node):
    before = OomKills.read(node)
    (node / "proc/sys/kernel/random/boot_id").write_text("another")
    assert before.since(node) is None


@pytest.mark.parametrize(
    "record",
    [{}, {"boot": 1, "node": 1}, {"boot": "b", "node": "x"}, {"boot": "b", "node": 1, "group": 1}],
)
def test_a_damaged_record_says_nothing(record):
    assert OomKills.from_json(record) is None


def test_there_and_back(node):
    counts = OomKills.read(node)
    assert OomKills.from_json(json.loads(json.dumps(counts.to_json()))) == counts


EATER = """
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
x = bytearray(300 << 20)
"""


@pytest.fixture
def narrow():
    """A control group with too little memory; only root may make one."""
    try:
        folder = Path(f"/sys/fs/cgroup/memory/hpc-resume-test-{os.getpid()}")
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text("64M")
    except OSError:
        pytest.skip("control groups of version 1 can't be made here")
    yield folder
    folder.rmdir()


def test_a_real_kill_is_counted_where_it_happened(narrow):
    here = OomKills.read()
    there = dataclasses.replace(here, group=str(narrow / "memory.oom_control"), in_group=0)
    done = subprocess.run([sys.executable, "-c", EATER, str(narrow)], check=False)
    assert done.returncode == -9
    assert there.since() == 1
    assert dataclasses.replace(here, group=None).since() >= 1
