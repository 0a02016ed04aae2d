"""Initialisation from (seed, name): the same weights however a model is wrapped, sharded, or spread over ranks.

Each module is initialised by its own ``reset_parameters`` on whole tensors on the CPU, one after the other, with
generators that are seeded by the run's seed and the module's qualified name. Then each rank keeps its part. So nothing
depends on the number of ranks, on the kind of GPU, or on what else is in the model, and no rank ever holds more than
one module whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.nn.parameter import is_lazy

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.placement import box_of, fill
from hpc_resume.checkpoint.qualified import named_modules
from hpc_resume.errors import UsageError
from hpc_resume.run import generators

#: Initialises the parameters of one module that are its own, given the module and its qualified name.
Initialiser = Callable[[torch.nn.Module, str], object]

_RESETS = ("reset_parameters", "_reset_parameters")


def initialise(
    module: torch.nn.Module,
    init: Initialiser | None = None,
    *,
    seed: int,
    device: torch.device | str | None = None,
) -> None:
    """Initialise a model from (seed, name): each rank draws the same, and keeps its part.

    Parameters
    ----------
    module
        On any device, sharded by ``fully_shard`` or tensor parallelism, or under DDP. If it is on the meta device,
        it gets its memory here.
    init
        Called for each module that has parameters or buffers of its own, after its ``reset_parameters``; it sees
        them whole, on the CPU.
    seed
        Of all of it.
    device
        Where a module goes that is on the meta device; the CPU by default.

    Raises
    ------
    UsageError
        If neither ``reset_parameters`` nor ``init`` sets a parameter; names all of them.
    """
    unset = _materialise(module, device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    done: set[torch.Tensor] = set()
    missing: list[str] = []
    with _apart():
        for name, unit in _units(module):
            members = _members(unit, name)
            with _whole(members, unset, done, rank, missing):
                for full, each in reversed(members):
                    generators.seed_cpu(generators.derive(seed, full))
                    if (reset := _reset_of(each)) is not None:
                        reset()
                    if init is not None and _has_own(each):
                        init(each, full)
    if missing:
        raise UsageError(
            f"initialise: nothing initialises {', '.join(sorted(missing)[:10])}: no reset_parameters() of the module "
            "does; write one, or set them in init: run.initialise(model, init), where init(module, name) is called "
            "for each module"
        )


def _materialise(module: torch.nn.Module, device: torch.device | str | None) -> set[torch.Tensor]:
    """Give memory to what is on the meta device; returns the tensors whose values are still to be set."""
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise UsageError(f"initialise: {name} has no shape yet; run a batch through the model first")
    if any(tensor.is_meta for _, tensor in tensors):
        tied: dict[torch.Tensor, list[str]] = {}
        for name, tensor in tensors:
            tied.setdefault(tensor, []).append(name)
        real = {
            name: tensor.detach().clone() for name, tensor in module.named_buffers() if not tensor.is_meta
        }
        unset = {name for name, tensor in module.named_buffers() if tensor.is_meta}
        module.to_empty(device=device or "cpu")
        _tie_again(module, [names for names in tied.values() if len(names) > 1])
        with torch.no_grad():
            buffers = dict(module.named_buffers())
            for name, value in real.items():
                buffers[name].copy_(value)
        return {*module.parameters(), *(buffers[name] for name in unset)}
    return set(module.parameters())


def _tie_again(module: torch.nn.Module, tied: list[list[str]]) -> None:
    """Make one tensor again of what was one: moving from the meta device tears it apart."""
    for first, *others in tied:
        tensor = _get(module, first)
        for name in others:
            if _get(module, name) is tensor:
                continue
            if any(hasattr(each, "device_mesh") for each in (tensor, _get(module, name))):
                raise UsageError(
                    f"initialise: {first} and {name} are one tensor, but not any more once they have left the meta "
                    "device, and sharded ones can't be tied again: build the model on the CPU, or tie them after"
                )
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            (owner._parameters if last in owner._parameters else owner._buffers)[last] = tensor  # type: ignore[assignment]  # noqa: SLF001


def _get(module: torch.nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), last)
    return found


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Leave the generators as they are, and use one thread: how many there are changes the last bits of some functions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), generators.put_back():
            yield
    finally:
        torch.set_num_threads(threads)


def _has_own(module: torch.nn.Module) -> bool:
    return any(True for _ in _own(module))


def _own(module: torch.nn.Module) -> Iterator[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """Give the tensors that a module has itself: where they are kept, under which name, and they."""
    for kept in (module._parameters, module._buffers):  # noqa: SLF001 - the tensors are exchanged there
        for name, tensor in kept.items():
            if tensor is not None:
                yield kept, name, tensor  # type: ignore[misc]


def _reset_of(module: torch.nn.Module) -> Callable[[], object] | None:
    """Give what a module initialises itself by, and perhaps what is inside of it."""
    found = (getattr(module, reset, None) for reset in _RESETS)
    return next((function for function in found if callable(function)), None)


def _units(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Give the modules that are initialised at once: those that have tensors, or reset what is inside of them."""
    inside: set[torch.nn.Module] = set()
    for name, each in named_modules(module):
        if each in inside:
            continue
        if _reset_of(each) is not None:
            inside.update(each.modules())
            yield name, each
        elif _has_own(each):
            yield name, each


def _members(unit: torch.nn.Module, name: str) -> list[tuple[str, torch.nn.Module]]:
    """Give a module by its name, and what is inside of it if it resets that, too; outer ones first."""
    if _reset_of(unit) is None:
        return [(name, unit)]
    return [(".".join(part for part in (name, inner) if part), each) for inner, each in named_modules(unit)]


@contextlib.contextmanager
def _whole(
    members: list[tuple[str, torch.nn.Module]],
    unset: set[torch.Tensor],
    done: set[torch.Tensor],
    rank: int,
    missing: list[str],
) -> Iterator[None]:
    """Put whole tensors on the CPU in the places of modules' own, and then take this rank's part of each."""
    made: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, str]] = []
    stand_ins: dict[torch.Tensor, torch.Tensor] = {}
    try:
        for prefix, each in members:
            for kept, name, tensor in list(_own(each)):
                if tensor not in stand_ins:
                    stand_ins[tensor] = _stand_in(tensor, known=tensor not in unset)
                made.append((kept, name, tensor, f"{prefix}.{name}" if prefix else name))
                kept[name] = stand_ins[tensor]
        yield
        for kept, name, tensor, full in made:
            drawn = kept[name]
            if tensor in done or drawn is None:
                continue
            done.add(tensor)
            if tensor in unset and _is_unset(drawn):
                missing.append(full)
                continue
            part = drawn[box_of(full, tensor, rank).slices_in(Box.whole(drawn.shape))]
            fill(tensor, part)
    finally:
        for kept, name, tensor, _ in made:
            kept[name] = tensor


def _stand_in(tensor: torch.Tensor, *, known: bool) -> torch.Tensor:
    """Make a whole tensor on the CPU: with its values, or with what shows that nothing has set it."""
    if known and not hasattr(tensor, "device_mesh"):
        return tensor.detach().to("cpu", copy=True)
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if fresh.is_floating_point() or fresh.is_complex():
        fresh.fill_(math.nan)
    else:
        fresh.zero_()
    return torch.nn.Parameter(fresh, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else fresh


def _is_unset(tensor: torch.Tensor) -> bool:
    """Whether some of a tensor has not been set: integers can't tell."""
    return bool(tensor.isnan().any()) if tensor.is_floating_point() or tensor.is_complex() else False
