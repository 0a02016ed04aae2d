"""What does not fit is told before anything is changed."""

import pytest
import torch

from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import MismatchError
from tests.checkpoint.fakes import make_run, same_bits, save_as


class Pair(torch.nn.Module):
    def __init__(self, *, tied, value=1.0, other=1.0, dtype=torch.float32):
        super().__init__()
        self.a = torch.nn.Linear(300, 80, bias=False, dtype=dtype)
        self.b = torch.nn.Linear(300, 80, bias=False, dtype=dtype)
        torch.nn.init.constant_(self.a.weight, value)
        torch.nn.init.constant_(self.b.weight, other)
        if tied:
            self.b.weight = self.a.weight


def saved(tmp_path, net):
    run = make_run(tmp_path)
    name, manifest = save_as(run, 1, lambda rank: {"net": net})
    return CheckpointReader(run.checkpoints / name, manifest)


def test_tied_weights_that_differ_in_the_checkpoint_are_told(tmp_path):
    net = Pair(tied=True, value=5)
    with saved(tmp_path, Pair(tied=False, value=1, other=2)) as reader:
        with pytest.raises(
            MismatchError, match=r"net/a\.weight, net/b\.weight: one tensor in the model, two that"
        ):
            TrackedState({"net": net}, rank=0, world_size=1).restore(reader)
        assert (net.a.weight == 5).all(), "nothing was changed"


def test_tied_weights_that_are_stored_twice_but_alike_fit(tmp_path):
    net = Pair(tied=True, value=5)
    with saved(tmp_path, Pair(tied=False, value=torch.nan, other=torch.nan)) as reader:
        TrackedState({"net": net}, rank=0, world_size=1).restore(reader)
    assert net.b.weight is net.a.weight
    assert net.a.weight.isnan().all()


def test_weights_that_were_tied_fit_those_that_are_not(tmp_path):
    net = Pair(tied=False, value=5, other=6)
    with saved(tmp_path, Pair(tied=True, value=3)) as reader:
        TrackedState({"net": net}, rank=0, world_size=1).restore(reader)
    assert (net.a.weight == 3).all()
    assert (net.b.weight == 3).all()
    assert net.b.weight is not net.a.weight


def test_another_type_is_told(tmp_path):
    net = Pair(tied=False, dtype=torch.bfloat16, value=5, other=5)
    told = r"net/a\.weight: bfloat16, in the checkpoint float32"
    with saved(tmp_path, Pair(tied=False)) as reader, pytest.raises(MismatchError, match=told):
        TrackedState({"net": net}, rank=0, world_size=1).restore(reader)
    assert same_bits(net.a.weight, torch.full((80, 300), 5, dtype=torch.bfloat16))
