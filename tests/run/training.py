"""The training that the tests of ``run`` interrupt: small, with everything that must come back."""

import time
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr

GLOBAL_BATCH = 12


class Samples(torch.utils.data.Dataset):
    """Regression samples, a function of the index."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        x = torch.randn(16, generator=torch.Generator().manual_seed(index))
        return index, x, x.sum().sin()


def train(
    steps=40,
    *,
    step_s=0.0,
    kind="ddp",
    optimizer="AdamW",
    fail_at=None,
    hang_at=None,
    every_steps=None,
    **settings,
):
    """Train; note every sample that was used, and every step that was begun."""
    if every_steps:
        settings["checkpoint"] = {"every_steps": every_steps, "every_s": None}
    with hr.Run(**settings) as run:
        net = torch.nn.Sequential(
            torch.nn.Linear(16, 64),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1 if kind == "ddp" else 0.0),
            torch.nn.Linear(64, 1),
        )
        if kind == "fsdp":
            fully_shard(net)
        else:
            net = DistributedDataParallel(net)
        optimizer = getattr(torch.optim, optimizer)(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH)
        meta = {"best": float("inf")}
        run.track(model=net, optimizer=optimizer, scheduler=scheduler, data=data, meta=meta)
        folder = run.directory.root
        for step, (index, x, y) in run.steps(data, until=steps):
            if run.rank == 0:
                (folder / "step").write_text(str(step))
            with Path(folder / f"samples-{run.attempt}-{run.rank}.txt").open("a") as file:
                file.write(f"{step} {' '.join(map(str, index.tolist()))}\n")
            if step == fail_at:
                raise ValueError("something in the script")
            if step == hang_at:
                time.sleep(1000)
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            meta["best"] = min(meta["best"], step)
            run.log(loss=loss)
            if step_s:
                time.sleep(step_s)


def train_slowly(seed, gates, steps):
    """Train, each step slowly until there is a file ``GATES/SEED``: then the run finishes."""
    with hr.Run(checkpoint={"every_steps": 5, "every_s": None}, seed=seed) as run:
        net = torch.nn.Linear(16, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH)
        run.track(model=net, optimizer=optimizer, data=data)
        for _, (_, x, y) in run.steps(data, until=steps):
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)
            if not Path(gates, str(seed)).exists():
                time.sleep(0.8)
