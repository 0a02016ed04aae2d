"""A rank without torch that ends its attempt as it is told to, and writes down how it went.

    link.py RECORDS PLAN

RECORDS is a file of JSON lines. PLAN is a JSON list with what each attempt does, the last one again and again:

    {"until": "signal", "go_on": {"delay_s": 5}, "code": 75}

``until``: a ``"signal"`` comes, ``"killed"``, or at ``"once"``; ``go_on``, ``leave``: a decision for the
continuation; ``end``: why.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError
from hpc_resume.policy.decision import Decision
from hpc_resume.run.continuation import choose
from hpc_resume.rundir import RunDirectory, sealed
from hpc_resume.scheduler.connect import connect
from hpc_resume.scheduler.environment import JobEnvironment


def main():
    records, plan = sys.argv[1:]
    signals = {signal.SIGTERM, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    config = Config.load(environ=os.environ)
    job = JobEnvironment.detect(os.environ, hostname=socket.gethostname(), pid=os.getpid())
    run = RunDirectory(Path(config.run_dir))
    continuation = choose(config, job, connect(job, os.environ), run)

    def record(event, **fields):
        same = {"t": time.time(), "event": event, "job": job.job_id, "restart": job.restart_count}
        with open(records, "ab", buffering=0) as file:  # noqa: PTH123 - one write a line
            file.write(json.dumps({**same, **fields}).encode() + b"\n")

    if job.rank == 0:
        identify(run, config, job)
    done = sum(json.loads(line)["event"] == "begun" for line in Path(records).read_text().splitlines())
    step = json.loads(plan)[min(done, len(json.loads(plan)) - 1)]
    record(
        "begun", chain=job.chain, node=job.node, node_type=job.node_type, ranks=job.world_size, rank=job.rank,
        pid=os.getpid(), provided=continuation.prepare(),
    )  # fmt: skip
    if step["until"] == "killed":
        time.sleep(1000)
    if step["until"] == "signal":
        record("signal", name=signal.sigwait(signals).name)
    try:
        if "go_on" in step:
            how = continuation.go_on(Decision(action="continue", why="", **step["go_on"]))
        elif "leave" in step:
            how = continuation.leave(Decision(action="continue", why="", **step["leave"]))
        elif "end" in step:
            how = continuation.end(step["end"])
        else:
            how = "nothing was said"
    except SchedulerError as error:
        how = str(error)
    record("ended", how=how)
    return step["code"]


def identify(run, config, job):
    """Make the run directory and an attempt, as a login node looks for them."""
    run.create(config.name)
    config.store(run)
    folder = run.attempt(len(run.attempt_numbers()) + 1)
    folder.mkdir()
    record = {"kind": job.kind, "job_id": job.job_id, "chain": job.chain}
    record |= {"config": config.digest(), "started": time.time()}
    (folder / "attempt.json").write_bytes(sealed(record))


if __name__ == "__main__":
    sys.exit(main())
