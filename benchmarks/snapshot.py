"""What looking at the data costs before a run's first step: reading it once, and then knowing it.

    $ python -m benchmarks.snapshot --json snapshot.json

Two datasets: a few large files, and many small ones. All are in the page cache, so what is compared is the processor's
work and the system calls, not a disk: the least favourable case for us. In turn:

- a snapshot that reads everything, against reading the same files alone, and against hashing them with SHA-256, both
  one after the other as a plain script would;
- a snapshot of what is known from before, against one that reads everything, and, of the small files, against a plain
  walk that asks for each file's size and time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.paired import Result, compare, seconds
from hpc_resume.provenance.datahash import Reading, take_snapshot
from hpc_resume.provenance.hashcache import HashCache

PIECE = 1 << 20


class Dataset:
    """Files to read.

    Parameters
    ----------
    name
        What they are called in the table.
    folder
        Where they go.
    count, size_bytes
        How many, and how long each.
    """

    def __init__(self, name: str, folder: Path, count: int, size_bytes: int) -> None:
        self.name = name
        self.folder = folder
        self.many = count > 100
        block = os.urandom(size_bytes)
        for number in range(count):
            path = folder / f"{number // 500:04}" / f"{number:06}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(number.to_bytes(8, "little") + block[8:])

    def paths(self) -> list[Path]:
        """All files."""
        return [Path(folder) / name for folder, _, names in os.walk(self.folder) for name in names]

    def each_piece(self, use: Callable[[memoryview], object]) -> None:
        """Read every file in pieces."""
        view = memoryview(bytearray(PIECE))
        for path in self.paths():
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(view):
                    use(view[:got])

    def read(self) -> float:
        """Seconds to read all, and do nothing with it."""
        return seconds(lambda: self.each_piece(lambda _: None))

    def sha256(self) -> float:
        """Seconds to hash all, as a script of ten lines would."""
        hasher = hashlib.sha256()
        return seconds(lambda: self.each_piece(hasher.update))

    def walk(self) -> float:
        """Seconds to ask for each file's size and time."""
        return seconds(lambda: [path.stat() for path in self.paths()])

    def snapshot(self, reading: Reading) -> float:
        """Seconds of a snapshot, its digest included."""
        return seconds(lambda: take_snapshot([self.folder], reading).snapshot.digest)


def measure(dataset: Dataset, cache: Path, n: int) -> list[Result]:
    """Measure one dataset."""

    def later() -> float:
        return time.time() + 3600  # nothing was changed just now, as in a dataset that lies there for long

    anew = Reading(cache=None)
    known = Reading(cache=HashCache([cache], clock=later), clock=later)
    dataset.snapshot(known)
    ways = [
        ("reading all, against reading alone", anew, dataset.read),
        ("reading all, against SHA-256", anew, dataset.sha256),
        ("all is known, against reading all", known, lambda: dataset.snapshot(anew)),
    ]
    if dataset.many:
        ways.append(("all is known, against a walk", known, dataset.walk))
    return [
        compare(f"{dataset.name}: {name}", lambda how=how: dataset.snapshot(how), theirs, target=None, n=n)
        for name, how, theirs in ways
    ]


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("-n", type=int, default=7, help="pairs of each comparison")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, count, size_bytes in (
            ("4 files of 64 MB", 4, 64 << 20),
            ("5,000 files of 4 KB", 5000, 4096),
        ):
            dataset = Dataset(name, Path(folder, str(count)), count, size_bytes)
            found += measure(dataset, Path(folder, "cache"), arguments.n)
    result = {"results": [each.to_json() for each in found]}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
