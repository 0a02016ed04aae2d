"""The example model learns, and its data is what it says."""

import importlib.util
from pathlib import Path

import torch

_PATH = Path(__file__).parents[2] / "examples/gpt.py"
_SPEC = importlib.util.spec_from_file_location("example_gpt", _PATH)
gpt = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpt)


def test_the_loss_goes_down():
    torch.manual_seed(0)
    model = gpt.GPT(width=64, heads=4, layers=2, length=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = gpt.Source(48)
    losses = []
    for step in range(40):
        loss = model(torch.stack([data[step * 8 + i] for i in range(8)]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 5.2 < losses[0] < 6  # nearly uniform over 256 bytes: 5.55 nats
    assert sum(losses[-5:]) / 5 < 3.5


def test_a_byte_is_predicted_from_those_before_it_alone():
    torch.manual_seed(0)
    model = gpt.GPT(width=32, heads=4, layers=2, length=16)
    window = torch.randint(256, (1, 17))
    other = window.clone()
    other[0, -1] = (other[0, -1] + 1) % 256
    hidden = []
    model.norm.register_forward_hook(lambda _, __, out: hidden.append(out))
    model(window), model(other)
    assert torch.equal(hidden[0], hidden[1])


def test_the_data_is_the_standard_library():
    data = gpt.Source(64)
    assert len(data) > 10_000
    text = bytes(torch.cat([data[i][:-1] for i in range(3)]).tolist())
    assert text.decode()
    assert torch.equal(data[0][-1], data[1][0])
