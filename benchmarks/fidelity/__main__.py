"""Whether what resumes is what was interrupted.

    $ python -m benchmarks.fidelity --json fidelity.json     # about ten minutes
    $ python -m benchmarks.fidelity --quick

The GPT of the examples and a classifier of scikit-learn's digits, under DDP and FSDP2, are interrupted at 20 random
steps each, by a warning to one rank or by killing all; then

- on the same number of ranks throughout, with dropout: every tensor, value, generator and logged loss must be that of
  the uninterrupted run, bit for bit;
- on numbers of ranks drawn anew from 1 to 4 for each attempt: each step must use the same samples in the same order,
  and the losses differ by rounding alone. That it is rounding is shown by doing the same in float64, where rounding
  is 2^29 times smaller: whatever else made a difference would stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.interrupted import cuts, go, wrong_samples
from hpc_resume.report.comparison import Comparison, compare_runs

SUBJECTS, SHARDINGS = ("gpt", "digits"), ("ddp", "fsdp2")
#: Most that the losses may differ by on other numbers of ranks, relative; in float64, 2^29 times less, with room.
LOSS_32, LOSS_64 = 1e-3, 1e-10
_SIZES = (1, 2, 3, 4)


def _rows(
    folder: Path, subject: str, sharding: str, rng: random.Random, *, steps: int, interruptions: int
) -> Iterator[dict[str, Any]]:
    about = f"{subject}, {sharding}"
    seed = rng.randrange(2**31)

    def pair(name: str, sizes: Sequence[int], alone: int, *, dropout: float, double: bool) -> Comparison:
        how = {"seed": seed, "dropout": dropout, "double": double}
        one, two = folder / f"{name}-whole", folder / f"{name}-interrupted"
        go(one, subject, sharding, steps, sizes=[alone], at=[], **how)
        go(two, subject, sharding, steps, sizes=sizes, at=cuts(rng, steps, interruptions), **how)
        equal = len(set(sizes)) == 1
        found = compare_runs(one, two, generators=equal)
        wrong.append(wrong_samples(one, two))
        return found

    wrong: list[int] = []
    size = rng.choice(_SIZES)
    same = pair("same", [size] * (interruptions + 1), size, dropout=0.1, double=False)
    differing = len(same.differing) + len(same.values) + len(same.logged)
    yield {
        "name": f"{about}, always {size} ranks: tensors, values and losses that are not equal bit for bit",
        "value": differing + (same.steps[0] != same.steps[1]),
        "target": 0,
        "of": same.tensors + same.metrics,
        "interruptions": interruptions,
    }
    apart = []
    for double in (False, True):
        sizes = [rng.choice(_SIZES) for _ in range(interruptions + 1)]
        elastic = pair(f"elastic-{double}", sizes, size, dropout=0.0, double=double)
        if elastic.steps[0] != elastic.steps[1] or not elastic.metrics:
            raise RuntimeError(f"{about}: ended at steps {elastic.steps}")
        apart.append(max((each.relative for each in elastic.logged), default=0.0))
        yield {
            "name": f"{about}, 1 to 4 ranks: largest relative difference of a loss, float{64 if double else 32}",
            "value": apart[-1],
            "target": LOSS_64 if double else LOSS_32,
            "of": elastic.metrics,
            "interruptions": interruptions,
        }
    yield {
        "name": f"{about}: steps with other samples, or in another order, over all these runs",
        "value": sum(wrong),
        "target": 0,
        "of": 3 * steps,
        "interruptions": 3 * interruptions,
    }


def main() -> int:
    """Measure, print, and return 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="3 interruptions in 30 steps instead of 20 in 120"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[f"{a}-{b}" for a in SUBJECTS for b in SHARDINGS])
    options = parser.parse_args()
    how = {"steps": 30, "interruptions": 3} if options.quick else {"steps": 120, "interruptions": 20}
    results = []
    for subject in SUBJECTS:
        for sharding in SHARDINGS:
            if options.only and f"{subject}-{sharding}" not in options.only:
                continue
            begin = time.perf_counter()
            rng = random.Random(f"{options.seed}/{subject}/{sharding}")  # noqa: S311 - nothing secret
            with tempfile.TemporaryDirectory(prefix="hpc-resume-fidelity-") as folder:
                for row in _rows(Path(folder), subject, sharding, rng, **how):
                    met = row["value"] <= row["target"]
                    print(
                        f"{row['value']:<10.3g} (target {row['target']:g})  {row['name']}{'' if met else '  MISSED'}"
                    )
                    sys.stdout.flush()
                    results.append(row)
            sys.stderr.write(f"{subject}, {sharding}: {time.perf_counter() - begin:.0f} s\n")
    if options.json:
        machine = {"processor": platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return int(any(row["value"] > row["target"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
