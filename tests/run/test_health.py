import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.provenance.finding import Finding
from hpc_resume.run.health import NodeHealth, check_memory, check_node, check_ports, space_needed

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         100000 kB\nMemAvailable:    8000000 kB\n"
BAD = Finding(what="GPU 0", level="bad", detail="multiplies\nwrongly")


def level(findings):
    return findings[0].level


def test_this_machine_is_fit_and_nothing_is_left_behind(tmp_path):
    health = check_node(tmp_path / "run", {"SLURMD_NODENAME": "n1"})
    assert health.fit, health
    assert health.verdict == "hpc_resume: node n1 is fit"
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_can_not_be_written_is_told_in_one_line():
    health = check_node(Path("/proc/1/run"), {"SLURMD_NODENAME": "n1"})
    assert not health.fit
    assert health.verdict.startswith("hpc_resume: node n1 is unfit: writing: /proc/1 can't be written")


def test_the_verdict_is_one_line():
    assert (
        NodeHealth(node="n", findings=(BAD,)).verdict
        == "hpc_resume: node n is unfit: GPU 0: multiplies wrongly"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "ok"), ({"SLURM_MEM_PER_NODE": "15000"}, "ok"), ({"SLURM_MEM_PER_NODE": "16000"}, "bad")],
)
def test_half_of_the_memory_that_was_given_must_be_free(given, expected):
    assert level(check_memory(given, meminfo=MEMINFO)) == expected


def test_a_full_machine_is_unfit_whatever_was_given():
    assert level(check_memory({}, meminfo=MEMINFO.replace("8000000", "700000"))) == "bad"


def test_others_must_be_able_to_connect():
    assert level(check_ports(lambda: ["127.0.0.1"])) == "note"
    (found,) = check_ports(lambda: ["name.invalid"])
    assert found.level == "bad"
    assert "name.invalid" in found.detail


def test_space_for_the_next_checkpoint_by_the_newest(tmp_path):
    assert space_needed(tmp_path) == 1 << 30
    for step, size_bytes in ((1, 3 << 30), (2, 2 << 30)):
        folder = tmp_path / f"checkpoints/{step:010d}-0123abcd"
        folder.mkdir(parents=True)
        with (folder / "rank-00000-of-00001.h5").open("wb") as file:
            file.truncate(size_bytes)
    assert space_needed(tmp_path) == 2 << 30


def test_the_verb_says_it_line_by_line_and_by_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    done = CliRunner().invoke(main, ["doctor", "--node", "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "hpc_resume: node n1 is fit"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "64")  # more than any machine has
    done = CliRunner().invoke(main, ["doctor", "--node", "--json", "--run-dir", str(tmp_path / "run")])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["fit"], found["node"]) == (1, False, "n1")
    assert "the job was given 64" in next(
        each["detail"] for each in found["findings"] if each["what"] == "GPUs"
    )


def test_the_run_directory_comes_from_the_job(tmp_path):
    environ = {**os.environ, "HPC_RESUME_RUN_DIR": "/proc/1/run", "SLURMD_NODENAME": "n1"}
    words = [sys.executable, "-m", "hpc_resume.cli", "doctor", "--node"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "unfit: writing: /proc/1" in done.stdout


def test_other_options_make_no_sense_there(tmp_path):
    done = CliRunner().invoke(main, ["doctor", "--node", "--probe"])
    assert done.exit_code == 2


def test_the_own_name_is_the_scheduler_s_else_the_machine_s(tmp_path):
    assert check_node(tmp_path, {}).node == socket.gethostname()
