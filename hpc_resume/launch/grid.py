"""Which runs an array consists of, and what each is called.

A run is named after its arguments and nothing else, so that it is found again whatever else the grid holds by
then.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.entry import FunctionEntry, TargetEntry
from hpc_resume.rundir import RunDirectory
from hpc_resume.values import parse_value

#: Names of folders may have 255 bytes, and people read them in columns.
_LONGEST_NAME = 100
_DIGITS = 8
#: What needs no quotes in any shell and stands in no other meaning in a name.
_PLAIN = re.compile(r"[A-Za-z0-9._+-]+")
_UNPLAIN = re.compile(r"[^A-Za-z0-9._+-]+")

#: What can be called with the arguments of a run.
Callee = FunctionEntry | TargetEntry


class Grid(tuple[Mapping[str, Any], ...]):
    """Arguments of several runs; ``+`` puts two grids one after the other."""

    __slots__ = ()

    def __add__(self, other: Iterable[Mapping[str, Any]]) -> Grid:  # type: ignore[override]
        return Grid((*self, *other))


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One run of an array.

    Parameters
    ----------
    name
        Of its folder.
    arguments
        Those that tell it from the others.
    """

    name: str
    arguments: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Give the arguments as JSON values, what is no number or text as its text."""
        return {key: _json_value(value) for key, value in self.arguments.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of an array, ready to be submitted.

    Parameters
    ----------
    run
        Its directory.
    entry
        What it calls.
    config
        Its settings.
    config_path
        Where they will be stored.
    """

    element: Element
    run: RunDirectory
    entry: Callee
    config: Config
    config_path: Path


def grid(**values: Iterable[Any]) -> Grid:
    """Combine every value of each argument with every value of the others.

    Parameters
    ----------
    **values
        For each argument its values; those of the last one change fastest.

    Raises
    ------
    UsageError
        If one is no list, or an empty one.

    Examples
    --------
    >>> grid(lr=[1e-3, 3e-4], seed=range(2))[1]
    {'lr': 0.001, 'seed': 1}
    >>> len(grid(lr=[1e-3], seed=range(3)) + grid(lr=[3e-4]))
    4
    """
    if not values:
        raise UsageError("grid: no argument has values; write hr.grid(lr=[1e-3, 3e-4], seed=range(4))")
    lists, wrong = {}, []
    for name, given in values.items():
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            wrong.append(f"{name}={given!r} is no list of values; write {name}=[{given!r}]")
            continue
        lists[name] = [_python(value) for value in given]
        if not lists[name]:
            wrong.append(f"{name} has no values, so there would be no run")
    if wrong:
        raise UsageError(f"grid: {'; '.join(wrong)}")
    return Grid(dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values()))


def elements_of(runs: Iterable[Mapping[str, Any]]) -> tuple[Element, ...]:
    """Name the runs of a grid, or of a list of arguments; one that stands there twice is one run.

    Raises
    ------
    UsageError
        If there is none, or if arguments can't name a run; with all that is wrong.
    """
    found: dict[str, Element] = {}
    wrong = []
    for place, arguments in enumerate(runs):
        if not isinstance(arguments, Mapping):
            wrong.append(f"run {place}: {arguments!r} must be arguments, such as {{'lr': 1e-3}}")
            continue
        try:
            plain = {str(key): _python(value) for key, value in arguments.items()}
            name = run_name(plain)
        except UsageError as error:
            wrong.append(f"run {place}: {error}")
        else:
            found.setdefault(name, Element(name=name, arguments=plain))
    if wrong:
        raise UsageError("\n".join(wrong))
    if not found:
        raise UsageError("an array of runs has no run; give it at least one: hr.grid(lr=[1e-3])")
    return tuple(found.values())


def run_name(arguments: Mapping[str, Any]) -> str:
    """Name a run after its arguments: ``lr=0.001,seed=3``.

    The order of the arguments does not matter. Where the name alone would not tell them (letters that are not
    for file names, a text that reads as a number, too many of them), a digest is added: ``note=a-b~5f3c0a91``.

    Raises
    ------
    UsageError
        If a value has no text that would be the same in the next process.
    """
    if not arguments:
        return "defaults"
    texts = {key: _text(key, arguments[key]) for key in sorted(arguments)}
    name = ",".join(f"{_tidy(key)}={_tidy(text)}" for key, text in texts.items())
    plain = all(
        _PLAIN.fullmatch(key) and _PLAIN.fullmatch(text) and _reads_back(arguments[key], text)
        for key, text in texts.items()
    )
    if plain and len(name) <= _LONGEST_NAME:
        return name
    # 1 and "1" have the same text
    kinds = {key: isinstance(value, (str, os.PathLike)) for key, value in arguments.items()}
    told = "\0".join(f"{key}\0{kinds[key]}\0{text}" for key, text in texts.items())
    digest = hashlib.sha256(told.encode()).hexdigest()[:_DIGITS]
    return f"{name[: _LONGEST_NAME - _DIGITS - 1]}~{digest}"


def _reads_back(value: Any, text: str) -> bool:
    """Whether a text says which value it is; a string must not read as something else."""
    if isinstance(value, (str, os.PathLike)):
        return isinstance(parse_value(text), str) and text not in {"True", "False", "None"}
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _tidy(text: str) -> str:
    return _UNPLAIN.sub("-", text).strip("-") if not _PLAIN.fullmatch(text) else text


def _text(key: str, value: Any) -> str:
    """Text of a value that is the same in every process."""
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration of texts is a text
    return os.fsdecode(value) if isinstance(value, os.PathLike) else _spelled(key, _python(value))


def _spelled(key: str, value: Any) -> str:
    """Spell a value so that no other is spelled alike."""
    if isinstance(value, Mapping):
        inner = sorted((_spelled(key, name), _spelled(key, each)) for name, each in value.items())
        return "{" + ", ".join(f"{name}: {text}" for name, text in inner) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        texts = [_spelled(key, _python(each)) for each in value]
        return f"[{', '.join(sorted(texts) if isinstance(value, (set, frozenset)) else texts)}]"
    name = getattr(value, "__qualname__", None)
    text = repr(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"
    if " at 0x" in text or "<lambda>" in text:
        raise UsageError(
            f"{key}={text} can't name a run, because the next process could not tell it again; give a number or a "
            "text, and let the function make the object"
        )
    return text


def _python(value: Any) -> Any:
    """Give NumPy's and PyTorch's single numbers as Python's."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def _json_value(value: Any) -> Any:
    if (
        value is None
        or isinstance(value, (str, bool, int))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    return _text("", value)
