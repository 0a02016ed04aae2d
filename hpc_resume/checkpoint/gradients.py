"""Gradients that are still to be used: an interruption between two micro-batches must not lose them.

Where a step of the run is one micro-batch and ``optimizer.step()`` comes every few of them, the gradients are a part
of the state at most boundaries. Where the optimizer has used them already, they are not, and storing them would
double the checkpoint for nothing. So each optimizer marks the gradients that it has used; what is unmarked at a save,
or has been written to since, is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.placement import box_of, fill, local_of
from hpc_resume.checkpoint.qualified import named_modules, named_parameters
from hpc_resume.errors import IntegrityError, StateError

#: First component of the names of stored gradients.
GRADIENTS = "gradients"
#: An optimizer marks the gradients of at most so many parameters a step: marking one takes a third of a
#: microsecond (measured). A backward pass that comes after it reaches some of them.
_MARKED = 32
_MARK = "_hpc_resume_used"
_WATCH = "_hpc_resume_watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """Gradients that are still to be used, by name.

    Parameters
    ----------
    shared
        Those that say themselves how they are spread over ranks.
    own
        Those of this rank: what it has summed up, or what all have, if they were synchronised.
    zeros
        Names of those that are there, but zero: an optimizer uses them, too, to decay weights and moments.
    """

    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()


class _Watch:
    """Marks the gradients that an optimizer has used, after each of its steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        #: Steps that have been seen.
        self._steps = 0
        #: Whether gradients have outlived the step before the last one: they are added to, and never set to None.
        self._kept = False
        self._sample: list[torch.nn.Parameter] = []
        self._groups = -1
        try:
            optimizer.register_step_post_hook(self._mark)
            self._blind = False
        except AttributeError:  # a wrapper that calls itself an optimizer and was never made one
            self._blind = True

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> _Watch:
        """Give the one of an optimizer: two would take each other's marks for an earlier step's."""
        found = vars(optimizer).get(_WATCH)
        if found is None:
            found = vars(optimizer)[_WATCH] = cls(optimizer)
        assert isinstance(found, cls)
        return found

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All of the optimizer."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _looked_at(self) -> Iterator[torch.Tensor]:
        """Gradients of some of the parameters: what holds their values."""
        groups = self._optimizer.param_groups
        if len(groups) != self._groups:  # add_param_group
            parameters = self.parameters
            self._sample = parameters[:: max(-(-len(parameters) // _MARKED), 1)]
            self._groups = len(groups)
        for parameter in self._sample:
            if (gradient := parameter.grad) is not None:
                # FSDP2 adds to the local tensor, of which the DTensor around it takes no note.
                yield getattr(gradient, "_local_tensor", gradient)

    def reset(self) -> None:
        """Forget what has been seen: restoring steps an optimizer to make its state."""
        self._steps = 0
        self._kept = False

    def _mark(self, *_: Any) -> None:
        self._steps += 1
        self._kept = False
        for gradient in self._looked_at():
            self._kept = self._kept or hasattr(gradient, _MARK)
            setattr(gradient, _MARK, gradient._version)  # noqa: SLF001 - nothing else says that it was written to

    def pending(self) -> bool | None:
        """Whether there are gradients that the optimizer has not used, or will use again; None: nobody knows yet."""
        if self._blind:
            return None
        if self._kept:
            return True
        marks = [(getattr(gradient, _MARK, None), gradient) for gradient in self._looked_at()]
        if not marks or any(mark != gradient._version for mark, gradient in marks):  # noqa: SLF001 - as above
            return True
        return None if self._steps < 2 else False  # after one step, nobody has been seen to drop them


class Gradients:
    """The gradients of tracked modules.

    Parameters
    ----------
    modules, optimizers
        All that are tracked, by key.
    """

    def __init__(
        self, modules: Mapping[str, torch.nn.Module], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        self._modules = modules
        self._names: dict[int, tuple[str, torch.nn.Parameter]] = {}
        self._watches = [_Watch.of(optimizer) for optimizer in optimizers]
        self._sharded = [
            (name, module)
            for tracked in modules.values()
            for name, module in named_modules(tracked)
            if isinstance(module, FSDPModule)
        ]

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Give all parameters by the names of their gradients."""
        # By id(): hashing a tensor takes as long as all the rest.
        found = {id(p): p for module in self._modules.values() for p in module.parameters()}
        if not found.keys() <= self._names.keys():
            self._names = {}
            for key, module in self._modules.items():
                for name, parameter in named_parameters(module).items():
                    named = f"{GRADIENTS}/{escape(key)}/{escape(name)}", parameter
                    self._names.setdefault(id(parameter), named)
        return [self._names[key] for key in found]

    def accumulated(self) -> Accumulated:
        """Give the gradients that are still to be used.

        Raises
        ------
        StateError
            If they can't be stored; names the parameter.
        """
        for name, module in self._sharded:
            _check_sharded(name or type(module).__qualname__, module)
        parameters = self.parameters()
        certain, wanted = self._pending({id(p) for _, p in parameters if p.grad is not None})
        if not wanted:
            return Accumulated()
        shared: dict[str, torch.Tensor] = {}
        own: dict[str, torch.Tensor] = {}
        for name, parameter in parameters:
            gradient = parameter.grad
            if gradient is None or id(parameter) not in wanted:
                continue
            if gradient.layout is not torch.strided and id(parameter) not in certain:
                continue
            if gradient.layout is not torch.strided:
                raise StateError(
                    f"{name.removeprefix(GRADIENTS + '/')}: its gradient is sparse and still to be used by "
                    "optimizer.step(), so it would have to be stored, and can't be: call optimizer.step() and then "
                    "zero_grad() in each step of run.steps (run.micro_batches cuts its batch), or use sparse=False"
                )
            (shared if isinstance(gradient, DTensor) else own)[name] = gradient
        if not any(bool(gradient.any()) for gradient in own.values()):
            return Accumulated(shared=shared, zeros=tuple(own))
        return Accumulated(shared=shared, own=own)

    def _pending(self, there: set[int]) -> tuple[set[int], set[int]]:
        """Of the parameters that have gradients, those that are still to be used, and those that may be such."""
        used: set[int] = set()
        uncertain: set[int] = set()
        for watch in self._watches if there else ():
            mine = set(map(id, watch.parameters))
            if not there.isdisjoint(mine) and (pending := watch.pending()) is not True:
                (uncertain if pending is None else used).update(mine)
        return there - used - uncertain, there - used

    def reset(self) -> None:
        """Forget which gradients have been used: all that there are now are still to be."""
        for watch in self._watches:
            watch.reset()

    def set(self, gradients: Mapping[str, torch.Tensor], zeros: Iterable[str], rank: int) -> None:
        """Put gradients back: of a parameter that is not among them, there is none.

        Parameters
        ----------
        gradients
            By name: whole ones, or spread as their parameters are.
        zeros
            Names of those that are there, but zero.
        rank
            This process.
        """
        empty = set(zeros)
        for name, parameter in self.parameters():
            found = gradients.get(name)
            if found is None and name in empty:
                found = torch.zeros_like(parameter)
            elif found is not None and isinstance(parameter, DTensor) and not isinstance(found, DTensor):
                part = found[box_of(name, parameter, rank).slices_in(Box.whole(found.shape))].contiguous()
                local = part.to(local_of(parameter).device)
                found = torch.empty_like(parameter, dtype=found.dtype, requires_grad=False)
                fill(found, local)
            parameter.grad = None if found is None else found.to(parameter.device)


def _check_sharded(name: str, module: FSDPModule) -> None:
    """Refuse what FSDP2 keeps to itself: gradients that are summed up but not yet spread over the ranks."""
    group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)  # noqa: SLF001 - it tells nobody else
    if group is None:
        return
    held = getattr(group, "_partial_reduce_output", None) is not None or any(
        getattr(each, "unsharded_accumulated_grad", None) is not None
        or getattr(getattr(each, "_unsharded_param", None), "grad", None) is not None
        for each in group.fsdp_params
    )
    if held:
        raise StateError(
            f"{name}: fully_shard keeps gradients that are still to be reduced, because of "
            "set_requires_gradient_sync(False) or set_requires_all_reduce(False), and they can't be stored: let it "
            "reduce them in each step of run.steps, or have run.micro_batches(batch, model) cut the batch of a step"
        )


def merged(
    saved: list[Mapping[str, torch.Tensor]],
    parameters: Mapping[str, torch.Tensor],
    rank: int,
    world_size: int,
) -> dict[str, torch.Tensor]:
    """Give a rank the gradients that it goes on with, of ranks each of which had its own.

    Where all ranks had the same, they were synchronised, and every rank gets them. Else each rank had summed up its
    own, and the next synchronisation takes the mean over ranks: their sum goes to rank 0, weighed so that this mean
    stays the same, and all others have zeros. A parameter that is sharded now gets its part of the mean.

    Parameters
    ----------
    saved
        What each of the old ranks had, by name.
    parameters
        The parameters now, by the same names.
    rank, world_size
        Of the new ranks.

    Raises
    ------
    IntegrityError
        If the ranks had gradients of different shapes.
    """
    found: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for each in saved for name in each):
        parts = [each[name] for each in saved if name in each]
        first = parts[0]
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            raise IntegrityError(f"{name}: the ranks' gradients are not of one shape")
        sharded = isinstance(parameters.get(name), DTensor)
        if len(parts) == len(saved) and all(_same(first, part) for part in parts[1:]):
            found[name] = first
        elif rank == 0 or sharded:
            wide = first.dtype if first.is_complex() else torch.float64
            total = sum((part.to(wide) for part in parts), torch.zeros_like(first, dtype=wide))
            found[name] = (total * ((1 if sharded else world_size) / len(saved))).to(first.dtype)
        else:
            found[name] = torch.zeros_like(first)
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))
