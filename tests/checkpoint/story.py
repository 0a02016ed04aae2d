"""A small run on simulated ranks in one process: planning never communicates, so no process group is needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import claim_attempt, finish_earlier_commits
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera, Captured, bytes_of, pieces_of
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.standin import held_box
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.files import Filesystem
from hpc_resume.rundir import RunDirectory

#: Name, shape, type, how it is spread: over rows, the same on all ranks, or rank 0's.
_TENSORS = (
    ("model/w", (300, 64), "float32", "rows"),
    ("model/frozen", (700, 64), "float32", "replicated"),
    ("model/slow", (40, 64), "float32", "rows"),
    ("model/odd", (3,), "bfloat16", "rows"),
    ("optimizer/step", (), "int64", "leader"),
)
#: What changes more rarely than at each save of every ten steps.
_STEPS_OF_A_VALUE = {"model/frozen": 1_000_000, "model/slow": 20}


class Unsynced(Filesystem):
    """The disk, without waiting for it."""

    def fsync(self, fd: int) -> None:
        pass


UNSYNCED = Unsynced()


class World:
    """The ranks of a run: their structures, cameras and values.

    Parameters
    ----------
    size
        Number of ranks.
    replicated
        Every tensor is the same on all ranks, so that any of them can stand in for any other.
    rows
        Scales the tensors.
    """

    def __init__(self, size: int, *, replicated: bool = False, rows: int = 1) -> None:
        self.size = size
        self.rows = rows
        ranks = tuple(range(size))
        layouts = {
            "rows": Layout((size,), ranks, ((0, 0),)),
            "replicated": Layout.replicated(ranks),
            "leader": Layout.replicated((0,)),
        }
        self.structure = Structure(
            {
                name: TensorRecord(self._shape(shape), dtype, layouts["replicated" if replicated else kind])
                for name, shape, dtype, kind in _TENSORS
            }
        )
        self.pieces = [
            (*pieces_of(self.structure, rank), Piece(f"ranks/{rank:05d}/rng", "uint8", (5,), Box.whole((5,))))
            for rank in ranks
        ]
        self.cameras = [Camera(threads=1) for _ in ranks]

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self.rows, *shape[1:]) if len(shape) > 1 else shape

    @cache  # noqa: B019 - worlds live as long as the tests
    def values(self, step: int) -> dict[str, torch.Tensor]:
        """The whole state at a step."""
        found = {}
        for number, (name, shape, dtype, _) in enumerate(_TENSORS):
            seed = 1000 * (step // _STEPS_OF_A_VALUE.get(name, 1)) + number
            generator = torch.Generator().manual_seed(seed)
            raw = torch.randint(0, 2**15, self._shape(shape), generator=generator)
            found[name] = raw.to(getattr(torch, dtype))
        return found

    @cache  # noqa: B019 - as above
    def captured(self, rank: int, step: int) -> Captured:
        """One rank's part of the state at a step."""
        values = dict(self.values(step))
        values[f"ranks/{rank:05d}/rng"] = torch.full((5,), rank, dtype=torch.uint8)
        leaves = {}
        for name, record in self.structure.tensors.items():
            box = held_box(record, rank)
            if box is not None:
                leaves[name] = values[name][box.slices_in(Box.whole(record.shape))]
        return Captured(
            structure=self.structure,
            pieces=self.pieces[rank],
            sources=tuple(
                values[piece.name][piece.box.slices_in(Box.whole(piece.shape))].contiguous()
                for piece in self.pieces[rank]
            ),
            objects={"step": step},
            leaves=leaves,
        )

    def header(self, run: RunDirectory, attempt: int, step: int) -> Header:
        return Header(
            run_id=run.identity()["run_id"],
            attempt=attempt,
            step=step,
            samples=8 * step,
            reason="cadence",
            world_size=self.size,
            node_type=None,
            config=None,
            environment={},
        )

    def assert_whole(self, folder: Path, *, verify: bool = True) -> int:
        """A checkpoint verifies clean and is one whole step, bit for bit; returns the step."""
        manifest = read_manifest(folder)
        if verify:
            assert verify_checkpoint(folder, manifest, threads=1) == []
        assert manifest.objects == {"step": manifest.step}
        with CheckpointReader(folder, manifest, threads=1) as reader:
            values = self.values(manifest.step)
            found = {name: torch.empty_like(value) for name, value in values.items()}
            reader.read_all(Wanted(name, Box.whole(out.shape), out) for name, out in found.items())
            for name, expected in values.items():
                # Not torch.equal: its threads would take longer than all the rest.
                assert bytes_of(found[name]).tobytes() == bytes_of(expected).tobytes(), name
            for rank in set(range(manifest.world_size)) - set(manifest.missing_ranks):
                assert reader.private(rank, f"ranks/{rank:05d}/")["rng"].tolist() == [rank] * 5
        return manifest.step


@dataclass
class Attempt:
    """An attempt of the run.

    Parameters
    ----------
    promised
        Names whose commit has returned.
    failures
        What failed, of those saves that were given up.
    """

    world: World
    run: RunDirectory
    number: int
    fs: Filesystem = UNSYNCED
    stage: bool = False
    direct: bool = True
    threads: int = 1
    promised: list[str] = field(default_factory=list)
    failures: list[OSError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stagings = [
            Staging(
                self.run,
                self.number,
                rank,
                f"node{rank}",
                threads=self.threads,
                direct=self.direct,
                longest_chain=8,
                fs=self.fs,
                clock=lambda: 1.7e9,
            )
            for rank in range(self.world.size)
        ]

    def write(self, step: int, ranks: list[int] | None = None) -> None:
        header = self.world.header(self.run, self.number, step)
        for rank in range(self.world.size) if ranks is None else ranks:
            snapshot = self.world.cameras[rank].take(self.world.captured(rank, step), stage=self.stage)
            self.stagings[rank].write(header, snapshot, only_changed=step % 20 == 0)

    def commit(self, step: int, rank: int = -1) -> str | None:
        name = self.stagings[rank].commit(step)
        if name is not None:
            self.promised.append(name)
            for staging in self.stagings:
                staging.committed(step, name)
        return name

    def close(self) -> None:
        for staging in self.stagings:
            staging.close()

    def save(self, step: int) -> None:
        """As the ranks of a run do it: a save that fails is given up, and training goes on."""
        try:
            self.write(step)
            if self.commit(step) is None:
                raise OSError("nobody has committed")
        except OSError as error:
            self.failures.append(error)
            for staging in self.stagings:
                staging.discard(step)


def begin(
    world: World, run: RunDirectory, promised: list[str], fs: Filesystem = UNSYNCED, **options
) -> Attempt:
    """As rank 0 does it."""
    run.create("story", fs=fs)
    number = claim_attempt(run, fs=fs)
    promised += finish_earlier_commits(run, fs=fs)[0]
    return Attempt(world, run, number, fs, promised=promised, **options)


def three_saves(root: Path) -> RunDirectory:
    """Make a run whose step 20 refers to step 10, and step 30 to both."""
    run = RunDirectory(root / "run")
    attempt = begin(World(1), run, [])
    for step in (10, 20, 30):
        attempt.save(step)
    attempt.close()
    return run


def two_attempts(world, run):
    """Have a run's two attempts save, and return them: steps 20 and 30 refer to the ones before, 40 and 60 to none of them."""
    attempts = []
    for steps in ((10, 20, 30), (40, 60)):
        attempts.append(begin(world, run, []))
        for step in steps:
            attempts[-1].save(step)
        attempts[-1].close()
    return attempts
