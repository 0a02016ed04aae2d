"""Two finished runs, compared: on real checkpoints."""

import math

import pytest
import torch

import hpc_resume as hr
from hpc_resume.report.comparison import compare_runs
from tests.ranks import Attempt


def train(lr=0.1, note="a", *, dtype="float32", more=False, odd=None):
    with hr.Run() as run:
        net = torch.nn.Linear(4, 1, dtype=getattr(torch, dtype))
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        meta = {"note": note, "nan": float("nan")} | ({"more": torch.ones(2)} if more else {})
        data = run.loader(torch.arange(40.0).reshape(10, 4) / 40, global_batch=2)
        run.track(net=net, optimizer=optimizer, meta=meta, data=data)
        for step, x in run.steps(data, until=6):
            loss = net(x.to(net.weight.dtype)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss + 1 if step == odd else loss)


def made(folder, *args, **how):
    attempt = Attempt(folder, 1, train_with, args, how)
    assert attempt.wait() == [0], attempt.log.read_text()
    return folder


def train_with(args, how):
    train(*args, **how)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return made(tmp_path_factory.mktemp("one"))


def test_the_same_training_twice_is_identical(one, tmp_path):
    found = compare_runs(one, made(tmp_path), generators=True)
    assert found.identical
    assert (found.steps, found.samples, found.metrics) == ((6, 6), (12, 12), 6)
    assert found.within(0.0)


def test_what_differs_is_named_with_its_size(one, tmp_path):
    found = compare_runs(one, made(tmp_path, 0.1 * (1 + 1e-6), "b"), generators=True)
    assert not found.identical
    assert {"net/weight", "net/bias"} <= {each.name for each in found.differing}
    assert all(0 < each.relative < 1e-4 for each in found.differing)
    values = {each.name: (each.one, each.two) for each in found.values}
    assert values["meta/note"] == ("a", "b")
    assert values["optimizer/param_groups/0/lr"] == ("0.1", "0.1000001")
    assert found.logged[0].step > 0  # the first loss comes before the first step
    assert found.beyond(1e-3) == ["meta/note"]


def test_a_metric_that_differs_is_found_at_its_step(one, tmp_path):
    found = compare_runs(one, made(tmp_path, odd=3), generators=True)
    assert [(each.step, each.name) for each in found.logged] == [(3, "loss")]
    assert found.beyond(1e-3) == ["loss"]


def test_other_types_and_missing_tensors_are_infinitely_far(one, tmp_path):
    found = compare_runs(one, made(tmp_path, dtype="float64", more=True), generators=True)
    far = {each.name for each in found.differing if math.isinf(each.largest)}
    assert far == {"net/weight", "net/bias", "meta/more"}


def test_chance_allows_what_uninterrupted_runs_show_too(one, tmp_path):
    chance = compare_runs(one, made(tmp_path / "chance", 0.101), generators=False)
    found = compare_runs(one, made(tmp_path / "found", 0.103), generators=False)
    assert not found.within(1e-3)
    assert found.within(1e-3, chance=chance)
    assert not compare_runs(one, made(tmp_path / "far", 0.5), generators=False).within(1e-3, chance=chance)
