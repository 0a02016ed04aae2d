"""Random shapes, boxes and layouts for property tests, and the slow truth about them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.dtypes import ITEM_BYTES
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.structure import Structure, TensorRecord

#: The same examples on every machine: a test that fails, fails for everybody.
quick = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
dtypes = st.sampled_from(sorted(ITEM_BYTES))


def boxes_in(shape):
    """Any box in a tensor, empty ones too."""

    def side(extent):
        return st.tuples(st.integers(0, extent), st.integers(0, extent)).map(sorted)

    return st.tuples(*map(side, shape)).map(
        lambda sides: Box(tuple(low for low, _ in sides), tuple(high - low for low, high in sides))
    )


def indices(box):
    """Set of the indices in a box."""
    return (
        set(np.ndindex(*box.size))
        if not any(box.start)
        else {tuple(a + b for a, b in zip(index, box.start, strict=True)) for index in np.ndindex(*box.size)}
    )


@st.composite
def layouts(draw, world_size=8, dimensions=2):
    """Any layout over some ranks of a world."""
    mesh = draw(
        st.lists(st.integers(1, 4), min_size=1, max_size=3)
        .map(tuple)
        .filter(lambda m: math.prod(m) <= world_size)
    )
    ranks = draw(st.permutations(range(world_size)))[: math.prod(mesh)]
    mesh_dims = draw(st.permutations(range(len(mesh))))
    splits = [
        (m, draw(st.integers(0, dimensions - 1))) for m in mesh_dims if dimensions and draw(st.booleans())
    ]
    return Layout(mesh, tuple(ranks), tuple(splits))


@st.composite
def structures(draw, world_size=8):
    """Some tensors, large and small, in some layouts that they share."""
    shared = draw(st.lists(layouts(world_size), min_size=1, max_size=3))
    tensors = {}
    for name in "abcdef"[: draw(st.integers(1, 6))]:
        shape = (
            draw(st.sampled_from([0, 1, 3, 8, 130, 257])),
            draw(st.sampled_from([0, 1, 5, 64, 150])),
            *draw(st.sampled_from([(), (2,)])),
        )
        tensors[name] = TensorRecord(shape, draw(dtypes), draw(st.sampled_from(shared)))
    return Structure(tensors)
