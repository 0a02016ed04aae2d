import doctest
import math

import pytest

from hpc_resume.policy import validation
from hpc_resume.policy.validation import coarsest, differences, other_numerics, probe_fits, usual_norms


def test_what_the_docstrings_show_is_so():
    assert doctest.testmod(validation).failed == 0


@pytest.mark.parametrize(
    ("before", "now", "tolerance", "alike"),
    [
        (1.0, 1.0, None, True),
        (1.0, math.nextafter(1.0, 2.0), None, False),
        (1.0, 1.00001, 2e-5, True),
        (1.0, 1.00003, 2e-5, False),
        (math.nan, math.nan, None, True),
        (math.inf, math.inf, 1e-3, True),
        (1.0, math.nan, 0.5, False),
        (math.inf, -math.inf, 0.5, False),
        (0.0, 1e-9, 2e-5, True),
        (0.0, 1e-6, 2e-5, False),
    ],
)
def test_values_are_compared(before, now, tolerance, alike):
    assert (not list(differences({"x": before}, {"x": now}, tolerance=tolerance))) == alike


def test_what_came_and_went_is_told():
    assert list(differences({"a": 1.0}, {"b": 1.0}, tolerance=1e-3)) == ["a is gone", "b is new"]


def test_the_coarsest_precision_counts():
    assert coarsest(["fp64", "fp32"]) == "fp32"
    assert coarsest(["fp32", "bf16", "fp16"]) == "bf16"
    assert coarsest(["fp64"]) == "fp64"
    assert coarsest([]) == "fp32"


def test_numerics_that_differ_are_named():
    assert other_numerics({"torch": "2.6", "threads": 4}, {"torch": "2.6", "threads": 8}) == [
        "threads 4, now 8"
    ]
    assert other_numerics({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize(
    ("left_s", "probe_s", "save_s", "fits"),
    [
        (None, 4.9, 100.0, True),
        (None, 5.1, None, False),
        (100.0, 9.0, None, True),
        (100.0, 11.0, None, False),
        (14.0, 1.0, 10.0, True),
        (13.0, 1.0, 10.0, False),
        (4.0, 3.0, 1.0, True),
    ],
)
def test_a_probe_never_costs_a_save(left_s, probe_s, save_s, fits):
    assert probe_fits(left_s, probe_s, save_s) is fits


def test_norms_are_usual_once_there_are_three():
    assert usual_norms([]) == {}
    assert usual_norms([{"a": 1.0}] * 2) == {}
    assert usual_norms([{"a": 1.0}, {"a": 1.0}, {"a": 9.0}]) == {"a": 1.0}
    assert usual_norms([{"a": 100.0}] + [{"a": 1.0}] * 8) == {"a": 1.0}
    assert usual_norms([{"a": 1.0}] * 3 + [{"b": 1.0}]) == {}
