import enum
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_resume.errors import UsageError
from hpc_resume.launch.grid import Grid, elements_of, grid, run_name


class Colour(str, enum.Enum):
    RED = "red"


def test_a_grid_is_the_product_and_the_last_argument_changes_fastest():
    assert list(grid(lr=[1e-3, 3e-4], seed=range(2))) == [
        {"lr": 1e-3, "seed": 0},
        {"lr": 1e-3, "seed": 1},
        {"lr": 3e-4, "seed": 0},
        {"lr": 3e-4, "seed": 1},
    ]


def test_grids_and_lists_are_put_one_after_the_other():
    both = grid(lr=[1]) + grid(lr=[2], wd=[3]) + [{"lr": 4}]
    assert isinstance(both, Grid)
    assert list(both) == [{"lr": 1}, {"lr": 2, "wd": 3}, {"lr": 4}]


def test_single_numbers_of_numpy_and_torch_become_pythons():
    (run,) = grid(lr=[np.float64(0.5)], n=np.arange(3, 4), t=[torch.tensor(2)])
    assert run == {"lr": 0.5, "n": 3, "t": 2}
    assert {type(value) for value in run.values()} == {float, int}


def test_all_that_is_no_list_is_told_at_once():
    with pytest.raises(
        UsageError, match=r"lr=0.1 is no list .*write lr=\[0.1\]; name='ab' .*; seed has no val"
    ):
        grid(lr=0.1, name="ab", seed=[])
    with pytest.raises(UsageError, match="no argument has values"):
        grid()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lr": 1e-3, "seed": 3}, "lr=0.001,seed=3"),
        ({"seed": 3, "lr": 1e-3}, "lr=0.001,seed=3"),
        ({"lr": 1e-5}, "lr=1e-05"),
        ({"n": -1, "on": True, "p": None}, "n=-1,on=True,p=None"),
        ({"kind": "ddp", "at": Path("v1.2")}, "at=v1.2,kind=ddp"),
        ({"colour": Colour.RED}, "colour=red"),
        ({}, "defaults"),
    ],
)
def test_a_run_is_named_after_its_arguments(arguments, name):
    assert run_name(arguments) == name


def test_names_are_different_where_arguments_are():
    values = [
        1, 1.0, True, "1", "1.0", "True", None, "None", "null", "", "a b", "a-b", "a  b", "a/b", "../a", "é",
        "x=1,y=2", "inf", float("inf"), float("nan"), (1, 2), ("1", 2), [[1], 2], {1: 2}, {"1": 2}, "[1, 2]",
        "a" * 200, "a" * 201, b"a", np.float64, int, torch.float16, {1, 2, 3}, "1~0123abcd",
    ]  # fmt: skip
    names = [run_name({"x": value}) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert len(name) <= 100
        assert name.isascii()
        assert not set(name) & set(" /\\'\"$`*?[]{}()<>|&;!#%\n")
    assert run_name({"x": 1, "y": 2}) != run_name({"x": "1,y=2"})


def test_the_same_run_may_be_spelled_as_a_list_or_a_tuple():
    assert run_name({"betas": (0.9, 0.95)}) == run_name({"betas": [0.9, np.float64(0.95)]})
    assert run_name({"betas": (0.9, 0.95)}).startswith("betas=0.9-0.95~")


def test_a_name_is_the_same_in_the_next_process():
    # letters of a set come in another order in each process
    code = "from hpc_resume.launch.grid import run_name; print(run_name({'x': {'a', 'b', 'c', 'd', 'e'}, 'y': int}))"
    words = [sys.executable, "-c", code]
    names = {subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert names == {run_name({"x": set("edcba"), "y": int}) + "\n"}


@pytest.mark.parametrize("value", [object(), lambda x: x, [object()]])
def test_what_the_next_process_could_not_tell_is_refused(value):
    with pytest.raises(UsageError, match=r"run 0: x=.* can't name a run"):
        elements_of([{"x": value}])


def test_all_that_is_wrong_with_a_list_is_told_at_once():
    with pytest.raises(UsageError, match=r"(?s)run 0: 3 must be arguments.*run 2: x=.*"):
        elements_of([3, {"x": 1}, {"x": object()}])
    with pytest.raises(UsageError, match="has no run"):
        elements_of([])


def test_a_run_that_stands_there_twice_is_one():
    names = [element.name for element in elements_of(grid(lr=[1, 2]) + grid(lr=[2, 3]))]
    assert names == ["lr=1", "lr=2", "lr=3"]


def test_arguments_are_recorded_as_json():
    (element,) = elements_of([{"a": 1, "b": "x", "c": (1, 2), "d": float("nan"), "e": None, "f": int}])
    assert element.to_json() == {"a": 1, "b": "x", "c": "[1, 2]", "d": "nan", "e": None, "f": "builtins.int"}
