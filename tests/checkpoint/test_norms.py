import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_resume.checkpoint import norms
from hpc_resume.checkpoint.norms import tensor_changes


class Fake:
    """Stands for an open checkpoint: tensors by name, parts of which can be read."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.most = 0

    def names(self):
        return sorted(self.tensors)

    def __contains__(self, name):
        return name in self.tensors

    def record(self, name):
        tensor = self.tensors[name]
        return SimpleNamespace(
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            size_bytes=tensor.numel() * tensor.element_size(),
        )

    def read(self, name, box):
        self.most = max(self.most, box.volume)
        slices = tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))
        return self.tensors[name][slices]


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 20), st.integers(0, 10**6))
def test_pieces_give_what_the_whole_gives(shape, most, seed):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    two = one.clone()
    if two.numel():
        two.reshape(-1)[seed % two.numel()] += 0.5
    left, right = Fake({"x": one}), Fake({"x": two})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_ELEMENTS", most)
        found = tensor_changes(left, right)
    assert left.most <= most
    if not two.numel():
        assert found == []
        return
    (change,) = found
    assert change.norms == pytest.approx((float(one.norm()), float(two.norm())))
    assert change.largest == pytest.approx(0.5)
    assert (change.differing, change.elements) == (1, one.numel())
    assert change.relative == pytest.approx(0.5 / float(one.norm()))


def test_equal_checkpoints_do_not_differ_and_progress_is_told():
    told = []
    tensors = {"a": torch.ones(3), "b": torch.tensor([math.nan, 1.0])}
    assert tensor_changes(Fake(tensors), Fake(dict(tensors)), progress=lambda *each: told.append(each)) == []
    assert told == [(12, 20), (20, 20)]


def test_every_kind_of_difference():
    one = {
        "gone": torch.full((4,), 2.0),
        "shape": torch.ones(2, 3),
        "type": torch.ones(3),
        "long": torch.tensor([2**60, 1]),
        "nan": torch.tensor([1.0, 1.0]),
        "zero": torch.zeros(2),
        "sign": torch.tensor([0.0]),
        "complex": torch.tensor([3 + 4j]),
    }
    two = {
        "new": torch.ones(1),
        "shape": torch.ones(3, 2),
        "type": torch.ones(3, dtype=torch.bfloat16),
        "long": torch.tensor([2**60 + 1, 1]),
        "nan": torch.tensor([1.0, math.nan]),
        "zero": torch.tensor([0.0, 1e-3]),
        "sign": torch.tensor([-0.0]),
        "complex": torch.tensor([3 + 5j]),
    }
    found = {each.name: each for each in tensor_changes(Fake(one), Fake(two))}
    assert set(found) == {"gone", "new", "shape", "type", "long", "nan", "zero", "sign", "complex"}
    assert (found["gone"].kinds, found["gone"].norms[0]) == (("float32 4", ""), 4.0)
    assert math.isnan(found["gone"].norms[1])
    assert found["new"].kinds == ("", "float32 1")
    assert found["shape"].kinds == ("float32 2 x 3", "float32 3 x 2")
    assert (found["type"].kinds, found["type"].differing) == (("float32 3", "bfloat16 3"), 0)
    assert found["long"].differing == 1
    assert (found["nan"].differing, found["nan"].largest) == (1, math.inf)
    assert found["zero"].relative == math.inf
    assert found["zero"].largest_relative == 1.0
    assert (found["sign"].differing, found["sign"].relative) == (0, 0.0)
    assert found["complex"].largest == 1.0
    json = found["nan"].to_json()
    assert (json["largest"], json["norms"][1]) == (None, None)
