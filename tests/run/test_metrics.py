"""``run.log``: what can't be a number is refused where it is logged."""

import numpy as np
import pytest
import torch

from hpc_resume.errors import UsageError
from hpc_resume.journal import damaged_lines, read_events
from hpc_resume.run.metrics import Metrics


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "metrics.jsonl", clock=lambda: 1.5)


def test_numbers_and_tensors_become_a_line_a_step(metrics, tmp_path):
    metrics.log(0, {"loss": torch.tensor([0.5], requires_grad=True), "lr": np.float32(0.25)})
    metrics.log(0, {"tokens": 12})
    metrics.log(1, {"loss": torch.tensor(float("inf"))})
    metrics.flush()
    assert read_events(tmp_path / "metrics.jsonl") == [
        {"t": 1.5, "loss": 0.5, "lr": 0.25, "tokens": 12.0, "step": 0},
        {"t": 1.5, "loss": float("inf"), "step": 1},
    ]
    assert list(damaged_lines(tmp_path / "metrics.jsonl", sealed=True)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": torch.zeros(2, 3)}, r"loss is a tensor of shape \[2, 3\]"),
        ({"loss": "high"}, "loss is 'high'"),
        ({"loss": None}, "loss is None"),
        ({"loss": [1.0, 2.0]}, "loss is a list"),
        ({"step": 3}, "'step' is recorded by itself"),
        ({"t": 3}, "'t' is recorded by itself"),
    ],
)
def test_what_is_no_number_is_refused_at_once(metrics, tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        metrics.log(0, {"good": 1, **values})
    metrics.flush()
    assert not (tmp_path / "metrics.jsonl").exists()
