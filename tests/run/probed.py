"""A training that is probed, and the ways in which it goes wrong."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from tests.run.training import GLOBAL_BATCH, Samples

FIXED = {"x": torch.linspace(-1, 1, 64).reshape(4, 16), "y": torch.arange(4.0)}


class Scale(torch.nn.Module):
    """Multiplies by what nobody tracks."""

    by = 1.0

    def forward(self, x):
        return x * self.by


def train(
    steps,
    *,
    kind="ddp",
    probed=True,
    batch=FIXED,
    scale=1.0,
    before_step=lambda **_: None,
    broken=None,
    every_steps=2,
    **settings,
):
    """Train with dropout and running means; ``before_step`` may do anything with run, step, net."""
    settings.setdefault("checkpoint", {"every_steps": every_steps, "every_s": None})
    with hr.Run(**settings) as run:
        net = torch.nn.Sequential(
            torch.nn.Linear(16, 8),
            *([torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3)] if kind == "ddp" else []),
            Scale(),
            torch.nn.Linear(8, 1),
        )
        net[-2].by = scale
        if kind == "fsdp":
            fully_shard(net)
        else:
            net = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH)

        def loss_on(fixed):
            torch.rand(3)  # no generator may be left elsewhere
            loss = (net(fixed["x"]).squeeze(-1) - fixed["y"]).square().mean()
            return (
                {"loss": loss, "weights": sum(p.square().sum() for p in net.parameters())}
                if kind == "ddp"
                else loss
            )

        if probed:
            run.probe(broken(net) if broken else loss_on, batch=batch)
        run.track(model=net, optimizer=optimizer, data=data)
        for step, (_, x, y) in run.steps(data, until=steps):
            before_step(run=run, step=step, net=net)
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if run.rank == 0:
                (run.directory.root / "step").write_text(str(step))


def one_rank(run_dir, steps, **options):
    """Train in this process' place as the only rank."""
    train(steps, run_dir=run_dir, **options)
