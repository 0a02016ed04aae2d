"""What a script forgot to track is named."""

import random
import sys
from types import SimpleNamespace

import numpy as np
import torch

from hpc_resume.report.rehearsal import causes
from hpc_resume.run.foreign import ForeignLoader
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.rehearsing import STEP, UNTRACKED, Rehearsing, untracked


def look(**items):
    """As run.steps does: look at whoever calls."""
    return untracked(sys._getframe(1), items)


def model():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def test_a_scheduler_and_generators_that_are_not_tracked_are_named():
    net, optimizer = model()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)  # noqa: F841 - found by name
    noise = torch.Generator()  # noqa: F841
    chance, draw = np.random.default_rng(0), random.Random(0)  # noqa: F841
    names = look(net=net, optimizer=optimizer)
    assert names == ["chance (Generator)", "draw (Random)", "noise (Generator)", "schedule (StepLR)"]


def test_what_is_tracked_and_what_belongs_to_it_is_not_named():
    net, optimizer = model()
    first = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 3)
    second = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [3])
    head = net[1]
    again = torch.nn.Sequential(net)
    loss_fn, kind = torch.nn.MSELoss(), torch.optim.SGD
    assert look(net=net, optimizer=optimizer, schedule=schedule) == []
    del head, again, loss_fn, kind


class Trainer:
    def __init__(self):
        self.net, self.optimizer = model()
        self.teacher = torch.nn.Linear(2, 1)


def test_attributes_of_the_scripts_own_objects_are_looked_at():
    trainer = Trainer()
    assert look(net=trainer.net, optimizer=trainer.optimizer) == ["trainer.teacher (Linear)"]


def test_the_step_and_what_is_not_tracked_are_left_in_the_run_directory(tmp_path):
    net, optimizer = model()
    rehearsing = Rehearsing(tmp_path, sys._getframe(), {"net": net})
    rehearsing.at(7)
    rehearsing.at(8)
    assert int((tmp_path / STEP).read_text()) == 8
    assert (tmp_path / UNTRACKED).read_text() == '["optimizer (SGD)"]'
    del optimizer


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.noise = np.random.default_rng(0)
        self.transforms = [Flip(), torch.nn.Linear(2, 2)]

    def __len__(self):
        return 9


class Flip:
    def __init__(self):
        self.chance = random.Random(0)


class Loader:
    def __init__(self):
        self.dataset = Noisy()


def test_generators_that_a_dataset_keeps_for_itself_are_named():
    ours = ElasticLoader(torch.utils.data.Subset(Noisy(), [1, 2]), 1, rank=0, world_size=1, seed=0)
    theirs = ForeignLoader("stream", Loader(), rank=0, world_size=1, seed=0)
    noisy = theirs.loader.dataset
    names = look(data=ours, stream=theirs)
    assert names == [
        "data.dataset.dataset.noise (Generator)",
        "data.dataset.dataset.transforms[0].chance (Random)",
        "stream.dataset.noise (Generator)",
        "stream.dataset.transforms[0].chance (Random)",
    ]
    assert noisy is not None
    alike = SimpleNamespace(values=[], samples=(0, 0), differing=[])
    kept, *_ = causes(alike, names)
    assert "kept by a dataset for itself" in kept
    assert "stream.dataset.noise (Generator)" in kept
    (forgotten,) = causes(alike, ["dataset (Draws)"])
    assert "give it to run.track" in forgotten
