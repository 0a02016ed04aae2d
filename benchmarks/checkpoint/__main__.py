"""The checkpoint engine against the raw limits and against torch.distributed.checkpoint (DCP).

    $ python -m benchmarks.checkpoint --json checkpoint.json          # about 15 minutes, 8 GB of disk
    $ python -m benchmarks.checkpoint --quick                         # about 2 minutes
    $ python -m benchmarks.checkpoint --only loads --only saves

Everything is measured in turn in one run. ``ratio`` is the median of the ratios of pairs, ours over theirs; a row
without a target only tells.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.checkpoint import ranks, scale, single
from benchmarks.checkpoint.picture import draw
from benchmarks.paired import Result

_IN_A_FOLDER: dict[str, Callable[..., Iterator[Result]]] = {
    "saves": single.saves,
    "async": single.async_saves,
    "steps": single.slowed_steps,
    "loads": single.loads,
    "small": single.small_tensors,
    "incremental": single.incremental,
    "ranks": ranks.four_ranks,
    "resharding": ranks.resharding,
}
_IN_MEMORY: dict[str, Callable[..., Iterator[Result]]] = {
    "planning": scale.planning,
    "manifests": scale.manifests,
}


def _measure(only: list[str], base: Path | None, *, quick: bool) -> Iterator[Result]:
    for name, function in (_IN_A_FOLDER | _IN_MEMORY).items():
        if only and name not in only:
            continue
        begin = time.perf_counter()
        if name in _IN_MEMORY:
            yield from function(quick=quick)
        else:
            folder = Path(tempfile.mkdtemp(dir=base, prefix="hpc-resume-benchmark-"))
            try:
                if function.__module__ == single.__name__:
                    _single_process_group()
                yield from function(folder, quick=quick)
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
                shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"{name}: {time.perf_counter() - begin:.0f} s\n")


def _single_process_group() -> None:
    """DCP's async mode in a process of its own wants one, with an address that it can derive a second one from."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")


def main() -> None:
    """Run the benchmarks and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="an SVG or PNG of the ratios")
    parser.add_argument(
        "--quick", action="store_true", help="small states, few repeats: the figures say little"
    )
    parser.add_argument("--only", action="append", default=[], choices=[*_IN_A_FOLDER, *_IN_MEMORY])
    parser.add_argument(
        "--folder", type=Path, help="on the filesystem to be measured; by default the system's /tmp"
    )
    arguments = parser.parse_args()
    results = []
    for result in _measure(arguments.only, arguments.folder, quick=arguments.quick):
        results.append(result)
        target = "" if result.target is None else f"(target {result.target:g})"
        mark = "" if result.met else "  MISSED"
        print(f"{result.ratio:8.3f} {target:15} {result.name}{mark}", flush=True)
    record = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
        },
        "results": [result.to_json() for result in results],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
