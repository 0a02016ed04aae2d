"""What a run leaves for its rehearsal: which step it is at, and what the script has but does not track."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch

#: Frames of these packages are no user's script.
_OURS = frozenset({"hpc_resume", "submitit", "torch", "runpy", "importlib", "_pytest", "multiprocessing"})
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


#: Objects of these are not looked into.
_LIBRARIES = _OURS | {"numpy", "__builtin__", *sys.stdlib_module_names} - {"__main__"}
#: So deep, and so far along lists, a dataset is looked into.
_DEEPEST = 5
_WIDEST = 20
#: Where a rehearsal finds it in the run directory.
UNTRACKED = "untracked.json"


#: Where it finds the number of completed steps.
STEP = "step.txt"


class Rehearsing:
    """Tells a rehearsal, on rank 0, where the run is.

    Parameters
    ----------
    root
        The run directory.
    frame
        Where the script is.
    items
        What is tracked, by name.
    """

    def __init__(self, root: Path, frame: FrameType | None, items: Mapping[str, Any]) -> None:
        (root / UNTRACKED).write_text(json.dumps(untracked(frame, items)))
        self._fd = os.open(root / STEP, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def at(self, step: int) -> None:
        """Say how many steps are completed."""
        os.pwrite(self._fd, b"%020d" % step, 0)


def untracked(frame: FrameType | None, items: Mapping[str, Any]) -> list[str]:
    """Name the objects of a script that have a state and are not tracked.

    Parameters
    ----------
    frame
        Where the script is; its callers are looked at, too.
    items
        What is tracked, by name.

    Returns
    -------
    list of str
        ``"scheduler (CosineAnnealingLR)"``; generators of datasets, too, though tracking them would not help.
    """
    known = _known(items)
    parameters = {
        id(p) for each in items.values() if isinstance(each, torch.nn.Module) for p in each.parameters()
    }
    found: dict[int, str] = {}
    for name, value in (*_datasets(items), *_variables(frame)):
        if id(value) not in known and id(value) not in found and _has_state(value, parameters):
            found[id(value)] = f"{name} ({type(value).__qualname__})"
    return sorted(found.values())


def _known(items: Mapping[str, Any]) -> set[int]:
    """Identify what is tracked, and what belongs to it."""
    known = set()
    for item in items.values():
        parts = [item, *(item.modules() if isinstance(item, torch.nn.Module) else ())]
        for value in item.values() if isinstance(item, dict) else getattr(item, "__dict__", {}).values():
            parts += [value, *(value if isinstance(value, list | tuple) else ())]
        known |= set(map(id, parts))
    return known


def _variables(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Give the variables of a script: locals and globals, and the attributes of its own objects."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _OURS:
            for scope in (frame.f_locals, frame.f_globals):
                for name, value in list(scope.items()):
                    yield name, value
                    if type(value).__module__.partition(".")[0] not in _LIBRARIES:
                        for attribute, inner in list(getattr(value, "__dict__", {}).items()):
                            yield f"{name}.{attribute}", inner
        frame = frame.f_back


def _datasets(items: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give the generators that datasets of tracked loaders, and their transforms, have for themselves."""
    seen: set[int] = set()
    found = [(f"{key}.dataset", dataset, _DEEPEST) for key, dataset in _dataset_of(items)]
    while found:
        name, value, depth = found.pop()
        if id(value) in seen or depth == 0:
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            yield name, value
        elif isinstance(value, list | tuple):
            found += [(f"{name}[{place}]", each, depth - 1) for place, each in enumerate(value[:_WIDEST])]
        elif (
            type(value).__module__.partition(".")[0] not in _LIBRARIES
            or isinstance(value, torch.utils.data.Dataset)
        ) and not isinstance(value, type):
            parts = list(getattr(value, "__dict__", {}).items())
            found += [(f"{name}.{attribute}", each, depth - 1) for attribute, each in parts]


def _dataset_of(items: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in items.items():
        for loader in (item, getattr(item, "loader", None)):
            if (
                not isinstance(item, torch.nn.Module)
                and (dataset := getattr(loader, "dataset", None)) is not None
            ):
                yield key, dataset


def _has_state(value: Any, parameters: set[int]) -> bool:
    if isinstance(value, _GENERATORS):
        return True
    if isinstance(value, type | ModuleType):
        return False
    if isinstance(value, torch.nn.Module):  # a loss function has no state; a compiled model has the model's
        tensors = [*value.parameters(), *value.buffers()]
        return any(id(tensor) not in parameters for tensor in tensors)
    kind = type(value)
    return callable(getattr(kind, "state_dict", None)) and callable(getattr(kind, "load_state_dict", None))
