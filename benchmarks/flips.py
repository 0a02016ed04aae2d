"""Single bits flipped anywhere in the checkpoints of a run: whether each is found, and none is ever loaded.

    $ python -m benchmarks.flips --json flips.json

The run has a full checkpoint and some that refer to it and to each other for what has not changed. A bit is
flipped in a file, the checkpoint is verified, every tensor of the newest one is read, and the bit is flipped
back. ``ratio`` is the part of the flips that verification found; ``loaded`` counts those after which a reader
handed out anything else than what was saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted, tensor_like
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.errors import IntegrityError
from hpc_resume.rundir import RunDirectory

TARGET = 1.0
#: Checkpoints after the first.
CHAIN = 3


def make_chain(root: Path, *, rows: int = 160, chain: int = CHAIN) -> RunDirectory:
    """Save a small state, change some rows, and save what has changed, a few times over."""
    run = RunDirectory(root)
    run.create("flips")
    attempt = claim_attempt(run)
    generator = torch.Generator().manual_seed(0)
    items = {
        "table": {"rows": torch.randn(rows, 256, generator=generator)},
        "rest": {"halves": torch.randn(3000, generator=generator).bfloat16(), "count": torch.tensor(7)},
    }
    state = TrackedState(items, rank=0, world_size=1)
    staging = Staging(run, attempt, 0, "node0", longest_chain=8)
    camera = Camera()
    for step in range(1, chain + 2):
        header = Header(
            run_id=run.identity()["run_id"],
            attempt=attempt,
            step=step,
            samples=step,
            reason="cadence",
            world_size=1,
            node_type=None,
            config=None,
            environment={},
        )
        captured = state.capture({"rng": torch.arange(100, dtype=torch.uint8)})
        staging.write(header, camera.take(captured, stage=False), only_changed=step > 1)
        staging.committed(step, staging.commit(step))
        items["table"]["rows"][(step * 40) % rows :][:20] += 1
    staging.close()
    return run


@dataclass(frozen=True, slots=True)
class Flip:
    """What came of a flipped bit: was it found by verification; was something wrong loaded, or refused."""

    path: Path
    offset: int
    bit: int
    found: bool
    loaded: bool
    refused: bool


class Flipper:
    """Flips bits of a run that is whole, one at a time, and looks whether that shows.

    Parameters
    ----------
    run
        The run.
    seed
        Of the choice of bits.
    """

    def __init__(self, run: RunDirectory, *, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        names = run.checkpoint_names()
        self._manifests = {name: read_manifest(run.checkpoints / name) for name in names}
        self._newest = run.checkpoints / names[-1]
        self._expected = self._read()
        self._files = sorted(path for name in names for path in (run.checkpoints / name).iterdir())
        self._sizes = [path.stat().st_size for path in self._files]

    def flips(self, count: int) -> Iterator[Flip]:
        """Flip bits, one after the other, each file by its size."""
        for path in self._random.choices(self._files, self._sizes, k=count):
            offset = self._random.randrange(path.stat().st_size)
            yield self.flip(path, offset, self._random.randrange(8))

    def flip(self, path: Path, offset: int, bit: int) -> Flip:
        """Flip one bit, look, and flip it back."""
        fd = os.open(path, os.O_RDWR)
        try:
            before = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([before[0] ^ 1 << bit]), offset)
            try:
                found = self._found(path)
                try:
                    loaded, refused = not self._same(self._read()), False
                except IntegrityError:
                    loaded, refused = False, True
            finally:
                os.pwrite(fd, before, offset)
        finally:
            os.close(fd)
        return Flip(path, offset, bit, found, loaded, refused)

    def _found(self, path: Path) -> bool:
        if path.name != MANIFEST:
            return bool(verify_checkpoint(path.parent, self._manifests[path.parent.name], threads=1))
        try:
            read_manifest(path.parent)
        except IntegrityError:
            return True
        return False

    def _read(self) -> dict[str, torch.Tensor]:
        manifest: Manifest = read_manifest(self._newest)
        found = {
            name: tensor_like(record, dtype=None, device="cpu") for name, record in manifest.tensors.items()
        }
        with CheckpointReader(self._newest, manifest, threads=1) as reader:
            reader.read_all(Wanted(name, Box.whole(out.shape), out) for name, out in found.items())
            return {**found, **reader.private(0, "ranks/")}

    def _same(self, found: dict[str, torch.Tensor]) -> bool:
        return found.keys() == self._expected.keys() and all(
            torch.equal(found[name], tensor) for name, tensor in self._expected.items()
        )


def measure(folder: Path, count: int) -> dict[str, object]:
    """Flip bits and count what came of them."""
    flips = list(Flipper(make_chain(folder)).flips(count))
    return {
        "name": "flipped bits found, of all that were flipped",
        "ratio": sum(flip.found for flip in flips) / count,
        "target": TARGET,
        "n": count,
        "in_manifests": sum(flip.path.name == MANIFEST for flip in flips),
        "refused_by_a_restore": sum(flip.refused for flip in flips),
        "loaded": sum(flip.loaded for flip in flips),
    }


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {"results": [measure(Path(folder) / "run", 1_000 if arguments.quick else 10_000)]}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
