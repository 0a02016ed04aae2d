"""What the agreement on a stop costs a training loop: 10 ms steps inside ``run.steps`` against a bare loop.

    $ python -m benchmarks.agreement --json agreement.json

Both loops run in turn, in one process group of two ranks that meet in a collective at every step, as training
does. ``ratio`` is the median of the ratios of time, ``boundary_us`` the time between two steps alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hpc_resume as hr

TARGET = 1.01
RANKS = 2
#: In each turn.
STEPS = 30


def _step(tensor: torch.Tensor) -> None:
    """Work for a fixed time, as a GPU would, then meet the other ranks."""
    end = time.perf_counter() + 0.010
    while time.perf_counter() < end:
        pass
    dist.all_reduce(tensor)


def _some_steps(run: hr.Run, count: int) -> Iterator[int]:
    """Give the next steps of a run that has no end."""
    last = run.step + count
    for step, _ in run.steps(itertools.repeat(None), until=1_000_000_000):
        if step == last:
            return
        yield step


def _measure(rank: int, port: int, run_dir: str, repeats: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    ratios, boundaries = [], []
    with hr.Run(run_dir, checkpoint={"every_s": None}) as run:
        tensor = torch.zeros(1000)
        run.track(state={})
        for repeat in range(repeats):
            times = {}
            # In turn, and in the other order the next time: whatever drifts, drifts for both.
            for kind in ("bare", "run")[:: 1 if repeat % 2 else -1]:
                begin = time.perf_counter()
                for _ in range(STEPS) if kind == "bare" else _some_steps(run, STEPS):
                    _step(tensor)
                times[kind] = time.perf_counter() - begin
            ratios.append(times["run"] / times["bare"])
        for _ in range(20):
            begin = time.perf_counter()
            for _ in _some_steps(run, 5000):
                pass
            boundaries.append((time.perf_counter() - begin) / 5000 * 1e6)
            dist.barrier()
    if rank == 0:
        pipe.send((ratios, boundaries))


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    repeats = 20 if arguments.quick else 100
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # frees the port for rank 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_measure, args=(rank, port, f"{folder}/run", repeats, theirs))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        ratios, boundaries = ours.recv()
        for process in ranks:
            process.join()
    result = {
        "results": [
            {
                "name": "10 ms steps in run.steps against a bare loop",
                "ratio": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios)[::2]],
                "target": TARGET,
                "n": len(ratios),
                "boundary_us": round(statistics.median(boundaries), 2),
            }
        ]
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
