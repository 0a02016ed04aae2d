"""What docs/data.md shows is what happens."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import hpc_resume as hr
from tests.run.test_foreign import Stream

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def play(folder, block, **names):
    """Run a block of the page inside of a run, on one rank; returns the variables, and the batches."""
    batches = []
    with hr.Run(folder) as run:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scope = {"run": run, "model": model, "optimizer": optimizer, "train_on": batches.append, **names}
        exec(compile(block, "data.md", "exec"), scope)
    return scope, batches


def test_epochs_end_where_the_page_says(tmp_path, capsys):
    _, batches = play(tmp_path, BLOCKS[0].replace("num_workers=2", "num_workers=0"), dataset=range(100))
    assert capsys.readouterr().out.splitlines() == ["epoch 0 is done", "epoch 1 is done", "epoch 2 is done"]
    assert len(batches) == 5
    used = torch.cat(batches).tolist()
    assert all(sorted(used[at : at + 100]) == list(range(100)) for at in (0, 100, 200))


def test_two_loops(tmp_path):
    steps = []
    both = "data = run.loader(range(100), global_batch=40)\nrun.track(model=model, data=data)\n" + BLOCKS[1]
    _, batches = play(tmp_path, both, scheduler=SimpleNamespace(step=lambda: steps.append(1)))
    assert (len(batches), len(steps)) == (8, 3)


def test_weights_and_lengths(tmp_path):
    both = {"weights": [0.0] * 150 + [1.0] * 50, "lengths": list(range(200))}
    scope, _ = play(tmp_path, BLOCKS[2], dataset=range(200), **both)
    index = next(iter(scope["data"]))
    assert sorted(set(index.tolist())) == sorted(index.tolist())


def test_the_dataset_with_random_crops(tmp_path):
    images = torch.arange(40.0).reshape(10, 4)
    scope, _ = play(tmp_path, BLOCKS[3], torch=torch, np=np, hr=hr, random=random, images=images)
    with hr.Run(tmp_path / "crops") as run:
        one, two = (next(iter(run.loader(scope["Crops"](), global_batch=5))) for _ in range(2))
    assert torch.equal(one, two)


def test_an_iterable_dataset(tmp_path):
    block = BLOCKS[4].replace("num_workers=2", "num_workers=0")
    _, batches = play(tmp_path, block, Stream=Stream)
    assert len(batches) == 12
    assert (
        torch.cat(batches).tolist()
        == [*range(20), *range(20), *range(20), *range(20)][: len(torch.cat(batches))]
    )


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
