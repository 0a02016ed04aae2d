"""Qualified names of modules and parameters: the same whether a model is wrapped, compiled, or neither."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: Names of the only child of what wraps a module: ``torch.compile``, activation checkpointing.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def named_modules(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Give a module and all that are in it, each once, with its name; wrappers have none of their own.

    Parameters
    ----------
    module
        Perhaps under DDP, compiled, or with layers that are.

    Yields
    ------
    (str, torch.nn.Module)
        As ``module.named_modules()`` does for the module without wrappers. A wrapper has its module's name.
    """
    stack = [("", module)]
    seen: set[torch.nn.Module] = set()
    while stack:
        name, each = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        yield name, each
        children = [
            (name if _is_wrapper(each, key) else f"{name}.{key}" if name else key, child)
            for key, child in each.named_children()
        ]
        stack += reversed(children)


def _is_wrapper(module: torch.nn.Module, child: str) -> bool:
    wraps = isinstance(module, DistributedDataParallel | DataParallel) and child == "module"
    return wraps or child in _WRAPPED


def named_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Give the parameters of a module, each once, by its name without wrappers."""
    found: dict[torch.nn.Parameter, str] = {}
    for prefix, each in named_modules(module):
        for name, parameter in each.named_parameters(recurse=False):
            found.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in found.items()}
