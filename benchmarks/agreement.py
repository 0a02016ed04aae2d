"""What the agreement on a stop costs a training loop: 10 ms steps inside ``run.steps`` against a bare loop.

    $ python -m benchmarks.agreement --json agreement.json

Each repeat runs both loops in turn, in one process group of two ranks that meet in a collective at every
step, as training does. ``ratio`` is the median of the ratios of time; ``boundary_us`` the time between two
steps alone, with nothing to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hpc_resume as hr

TARGET = 1.01
RANKS = 2


def _step(tensor: torch.Tensor, seconds: float) -> None:
    """Work for a fixed time, as a GPU would, then meet the other ranks."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        time.sleep(0.0005)
    dist.all_reduce(tensor)


def _measure(rank: int, port: int, run_dir: str, steps: int, repeats: int, pipe: Any) -> None:
    import os

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
        state: dict[str, Any] = {}
        run.track(state=state)
        done = 0
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(steps):
                _step(tensor, 0.01)
            bare_s = time.perf_counter() - begin
            begin = time.perf_counter()
            for _ in run.steps(iter(int, 1), until=done + steps + 1):
                if run.step == done + steps:
                    break
                _step(tensor, 0.01)
            ratios.append((time.perf_counter() - begin) / bare_s)
            done += steps
            begin = time.perf_counter()
            for _ in run.steps(iter(int, 1), until=done + 20_001):
                if run.step == done + 20_000:
                    break
            boundaries.append((time.perf_counter() - begin) / 20_000 * 1e6)
            done += 20_000
            dist.barrier()
    if rank == 0:
        pipe.send((ratios, boundaries))


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    repeats, steps = (3, 100) if arguments.quick else (9, 300)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # frees the port for rank 0
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_measure, args=(rank, port, f"{folder}/run", steps, repeats, theirs))
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
                "spread": [round(min(ratios), 4), round(max(ratios), 4)],
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
