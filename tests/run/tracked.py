"""A training whose metrics go to trackers, and that fails on the way."""

import time

import torch

import hpc_resume as hr
from tests.run.training import GLOBAL_BATCH, Samples


def train(steps, tracker, fail_at=None, **options):
    with hr.Run(checkpoint={"every_steps": 4, "every_s": None}, seed=3) as run:
        net = torch.nn.Linear(16, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH)
        run.track(model=net, optimizer=optimizer, data=data)
        board = getattr(run, tracker)(**options)
        assert bool(board) == (run.rank == 0)
        for step, (_, x, y) in run.steps(data, until=steps):
            if step == fail_at:
                run._session.metrics.flush()  # what the second's flush does
                time.sleep(0.3)
                raise ValueError("something in the script")
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss, lr=0.5)


def offline(steps, fail_at=None):
    import os

    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    train(steps, "wandb", fail_at, project="tests")


def in_files(steps, folder, fail_at=None):
    import os

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    train(steps, "mlflow", fail_at, tracking_uri=f"file://{folder}", experiment="tests")
