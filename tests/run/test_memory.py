import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_resume.run.memory import OomKills

HERE = OomKills(boot="b", node=3, job=None)


@pytest.fixture
def node(tmp_path):
    """A node's /proc and /sys, with Slurm's control groups of version 2."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/sys/kernel/random/boot_id", "b00t\n")
    write("proc/vmstat", "nr_free_pages 1\noom_kill 4\noom_kill_x 9\n")
    write("proc/self/cgroup", "4:memory:/x\n0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_1\n")
    write(
        "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7/memory.events",
        "low 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 0\n",
    )
    return tmp_path


def test_counts_of_the_node_and_of_the_job(node):
    assert OomKills.read(node) == OomKills(boot="b00t", node=4, job=2)


def test_without_control_groups_only_the_nodes(node):
    (node / "proc/self/cgroup").write_text("0::/user.slice\n")
    assert OomKills.read(node).job is None
    (node / "proc/self/cgroup").unlink()
    (node / "proc/vmstat").unlink()
    assert OomKills.read(node) == OomKills(boot="b00t", node=0, job=None)


def test_counts_are_compared_on_one_boot_of_a_node_only():
    assert OomKills(boot="b", node=5, job=None).since(HERE) == 2
    assert OomKills(boot="c", node=5, job=None).since(HERE) is None


def test_the_jobs_own_count_is_better_than_the_nodes():
    ours = OomKills(boot="b", node=3, job=1)
    assert OomKills(boot="b", node=9, job=1).evidence_since(ours) is None  # another job's
    assert "1 process of this job" in OomKills(boot="b", node=4, job=2).evidence_since(ours)
    assert "2 processes on this node" in OomKills(boot="b", node=5, job=None).evidence_since(HERE)
    assert HERE.evidence_since(HERE) is None


@pytest.mark.parametrize(
    "record", [{}, {"boot": 1, "node": 1, "job": 1}, {"boot": "b", "node": "x", "job": 1}]
)
def test_a_damaged_record_says_nothing(record):
    assert OomKills.from_json(record) is None


def test_there_and_back():
    assert OomKills.from_json(json.loads(json.dumps(HERE.to_json()))) == HERE


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


def test_a_real_kill_is_counted(narrow):
    before = OomKills.read()
    done = subprocess.run([sys.executable, "-c", EATER, str(narrow)], check=False)
    assert done.returncode == -9
    assert "for want of memory" in OomKills.read().evidence_since(before)
