"""The state of an optimizer by the names of its parameters, taken and put back without side effects.

``torch.distributed.checkpoint.state_dict`` does the naming. Around it stands what it does to an optimizer on the
way: it steps one that has no state yet, to make it some; it refuses parameters that never had a gradient; it
leaves out the state of frozen ones; and it casts state to the type of its parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.placement import needs_closure
from hpc_resume.checkpoint.structure import TensorRecord
from hpc_resume.errors import StateError


@contextlib.contextmanager
def _left_alone(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep PyTorch from stepping an optimizer without state: it does not where there is a gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if optimizer.state or not parameters or any(parameter.grad is not None for parameter in parameters):
        yield
        return
    smallest = min(parameters, key=torch.Tensor.numel)
    smallest.grad = torch.zeros_like(smallest)
    try:
        yield
    finally:
        smallest.grad = None


def check(key: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse state that belongs to no parameter.

    Parameters
    ----------
    key, optimizer
        What is tracked.

    Raises
    ------
    StateError
        If there is some: it has no name.
    """
    stray = [name for name in optimizer.state if not isinstance(name, torch.Tensor)]
    if stray:
        raise StateError(
            f"{key}: optimizer.state[{stray[0]!r:.100}] belongs to no parameter and can't be stored by name; keep it "
            "in the parameter groups, or in a dict that is tracked, too"
        )


def state_of(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take the state as it is: of a parameter that has had no gradient, there is none.

    Parameters
    ----------
    module
        Gives the names; it has all of the optimizer's parameters.
    optimizer
        The optimizer.
    """
    with _left_alone(optimizer):
        return get_optimizer_state_dict(module, optimizer)


def state_to_fill(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take the state, or let PyTorch make it, so that there are tensors to read into."""
    if needs_closure(optimizer):  # it can't be stepped blindly
        return state_of(module, optimizer)
    stateless = not optimizer.state
    rates = [group.get("lr") for group in optimizer.param_groups]
    try:
        return get_optimizer_state_dict(module, optimizer)
    except Exception:
        if not stateless:
            raise
    # Stepped with a rate and dense gradients of zero, which not every one takes (SparseAdam): undo that.
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
    return state_of(module, optimizer)


def load_state(module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a state back; its tensors become the optimizer's own."""
    with _left_alone(optimizer):
        set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(strict=False))
    for name, parameter in parameters_of(optimizer, state_of(module, optimizer)).items():
        saved = state["state"].get(name, {})
        if saved and parameter not in optimizer.state:  # left out: the parameter is frozen
            optimizer.state[parameter] = saved
        own = optimizer.state.get(parameter, {})
        for key, value in saved.items():
            if key != "step" and key in own:
                own[key] = _of_its_own_type(value, own[key])


def _of_its_own_type(saved: Any, loaded: Any) -> Any:
    """Undo that PyTorch has cast state to the type of its parameter, which is not what every optimizer has chosen."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        return loaded if saved.dtype == loaded.dtype else saved.to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {name: _of_its_own_type(value, loaded[name]) for name, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple):
        return type(saved)(map(_of_its_own_type, saved, loaded))
    return loaded


def parameters_of(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Give the optimizer's parameters by the names that its state has for them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip(names, parameters, strict=True))


def made_for(name: str, record: TensorRecord, key: str, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Make the tensor to read into that an optimizer does not have: spread like its parameter, if it has its shape.

    Parameters
    ----------
    name, record
        Of what is stored: ``KEY/state/PARAMETER/…``.
    key, parameters
        Under which the optimizer is tracked, and its parameters by name.
    """
    dtype = dtypes.torch_dtype(record.dtype)
    places = {f"{escape(key)}/state/{escape(parameter)}": parameter for parameter in parameters}
    parameter = parameters.get(places.get(name.rpartition("/")[0], ""))
    if parameter is not None and tuple(parameter.shape) == record.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    plain = torch.empty(record.shape, dtype=dtype)
    if isinstance(parameter, DTensor) and record.shape:
        replicated = [Replicate()] * parameter.device_mesh.ndim
        return DTensor.from_local(
            plain.to(parameter.device), parameter.device_mesh, replicated, run_check=False
        )
    return plain


def group_problems(key: str, saved: Any, present: dict[str, Any]) -> list[str]:
    """List in what the parameter groups of a saved state, as typed JSON, differ from those of an optimizer."""
    try:
        groups = [list(group["params"]) for group in saved["param_groups"]]
    except (TypeError, LookupError):
        return [f"{key}: an optimizer now, not in the checkpoint"]
    now = [list(group["params"]) for group in present["param_groups"]]
    if len(groups) != len(now):
        return [f"{key}: {len(now)} parameter groups, in the checkpoint {len(groups)}"]
    return [
        f"{key}: parameter group {number} has {_few(set(b) - set(a))} that it has not in the checkpoint, and not "
        f"{_few(set(a) - set(b))} that it has there"
        for number, (a, b) in enumerate(zip(groups, now, strict=True))
        if set(a) != set(b)
    ]


def _few(names: set[str]) -> str:
    listed = sorted(names)
    more = "" if len(listed) <= 3 else f" and {len(listed) - 3} more"
    return (", ".join(listed[:3]) or "none") + more
