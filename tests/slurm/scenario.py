"""A run on the private cluster, from submission to its end, as the tests of this folder play it."""

import sys
from pathlib import Path

from hpc_resume.checkpoint.verify import verify_run
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
train({steps}, step_s={step_s}, every_steps={every_steps}, {more})
"""
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Scenario:
    """One run on the cluster, from the sbatch file that ``hpc-resume script`` renders.

    ``train`` is more arguments of :func:`tests.run.training.train`, as text; ``launcher`` is what stands before the file.
    """

    def __init__(
        self, cluster, name, *, steps=60, step_s=0.1, every_steps=10, limit_s=600, lead_s=30, train="",
        settings=None, launcher=(sys.executable,), **node_type,
    ):  # fmt: skip
        self.cluster = cluster
        self.root = cluster.work / name
        self.train = cluster.work / f"{name}.py"
        self.train.write_text(
            SCRIPT.format(root=str(ROOT), steps=steps, step_s=step_s, every_steps=every_steps, more=train)
        )
        base = {
            "name": name,
            "run_dir": str(self.root),
            "scheduler": "slurm",
            "time_limit_s": limit_s,
            "warning_lead_s": lead_s,
            "node_types": [{"name": name, "cpus_per_task": 1, "mem_gb": 1, **node_type}],
            "environment.variables.OMP_NUM_THREADS": "1",
        }
        self.config = Config.load(overrides={**base, **(settings or {})})
        self.script = cluster.work / f"{name}.sbatch"
        command = [*launcher, str(self.train)]
        self.script.write_text(render(self.config, command=command, run_dir=self.root))
        self.job = cluster.sbatch(self.script)
        cluster.names.add(name)

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

        self.wait_for(committed, 200, f"attempt {attempt} has saved step {step}")

    def wait_until_over(self, timeout_s=300):
        self.wait_for(lambda: self.cluster.state(self.job) in OVER, timeout_s, "the job is over")
        return self.cluster.state(self.job)

    def was_started_again_in_place(self, began):
        """``began``: the job's StartTime of before; one that was pending in between would have started anew."""
        job = self.cluster.job(self.job)
        assert (job["Restarts"], job["StartTime"]) == ("0", began), self.log()
        assert "started again in place" in self.log()
        first, second = self.status()["attempts"]
        assert (first["job_id"], first["restart_count"]) == (second["job_id"], second["restart_count"])
        assert second["cause"] == "done"
        assert second["first_step"] >= 10
        assert first["steps_lost"] <= 10
        assert verify_run(self.root) == []

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
