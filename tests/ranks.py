"""Runs a function on several ranks: real processes, real gloo, started from a warm server."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "h5py",
    "hpc_resume.checkpoint.state",
]


def _child(function: Callable[..., Any], rank: int, size: int, store: str, pipe: Any, args: tuple[Any, ...]):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = function(rank, size, *args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps((True, result)))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shall see it
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, size, *args)`` on every rank; returns what each returned."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(function, rank, size, store, theirs, args))
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
