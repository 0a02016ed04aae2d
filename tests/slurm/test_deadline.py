"""On the real Slurm: what one is told of its times before a run is submitted."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import torch

from hpc_resume.checkpoint.manifest import MANIFEST, read_manifest
from hpc_resume.config import Config
from hpc_resume.launch.check import check_times
from tests.commits import commit_state


def test_submission_tells_that_the_grace_time_of_a_partition_is_too_short(cluster):
    root = cluster.work / "slow-saves"
    path = commit_state(root, step=4000, state={"weight": torch.zeros(1000)}) / MANIFEST
    manifest = read_manifest(path.parent)
    slow = dataclasses.replace(manifest, costs={**manifest.costs, "write_s": 43.0})
    path.write_bytes(slow.to_bytes())
    path.parent.rename(path.parent.with_name(slow.name))
    words = ["script", "-o", "scheduler=slurm", "-o", "time_limit_s=3600", "--run-dir", str(root)]
    words += ["-o", "node_types=[{partition: low}]", "--", "python", "train.py"]
    done = subprocess.run(
        [Path(sys.executable).with_name("hpc-resume"), *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == (
        "hpc-resume: warning: grace time of partition low is 20 s, KillWait 5 s, but saving this run took 43 s "
        "(step 4000): a preemption will lose the work since the last periodic checkpoint; checkpoint.every_s=600 "
        "bounds it\n"
    )
    config = {"scheduler": "slurm", "time_limit_s": 3600, "run_dir": str(root)}
    for partition, warnings in ((None, 0), ("main", 0), ("high", 0), ("low0", 1)):
        assert len(check_times(Config(**config, node_types=[{"partition": partition}]))) == warnings
