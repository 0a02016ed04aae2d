"""The trainings that are interrupted: the GPT of the examples, and a classifier of scikit-learn's digits."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from examples.gpt import GPT, Source

#: 1 to 4 ranks divide it.
GLOBAL_BATCH = 12
#: What is lost when an attempt is killed is done again from here.
_SAVE_EVERY = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How an attempt is interrupted.

    Parameters
    ----------
    step
        In the middle of which step.
    how
        ``"signal"``: one rank gets the warning, and all save; ``"kill"``: all are killed at once.
    """

    step: int
    how: str


class Digits(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """1,797 scanned digits of 8 x 8 pixels, each shifted at random when it is loaded."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images / 16.0)
        self.labels: list[int] = digits.target.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shift = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll(shift, (0, 1)), self.labels[index]


class Numbered(torch.utils.data.Dataset[tuple[int, Any]]):
    """Gives each sample with its index."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._dataset[index]


class Classifier(nn.Module):
    """Convolutions, dropout, two linear layers; gives the loss."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(144, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of ``(batch, 8, 8)`` images with ``(batch,)`` labels, in nats."""
        return F.cross_entropy(self.layers(images[:, None]), labels)


class Language(nn.Module):
    """The GPT behind dropout: whole bytes of the window are replaced by spaces."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gpt = GPT(32, 4, 2, 32)
        self.dropout = dropout

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of ``(batch, length + 1)`` windows, in nats."""
        if self.dropout:
            window = window.masked_fill(torch.rand(window.shape) < self.dropout, 32)
        loss: torch.Tensor = self.gpt(window)
        return loss


def train(
    subject: str, sharding: str, steps: int, seed: int, *, dropout: float, double: bool, cut: Cut | None
) -> None:
    """Be one rank of one attempt; what it used and what came of it stands in the run directory.

    Parameters
    ----------
    subject
        ``"gpt"`` or ``"digits"``.
    sharding
        ``"ddp"`` or ``"fsdp2"``.
    steps, seed
        Of the whole run.
    dropout
        Drawn from each rank's own stream, so that it differs between numbers of ranks.
    double
        Compute in float64.
    cut
        Where this attempt is interrupted.
    """
    dtype = torch.float64 if double else torch.float32
    torch.set_default_dtype(dtype)
    saves = {"every_steps": _SAVE_EVERY, "every_s": None}
    with hr.Run(seed=seed, checkpoint=saves) as run:
        run.deterministic()
        model: nn.Module = Language(dropout) if subject == "gpt" else Classifier(dropout)
        model = fully_shard(model) if sharding == "fsdp2" else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
        data = run.loader(Numbered(Source(32) if subject == "gpt" else Digits()), global_batch=GLOBAL_BATCH)
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=data)
        path = run.directory.root / f"samples-{run.attempt:04d}-{run.rank:02d}.txt"
        for step, (indices, sample) in run.steps(data, until=steps):
            with path.open("a") as file:
                file.write(f"{step} {' '.join(map(str, indices.tolist()))}\n")
            if (
                cut is not None and step >= cut.step
            ):  # the stop before may have come a step later than it was asked for
                _be_interrupted(cut, run)
                cut = None
            inputs = sample if isinstance(sample, list) else [sample]
            loss = model(*(each.to(dtype) if each.is_floating_point() else each for each in inputs))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.log(loss=loss)


def _be_interrupted(cut: Cut, run: hr.Run) -> None:
    if cut.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif run.rank == cut.step % run.world_size:
        os.kill(os.getpid(), signal.SIGUSR2)


def samples_used(run_dir: Path) -> dict[int, list[list[int]]]:
    """Read which samples each step used: a list for each time that it was done, in the order of ranks.

    A step that not all ranks had come to when they were killed was not done.
    """
    attempts: dict[str, dict[int, list[int]]] = {}
    for path in sorted(run_dir.glob("samples-*.txt")):
        done = attempts.setdefault(path.name.split("-")[1], {})
        for line in path.read_text().splitlines():
            step, *indices = map(int, line.split())
            done.setdefault(step, []).extend(indices)
    used: dict[int, list[list[int]]] = {}
    for done in attempts.values():
        for step, indices in done.items():
            if len(indices) == GLOBAL_BATCH:
                used.setdefault(step, []).append(indices)
    return used
