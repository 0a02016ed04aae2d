"""Every generator of the process, each GPU's too."""

import random

import numpy as np
import pytest
import torch

from hpc_resume.run import generators


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),  # noqa: NPY002 - what users' code draws from
        np.random.randn(),  # noqa: NPY002
        torch.randn(1).item(),
    ]


def test_all_of_the_process_go_on_where_they_were():
    before = generators.capture()
    try:
        generators.seed_all(1, 2, "three")
        draw()
        states = generators.capture()
        expected = draw()
        generators.seed_all(1, 2, "four")
        assert draw() != expected
        generators.restore(states)
        assert draw() == expected
    finally:
        generators.restore(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_each_gpu_has_its_own():
    before = generators.capture()
    devices = range(torch.cuda.device_count())
    try:
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(100 + device)
        states = generators.capture()
        expected = [torch.randn(3, device=f"cuda:{device}").tolist() for device in devices]
        generators.seed_all(5)
        generators.restore(states)
        assert [torch.randn(3, device=f"cuda:{device}").tolist() for device in devices] == expected
    finally:
        generators.restore(before)
