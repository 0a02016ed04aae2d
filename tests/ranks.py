"""Runs functions as ranks: real processes, real gloo, forked from a server that has PyTorch loaded already."""

from __future__ import annotations

import contextlib
import json
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Dynamo, too, which every optimizer imports: else each rank would, and that is most of its time.
_PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "h5py", "hpc_resume.run.run",
]  # fmt: skip


def _context():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _grouped(
    function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple[Any, ...]
):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = function(rank, size, *args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shall see it
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, size, *args)`` on every rank of a process group; returns what each returned."""
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_grouped, args=(function, rank, size, store, theirs, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = []
        for rank, pipe in enumerate(pipes):
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                results.append((False, f"rank {rank} died"))
        for process in processes:
            process.join(20)
            process.kill()
    failures = [text for ok, text in results if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _task(function: Callable[..., Any], environ: dict[str, str], log: str, args: tuple[Any, ...]):
    import torch

    os.environ.update(environ)
    sys.argv = ["train.py"]
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    function(*args)


class Attempt:
    """One allocation of a job: its ranks as processes, under a scheduler that the test plays.

    The test sends the signals; what the ranks read about them stands in ``state``.
    """

    count = 0

    def __init__(
        self, run_dir: Path, size: int, function: Callable[..., Any], *args: Any, job: str = "job-1"
    ):
        run_dir.mkdir(exist_ok=True, parents=True)
        restarts = len(list(run_dir.glob(f"state-{job}-*.json")))
        self.run_dir = run_dir
        self.state_path = run_dir / f"state-{job}-{restarts}.json"
        self.log = run_dir / f"log-{job}-{restarts}.txt"
        self.tell(job_id=job, restarts=restarts, node_type=f"cpu-{size}", ranks=size)
        self.processes = []
        for rank in range(size):
            environ = {
                "HPC_RESUME_RUN_DIR": str(run_dir),
                "HPC_RESUME_JOB_STATE": str(self.state_path),
                "HPC_RESUME_RESTART_COUNT": str(restarts),
                "SUBMITIT_LOCAL_JOB_ID": job,
                "SUBMITIT_LOCAL_NTASKS": str(size),
                "SUBMITIT_LOCAL_GLOBALID": str(rank),
                "SUBMITIT_LOCAL_LOCALID": str(rank),
            }
            process = _context().Process(target=_task, args=(function, environ, str(self.log), args))
            process.start()
            self.processes.append(process)

    def tell(self, **fields: Any) -> None:
        """Set what the ranks read about their job."""
        state = {
            "schema": 1,
            "job_id": "",
            "state": "RUNNING",
            "run_dir": str(self.run_dir),
            "reason": None,
            "restarts": 0,
            "preempt_time": None,
            "end_time": None,
            "exit_codes": [],
        }
        if self.state_path.exists():
            state = json.loads(self.state_path.read_text())
        self.state_path.write_text(json.dumps({**state, **fields}))

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to all or some ranks."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):  # it may have left just now
                os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float = 180) -> list[int]:
        """Wait for the ranks; returns their exit codes."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
            if process.exitcode is None:
                for other in self.processes:
                    other.kill()
                raise AssertionError(f"rank still runs after {timeout_s} s; log:\n{self.log.read_text()}")
        return [process.exitcode for process in self.processes]

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        """Wait until rank 0 has completed some steps, as a file that the training function writes says."""
        self.wait_until(lambda: steps_done(self.run_dir) >= step, timeout_s)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"in vain; log:\n{self.log.read_text()}"
            assert any(p.is_alive() for p in self.processes), f"all died; log:\n{self.log.read_text()}"
            time.sleep(0.01)


def steps_done(run_dir: Path) -> int:
    """Steps that rank 0 has begun, as :func:`tests.run.training.train` notes them."""
    try:
        return int((run_dir / "step").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0
