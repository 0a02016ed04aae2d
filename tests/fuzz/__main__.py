"""The coverage-guided fuzzer: ``make fuzz``, or

    $ python -m tests.fuzz --seconds 60 [TARGET…]

Needs atheris (``pip install -e '.[fuzz]'``). A crash is any exception that is not one of ours, more than a second of
processor time, or half a gigabyte of memory beyond what the libraries take; its input is then in
``.cache/fuzz/TARGET/``, and belongs into ``tests/fuzz/found/``, where the suite replays it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CACHE = REPOSITORY / ".cache" / "fuzz"
#: Beyond what is taken when it begins.
MEMORY_MB = 512
CPU_S = 1.0
#: Names of the functions in :mod:`tests.fuzz.targets`, which must be imported late: by who instruments it.
TARGETS = ("manifest", "index", "shard", "typed", "structure", "records")
LONGEST_BYTES = 100_000


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["hpc_resume"]):
        from tests.fuzz import targets
    import torch

    from tests.fuzz.mutate import mutate
    from tests.hostile.base import make_run

    torch.set_num_threads(1)
    corpus = CACHE / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in targets.seeds(name, make_run(Path(folder) / "run").root):
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)

    def one_input(data: bytes) -> None:
        begun = time.process_time()
        targets.run_target(name, data)
        took_s = time.process_time() - begun
        if took_s > CPU_S:
            raise TimeoutError(f"took {took_s:.1f} s")

    def custom_mutator(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3:
            return atheris.Mutate(data, longest)
        return mutate(data, rng, name)[:longest]

    now_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_BYTES}",
        f"-rss_limit_mb={now_mb + MEMORY_MB}",
        "-timeout=60",  # of the clock, on a machine that has other things to do
        f"-artifact_prefix={CACHE / name}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


def main() -> int:
    """Fuzz targets, one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET")
    arguments = parser.parse_args()
    if arguments.one:
        fuzz(arguments.one, arguments.seconds)
    chosen = arguments.targets or TARGETS
    failed = 0
    for name in chosen:
        seconds = max(arguments.seconds // len(chosen), 1)
        words = [
            "nice",
            "-n",
            "19",
            sys.executable,
            "-m",
            "tests.fuzz",
            "--one",
            name,
            "--seconds",
            str(seconds),
        ]
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        coverage = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
        cov, features, size = coverage[-1] if coverage else ("?", "?", "?")
        sys.stdout.write(
            f"{name}: {runs[1] if runs else '?'} executions, {cov} places covered, {features} features, "
            f"{size} inputs in the corpus\n"
        )
        if done.returncode:
            failed = 1
            sys.stdout.write(
                "\n".join([*done.stdout.splitlines()[-40:], *done.stderr.splitlines()[-40:], ""])
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
