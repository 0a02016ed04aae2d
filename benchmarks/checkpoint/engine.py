"""Ours, as a benchmark drives it: the calls that ``Run`` makes, without a run."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.hashing import jobs_of
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.shard import ShardWriter
from hpc_resume.checkpoint.snapshot import Camera, Snapshot
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.rundir import RunDirectory


class Ours:
    """One rank's saves and loads.

    Parameters
    ----------
    folder
        For the run directory.
    state
        What is saved, under the key ``state``.
    rank, world_size
        This process's place; rank 0 makes the folder before the others come.
    threads
        That write, copy and read.
    longest_chain
        As in the settings; 0: every save is whole.
    """

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        longest_chain: int = 0,
    ) -> None:
        self.run = RunDirectory(folder)
        if rank == 0:
            folder.mkdir(parents=True)
            self.run.create("benchmark")
            claim_attempt(self.run)
        self._rank, self._world_size, self._threads = rank, world_size, threads
        self._tracked = TrackedState({"state": state}, rank=rank, world_size=world_size)
        self._staging = Staging(self.run, 1, rank, "node", threads=threads, longest_chain=longest_chain)
        self._writer = ShardWriter(threads=threads)
        self._camera = Camera(threads=threads)
        self.step = 0
        self.written_bytes = 0

    @classmethod
    def opened(cls, folder: Path, *, threads: int) -> Ours:
        """Open a folder of checkpoints to read them."""
        engine = cls.__new__(cls)
        engine.run = RunDirectory(folder)
        engine._threads = threads  # noqa: SLF001 - our own
        return engine

    def snapshot(self, *, stage: bool) -> Snapshot:
        """Capture the state; with ``stage`` this is all that stops training."""
        return self._camera.take(self._tracked.capture({}), stage=stage)

    def write(self, snapshot: Snapshot) -> None:
        """Make a snapshot durable on this rank."""
        self.step += 1
        header = Header(
            run_id=self.run.identity()["run_id"],
            attempt=1,
            step=self.step,
            samples=0,
            reason="cadence",
            world_size=self._world_size,
            node_type=None,
            config=None,
            environment={},
        )
        receipt = self._staging.write(header, snapshot)
        assert receipt is not None
        self.written_bytes = receipt.written_bytes

    def commit(self) -> str:
        """Commit the step; one rank does."""
        name = self._staging.commit(self.step)
        self._staging.committed(self.step, name)
        return name

    def save(self) -> None:
        """Save synchronously: durable and committed on return (one rank)."""
        self.write(self.snapshot(stage=False))
        self.commit()

    def load(self, into: dict[str, torch.Tensor], boxes: dict[str, Box] | None = None) -> int:
        """Read the newest checkpoint into tensors; returns the bytes that were read."""
        name, manifest = store.find(self.run)
        with CheckpointReader(self.run.checkpoints / name, manifest, threads=self._threads) as reader:
            reader.read_all(
                Wanted(f"state/{key}", boxes[key] if boxes else Box.whole(tensor.shape), tensor)
                for key, tensor in into.items()
            )
            return reader.bytes_read

    def unhashed_write(self, snapshot: Snapshot) -> float:
        """Seconds of a durable write of a snapshot's shard when its checksums are known already."""
        assert snapshot.arena is not None
        path = self.run.root / "unhashed.h5"
        table = bytes(snapshot.image.table[1])
        begin = time.perf_counter()
        self._writer.write(path, snapshot.image, snapshot.data, table=table, arena=snapshot.arena.bytes)
        taken = time.perf_counter() - begin
        path.unlink()
        return taken

    def hashing(self, snapshot: Snapshot, level: int) -> float:
        """Seconds of hashing all blocks (level 0), or segments (-1), of a snapshot, with as many threads."""
        cuts = [(cut[level],) for cut in snapshot.cuts]
        jobs = list(jobs_of(snapshot.data, cuts))
        table = np.zeros(sum(len(cut) - 1 for (cut,) in cuts), np.uint64)
        begin = time.perf_counter()
        self._writer.hash(jobs, table)
        return time.perf_counter() - begin

    def clear(self) -> None:
        """Remove the committed checkpoints, so that a benchmark does not fill the disk."""
        for name in self.run.checkpoint_names():
            shutil.rmtree(self.run.checkpoints / name)

    def timed_save(self) -> float:
        """Seconds of a synchronous save; what is removed afterwards does not count."""
        begin = time.perf_counter()
        self.save()
        taken = time.perf_counter() - begin
        self.clear()
        return taken
