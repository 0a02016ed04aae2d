"""NaN and Inf are found among bytes, of every type; and norms are right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.finite import is_floating, look, squares, worst
from hpc_resume.checkpoint.health import BUFFER, OPTIMIZER, PARAMETER
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.snapshot import bytes_of

FLOATING = [name for name in dtypes.ITEM_BYTES if is_floating(name)]


def expected(tensor):
    wide = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    wide = wide.to(torch.float64)
    if wide.isnan().any():
        return "nan"
    return "inf" if wide.isinf().any() else None


def test_all_floating_types_are_known():
    kinds = {name: dtypes.torch_dtype(name) for name in dtypes.ITEM_BYTES}
    assert set(FLOATING) == {n for n, kind in kinds.items() if kind.is_floating_point or kind.is_complex}


@pytest.mark.parametrize("dtype", FLOATING)
@given(data=st.data())
def test_any_bits_are_told_as_pytorch_tells_them(dtype, data):
    """Whatever the bits are: each of the numbers' bytes is arbitrary, signs and payloads of NaN included."""
    size = dtypes.item_bytes(dtype)
    raw = data.draw(st.binary(min_size=size, max_size=8 * size).map(lambda b: b[: len(b) // size * size]))
    tensor = torch.frombuffer(bytearray(raw), dtype=dtypes.torch_dtype(dtype))
    assert worst(bytes_of(tensor), dtype) == expected(tensor)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 40_000, 149_999])
def test_one_among_many_is_found(dtype, value, place):
    tensor = torch.ones(150_000).to(dtypes.torch_dtype(dtype))
    if tensor.is_complex():
        tensor[place] = complex(1, value)
    else:
        tensor[place] = value
    found = worst(bytes_of(tensor), dtype)
    assert found == expected(tensor)
    assert math.isfinite(squares(bytes_of(tensor), dtype)) == (found is None)
    if dtype != "float8_e4m3fn":  # it has no Inf
        assert found == ("nan" if math.isnan(value) else "inf")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int64"])
def test_what_has_no_nan_is_left_alone(dtype):
    assert worst(np.full(64, 0xFF, np.uint8), dtype) is None


@pytest.mark.parametrize("dtype", FLOATING)
def test_squares_are_those_of_the_numbers(dtype):
    tensor = torch.randn(60_001, generator=torch.Generator().manual_seed(1)).to(dtypes.torch_dtype(dtype))
    wide = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    right = wide.to(torch.float64).square().sum().item()
    assert math.isclose(squares(bytes_of(tensor), dtype), right, rel_tol=1e-5)


def test_large_numbers_are_no_infinite_ones():
    large = bytes_of(torch.full((10,), 3e38))
    assert worst(large, "float32") is None
    assert math.isclose(squares(large, "float32"), 9e77, rel_tol=1e-6)


def test_roles_decide_what_is_poison():
    def piece(name, tensor):
        kind = dtypes.name_of(tensor.dtype)
        return Piece(name, kind, tuple(tensor.shape), Box.whole(tensor.shape)), bytes_of(tensor)

    inf, nan, fine = (torch.full((4,), value) for value in (math.inf, math.nan, 2.0))
    large = torch.ones(3000)
    given = {
        "model/a": (fine, (PARAMETER, "model")),
        "model/b": (large, (PARAMETER, "model")),
        "model/bad": (inf, (PARAMETER, "model")),
        "model/mask": (inf, (BUFFER, "model")),
        "model/mean": (nan, (BUFFER, "model")),
        "head/w": (fine.to(torch.bfloat16), (PARAMETER, "head")),
        "optimizer/a": (nan, (OPTIMIZER, "optimizer")),
        "ranks/00000/numbers": (nan, None),
        "count": (torch.tensor([1, 2]), None),
    }
    pieces, data = zip(*(piece(name, tensor) for name, (tensor, _) in given.items()), strict=True)
    found = look(pieces, data, {name: role for name, (_, role) in given.items() if role is not None})
    assert found.poisoned == {"model/bad": "inf", "optimizer/a": "nan"}
    assert found.noticed == {"model/mean": "nan", "ranks/00000/numbers": "nan"}
    assert found.squares == {"head": 16.0}  # of model there is no norm
