"""The small real run from which hostile ones are made: a full checkpoint of two ranks and one that refers to it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.placement import local_of
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera, Captured, pieces_of
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.standin import held_box
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.journal import Journal
from hpc_resume.run import generators
from hpc_resume.rundir import RunDirectory, sealed

RANKS = 2
#: Steps of the full checkpoint and of the one that refers to it.
FULL, CHANGED = 7, 8


class Net(torch.nn.Module):
    """A weight of several blocks, one of another type, a tied one, a buffer, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(128, 384)
        self.low = torch.nn.Parameter(torch.arange(60).reshape(5, 12).bfloat16())
        self.tied = self.up.bias
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.zeros(0, 4))


def items(seed: int) -> dict:
    """Objects to track: the values depend on the seed, the structure does not."""
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        net.up.weight.copy_(torch.arange(net.up.weight.numel()).reshape(384, 128) % (97 + seed))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.up(torch.ones(2, 128)).sum().backward()
    optimizer.step()
    extra = {"best": float("inf"), "when": (1, 2), 3: Counter("ab"), "np": np.arange(5), "seed": seed}
    return {"model": net, "optimizer": optimizer, "extra": extra}


def tracked(seed: int) -> TrackedState:
    """The same as one process tracks it."""
    return TrackedState(items(seed), rank=0, world_size=1)


class Writer:
    """Saves the state of a single process as so many ranks of FSDP would."""

    def __init__(self, root: Path, ranks: int = RANKS) -> None:
        self.run = RunDirectory(root)
        self.run.create("hostile", clock=lambda: 1.7e9)
        self._ranks = ranks
        attempt = claim_attempt(self.run)
        self._stagings = [
            Staging(self.run, attempt, rank, f"node{rank}", longest_chain=8, clock=lambda: 1.7e9)
            for rank in range(ranks)
        ]
        self._cameras = [Camera() for _ in range(ranks)]
        self._pieces: dict[int, tuple[Piece, ...]] = {}
        record = {"schema": 2, "attempt": attempt, "job_id": "1", "world_size": ranks, "started": 1.7e9}
        (self.run.attempt(attempt) / "attempt.json").write_bytes(sealed(record))
        journal = Journal(self.run.attempt(attempt) / "events.jsonl", clock=lambda: 1.7e9)
        journal.event("fresh", step=0)
        journal.close()

    def save(self, step: int, state: TrackedState, *, only_changed: bool = False) -> str:
        """Save and commit; returns the checkpoint's name."""
        captured = state.capture({})
        structure = self._spread(captured.structure)
        header = Header(
            run_id=self.run.identity()["run_id"],
            attempt=1,
            step=step,
            samples=10 * step,
            reason="cadence",
            world_size=self._ranks,
            node_type="cpu",
            config=None,
            environment={"python": "3"},
        )
        for rank, staging in enumerate(self._stagings):
            part = self._part(captured, structure, rank)
            staging.write(header, self._cameras[rank].take(part, stage=False), only_changed=only_changed)
        name = self._stagings[0].commit(step)
        for staging in self._stagings:
            staging.committed(step, name)
        return name

    def close(self) -> None:
        for staging in self._stagings:
            staging.close()

    def _spread(self, structure: Structure) -> Structure:
        """Matrices by rows or columns, the rest as replicas."""
        ranks = tuple(range(self._ranks))
        layouts = [Layout((self._ranks,), ranks, ((0, dim),)) for dim in range(2)]
        everybody = Layout.replicated(ranks)
        records = {}
        for name, record in structure.tensors.items():
            layout = everybody
            if len(record.shape) == 2:
                layout = layouts[name.startswith("optimizer") or "columns" in name]
            records[name] = TensorRecord(record.shape, record.dtype, layout)
        return Structure(records)

    def _part(self, captured: Captured, structure: Structure, rank: int) -> Captured:
        own = {**generators.capture(), "objects": torch.zeros(64, dtype=torch.uint8)}
        if rank not in self._pieces:
            private = [
                Piece(
                    f"ranks/{rank:05d}/{name}",
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    Box.whole(tensor.shape),
                )
                for name, tensor in own.items()
            ]
            self._pieces[rank] = (*pieces_of(structure, rank), *private)
        pieces = self._pieces[rank]
        sources = []
        for piece in pieces[: len(pieces) - len(own)]:
            held = held_box(structure.tensors[piece.name], rank)
            whole = Box.whole(piece.shape)
            assert held is not None
            sources.append(local_of(captured.leaves[piece.name])[piece.box.slices_in(whole)])
        return Captured(
            structure=structure,
            pieces=pieces,
            sources=(*sources, *own.values()),
            objects=captured.objects,
            leaves=captured.leaves,
        )


def make_run(root: Path) -> RunDirectory:
    """Make the run: step 7 whole; step 8, of which a part has changed."""
    objects = items(1)
    state = TrackedState(objects, rank=0, world_size=1)
    writer = Writer(root)
    writer.save(FULL, state)
    with torch.no_grad():
        objects["model"].up.weight[:40] += 1
    writer.save(CHANGED, state, only_changed=True)
    writer.close()
    return writer.run
