"""What it costs to load by run.loader: against PyTorch's DataLoader, and when a run goes on.

    $ python -m benchmarks.loading --json loading.json

One rank, no workers, global batches of 64 samples that cost nothing: all that is measured is what stands between
the loop and the dataset. ``resume`` is the time to the first batch of a run that goes on after a billion samples,
against one that begins; the dataset has ten million.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.paired import Result, compare
from hpc_resume.run.loader import ElasticLoader

BATCH, BATCHES, SIZE, LONG = 64, 100, 200_000, 10_000_000
#: Once over one, as far as can be measured: going on from anywhere costs the same.
RESUME = 1.2


def _seconds(function: Callable[[], Any]) -> float:
    """CPU time of one call: it is all in this process, and other work of the machine is not meant."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _ours(dataset: Any, **options: Any) -> ElasticLoader:
    return ElasticLoader(dataset, BATCH, rank=0, world_size=1, seed=0, **options)


def _take(batches: Iterator[Any]) -> Callable[[], float]:
    def some() -> None:
        for _ in range(BATCHES):
            next(batches)

    return lambda: _seconds(some)


def _resume(loader: ElasticLoader, samples: int) -> Callable[[], float]:
    loader.samples = samples // BATCH * BATCH
    return lambda: _seconds(lambda: next(iter(loader)))


def _row(name: str, n: int, **options: Any) -> Result:
    ours = _take(iter(_ours(range(SIZE), **options)))
    theirs = _take(_endless(DataLoader(range(SIZE), BATCH, shuffle=True, drop_last=True)))  # type: ignore[arg-type]
    found = compare(f"{name}, against DataLoader", ours, theirs, target=None, n=n)
    samples = BATCH * BATCHES
    more_s = found.details["ours_s"] - found.details["theirs_s"]
    found.details["adds_us_per_sample"] = round(more_s / samples * 1e6, 2)
    return found


def measure(n: int) -> list[Result]:
    """Measure all rows, each ``n`` times."""
    lengths = torch.randint(1, 1000, (SIZE,)).numpy()
    long = {"weights": torch.rand(LONG).numpy()}
    rows = [
        _row("shuffled, not seeded", n, augment_seed=False),
        _row("shuffled, seeded", n),
        _row("by length, not seeded", n, augment_seed=False, lengths=lengths),
        _row("by weight, not seeded", n, augment_seed=False, weights=lengths),
    ]
    for name, options in (("shuffled", {}), ("by weight", long)):
        here, there = _ours(range(LONG), **options), _ours(range(LONG), **options)
        late, early = _resume(here, 1_000_000_000), _resume(there, 0)
        rows.append(
            compare(f"resume, {name}: after 1e9 samples, against 0", late, early, target=RESUME, n=5 * n)
        )
    return rows


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"results": [row.to_json() for row in measure(3 if arguments.quick else 9)]}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
