"""A run on the private cluster, from submission to its end, as the tests of this folder play it."""

import sys
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.journal import read_events
from hpc_resume.launch.script import render
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from tests.run.training import train
train({steps}, step_s={step_s}, every_steps=10, {more})
"""


class Scenario:
    """One run on the cluster, from the sbatch file that ``hpc-resume script`` renders.

    ``train`` is more arguments of :func:`tests.run.training.train`, as text.
    """

    def __init__(self, cluster, name, *, steps=60, step_s=0.1, limit_s=600, lead_s=30, train="", **node_type):
        self.cluster = cluster
        self.root = cluster.work / name
        self.train = cluster.work / f"{name}.py"
        self.train.write_text(SCRIPT.format(root=str(ROOT), steps=steps, step_s=step_s, more=train))
        self.config = Config(
            name=name,
            run_dir=str(self.root),
            scheduler="slurm",
            time_limit_s=limit_s,
            warning_lead_s=lead_s,
            node_types=[{"name": name, "cpus_per_task": 1, "mem_gb": 1, **node_type}],
            environment={"variables": {"OMP_NUM_THREADS": "1"}},
        )
        self.script = cluster.work / f"{name}.sbatch"
        command = [sys.executable, str(self.train)]
        self.script.write_text(render(self.config, command=command, run_dir=self.root))
        self.job = cluster.sbatch(self.script)

    def log(self):
        path = self.cluster.work / f"{self.config.name}-{self.job}.log"
        return path.read_text() if path.exists() else "no log"

    def wait_for(self, condition, timeout_s, why):
        try:
            self.cluster.wait_for(condition, timeout_s, why)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-4000:]}") from None

    def wait_for_progress(self, attempt=1, step=10):
        def committed():
            run = RunDirectory(self.root)
            return any(
                event["event"] == "saved" and event["step"] >= step
                for event in read_events(run.attempt(attempt) / "events.jsonl")
            )

        self.wait_for(committed, 60, f"attempt {attempt} has saved step {step}")

    def wait_until_over(self, timeout_s=90):
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait_for(lambda: self.cluster.state(self.job) in over, timeout_s, "the job is over")
        return self.cluster.state(self.job)

    def pid_of_rank(self, rank):
        wanted = {f"SLURM_JOB_ID={self.job}".encode(), f"SLURM_PROCID={rank}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if str(self.train).encode() in words and b"srun" not in words[0]:
                        return int(folder.name)
            except OSError:
                continue
        raise AssertionError(f"rank {rank} of job {self.job} is not here")

    def status(self):
        return status(self.root).to_json()
