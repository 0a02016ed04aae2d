"""Witnesses: what a rank says of its plain tensors, by which ranks that hold the same are told from ranks that do not.

Of a plain tensor that nothing keeps equal, rank 0's is stored, and of parameters under DDP each rank stores a part. That
is right where ranks hold the same, and would lose what the others have, or mix it, where they do not: stages of a
pipeline, experts of one rank, local SGD. So ranks look at a few elements of weights, which need not be the same to the
bit: replicas drift where ranks compute on different kinds of nodes. All else (counters, averages, masks) must be: of
that there are digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpc_resume.checkpoint.dtypes import torch_dtype
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.names import escape, unescape
from hpc_resume.checkpoint.structure import TensorRecord

if TYPE_CHECKING:
    import torch

_LEADER = Layout.replicated((0,))
#: So many tensors are looked at of the weights of each kind, of optimizers, and of the parameter groups.
_WEIGHTS = 64
_STATES = 16
#: So many elements of each; more of what only has the shape of a weight.
_ELEMENTS = 8
_MORE_ELEMENTS = 16
#: Weights that no DDP holds differ by less than this part of their norm if they are replicas, others by more. Rank 0's
#: are stored, so it may be much: whoever averages models now and then goes on from rank 0's.
_APART = 0.1
#: Under DDP replicas have the same bits: each rank applies the same gradients by the same kernels. Where nodes differ,
#: norms and products are rounded otherwise on the way, so that they drift in the last bits. A refused save is no
#: checkpoint at all, and a mixture of replicas that have drifted is as good as either; so the limit is far above
#: drift, and below what a step with gradients of a rank's own does: this part of the norm, or so many steps of the
#: type if those are more, as in half precision.
_DRIFT = 1e-3
_DRIFT_STEPS = 16
_MOST_DRIFT = 0.25
#: A tensor that must be the same is looked at whole up to so many bytes, a larger one in blocks that are as many
#: together.
_WHOLE_BYTES = 1 << 18
_BLOCK_BYTES = 1 << 12
#: Digests that a receipt holds; of more tensors several are looked at together.
_DIGESTS = 256


@dataclass(frozen=True, slots=True)
class Look:
    """One witness to take.

    Parameters
    ----------
    names
        Of the tensors that it is of: one, or several that are looked at together.
    elements
        So many of them are looked at; 0: all, or blocks.
    tolerance
        Part of the norm by which ranks may differ; 0: not at all.
    """

    names: tuple[str, ...]
    elements: int = 0
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """For people, and the same on all ranks that look at the same."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"


def choose(
    tensors: Mapping[str, torch.Tensor],
    records: Mapping[str, TensorRecord],
    *,
    modules: Mapping[str, torch.nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[Look, ...]:
    """Choose what to look at, the same on all ranks that have the same.

    Not looked at are buffers and what else modules store besides parameters (DDP, too, takes rank 0's), copies of buffers
    by the same names, and what optimizers have of parameters that no DDP keeps equal: the parameters themselves tell.

    Parameters
    ----------
    tensors, records
        Of the state, by name.
    modules, optimizers
        All that are tracked, by key.
    """
    from torch.distributed.tensor import DTensor

    from hpc_resume.checkpoint.placement import wrapped_by_ddp

    kinds: dict[str, list[str]] = {}
    weights = _Weights.of(modules, wrapped_by_ddp(modules.values()))
    owned = {escape(key): modules for key in modules} | {escape(key): optimizers for key in optimizers}
    for name, tensor in sorted(tensors.items()):
        if tensor.numel() and not isinstance(tensor, DTensor):
            key = name.split("/", 1)[0]
            if owned.get(key) is optimizers:
                kind = _kind_of_state(name.removeprefix(key), records[name])
            else:
                kind = weights.kind_of(name, tensor, records[name], in_module=owned.get(key) is modules)
            kinds.setdefault(kind, []).append(name)
    trained, looks = weights.trained, list(_exact(kinds.get("exact", ())))
    for kind, most, elements in (
        ("plain", _WEIGHTS, _ELEMENTS),
        ("replica", _WEIGHTS, _ELEMENTS),
        ("copy", _WEIGHTS, _MORE_ELEMENTS),
        ("state", _STATES, _ELEMENTS),
        ("settings", _STATES, _ELEMENTS),
    ):
        first = [name for name in kinds.get(kind, ()) if tensors[name].data_ptr() in trained]
        others = [name for name in kinds.get(kind, ()) if tensors[name].data_ptr() not in trained]
        chosen = _spread(first, most)
        for name in (*chosen, *_spread(others, most - len(chosen))):
            dtype = records[name].dtype
            tolerance = _APART if kind == "plain" and _drifts(dtype) else _drift(dtype)
            looks.append(Look((name,), elements, tolerance))
    return tuple(looks)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where the parameters of tracked modules are: all, those that are trained, those under DDP.

    And what tells copies of them: the shapes of parameters, and names of buffers with their shapes.
    """

    everywhere: set[int]
    trained: set[int]
    wrapped: set[int]
    shapes: set[tuple[int, ...]]
    buffers: set[tuple[str, tuple[int, ...]]]

    @classmethod
    def of(cls, modules: Mapping[str, torch.nn.Module], wrapped: Iterable[torch.Tensor]) -> _Weights:
        from hpc_resume.checkpoint.qualified import named_modules

        parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        buffers = {
            (f"{prefix}.{name}" if prefix else name, tuple(buffer.shape))
            for module in modules.values()
            for prefix, each in named_modules(module)
            for name, buffer in each.named_buffers(recurse=False)
        }
        return cls(
            {parameter.data_ptr() for parameter in parameters},
            {parameter.data_ptr() for parameter in parameters if parameter.requires_grad},
            {parameter.data_ptr() for parameter in wrapped},
            {tuple(parameter.shape) for parameter in parameters if parameter.numel() > 1},
            buffers,
        )

    def kind_of(self, name: str, tensor: torch.Tensor, record: TensorRecord, *, in_module: bool) -> str:
        """Tell what a tensor is that belongs to no optimizer."""
        if record.layout != _LEADER:
            return "replica"
        if in_module:
            if tensor.data_ptr() not in self.everywhere:
                return ""
            # Whoever tells DDP to leave a parameter alone may have another one on each rank.
            return "replica" if tensor.data_ptr() in self.wrapped else "plain"
        if not _drifts(record.dtype):
            return "exact"
        # A running average of a model drifts as its weights do, and has other buffers on each rank, if it has any.
        parts = unescape(name.rsplit("/", 1)[-1]).split(".")
        if any((".".join(parts[first:]), record.shape) in self.buffers for first in range(len(parts))):
            return ""
        return "copy" if record.shape in self.shapes else "exact"


def _kind_of_state(name: str, record: TensorRecord) -> str:
    """Tell what a tensor of an optimizer is, by the rest of its name."""
    if name.startswith("/param_groups/"):
        return "settings"
    return "" if record.layout == _LEADER else "state"


def _drifts(dtype: str) -> bool:
    """Whether numbers of a type are rounded."""
    kind = torch_dtype(dtype)
    return kind.is_floating_point or kind.is_complex


def _drift(dtype: str) -> float:
    """Part of the norm by which replicas of a type may differ."""
    if not _drifts(dtype):
        return 0.0
    import torch

    return min(max(_DRIFT, _DRIFT_STEPS * torch.finfo(torch_dtype(dtype)).eps), _MOST_DRIFT)


def _exact(names: Sequence[str]) -> Iterator[Look]:
    """Put what must be the same together, so that there are not too many digests."""
    together = -(-len(names) // _DIGESTS)
    for first in range(0, len(names), max(together, 1)):
        yield Look(tuple(names[first : first + together]))


def _spread(names: Sequence[str], most: int) -> list[str]:
    places = np.linspace(0, len(names) - 1, min(len(names), most)).round().astype(int)
    return [names[place] for place in places]


# ---------------------------------------------------------------- taking


def take(looks: Sequence[Look], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Take witnesses, with one copy from each device.

    Returns
    -------
    dict
        By :attr:`Look.name`. Of what must be the same, ``=`` and 24 hex digits: what was looked at, and xxh3-64 of
        it, with all NaNs and zeros alike. Else the tolerance, ``:``, and some elements as hex digits of little-endian
        doubles.
    """
    import xxhash

    views = [_elements(tensors[name], look.elements) for look in looks for name in look.names]
    found, fetched = {}, iter(_fetch(views))
    for look in looks:
        if look.tolerance:
            found[look.name] = f"{look.tolerance:g}:{next(fetched).astype('<f8').tobytes().hex()}"
            continue
        digest = xxhash.xxh3_64()
        for _ in look.names:
            digest.update(next(fetched).tobytes())
        label = hashlib.sha256("\n".join(look.names).encode()).hexdigest()[:8]
        found[look.name] = f"={label}{digest.hexdigest()}"
    return found


def _elements(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Give about so many elements of a tensor, or all or blocks of it, in one dimension; a view where that can be."""
    import torch

    tensor = tensor.detach()
    total, size = tensor.numel(), tensor.element_size()
    if count == 0 and total * size <= _WHOLE_BYTES:
        return tensor.reshape(-1)
    shape, every = tuple(tensor.shape), -(-total // (count or total))
    if count and tensor.is_contiguous():
        return tensor.view(-1)[::every]
    if count:  # the same ones, whatever the strides
        return torch.stack([tensor[np.unravel_index(place, shape)] for place in range(0, total, every)])
    block, blocks = _BLOCK_BYTES // size, _WHOLE_BYTES // _BLOCK_BYTES
    every = total // blocks
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        rows = flat[: every * blocks].view(blocks, every)
        return torch.cat([rows[:, :block].reshape(-1), flat[-block:]])
    firsts = np.append(np.arange(blocks) * every, total - block)
    places = np.unravel_index((firsts[:, None] + np.arange(block)).reshape(-1), shape)
    return tensor[tuple(torch.from_numpy(place).to(tensor.device) for place in places)]


def _fetch(views: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    """Give the numbers in tensors of one dimension, with one copy from each device."""
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts: dict[torch.device, dict[torch.dtype, list[tuple[int, torch.Tensor]]]] = {}
    for place, view in enumerate(views):
        plain = view.resolve_conj().resolve_neg()
        if plain.is_complex():
            plain = torch.view_as_real(plain).reshape(-1)
        # As integers: not every type can be put together.
        alike = parts.setdefault(view.device, {}).setdefault(plain.dtype, [])
        alike.append((place, plain.view(integers[plain.element_size()])))
    found: dict[int, npt.NDArray[Any]] = {}
    for by_type in parts.values():
        joined = [torch.cat([each for _, each in alike]) for alike in by_type.values()]
        data = torch.cat([each.view(torch.uint8) for each in joined]).cpu()
        sizes = [each.nbytes for each in joined]
        for (dtype, alike), bits in zip(by_type.items(), torch.split(data, sizes), strict=True):
            numbers, begin = _numbers(bits, dtype), 0
            for place, each in alike:
                found[place] = numbers[begin : begin + each.numel()]
                begin += each.numel()
    return [found[place] for place in range(len(views))]


def _numbers(data: torch.Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    """Turn bytes into numbers that NumPy knows, with one kind of NaN and one of zero."""
    import torch

    # A copy: NumPy wants each number at a multiple of its size.
    typed = data.clone().view(dtype)
    if not dtype.is_floating_point:
        found: npt.NDArray[Any] = typed.numpy()
        return found
    numbers: npt.NDArray[Any] = (typed if dtype.itemsize > 2 else typed.to(torch.float32)).numpy()
    with np.errstate(invalid="ignore"):
        numbers = numbers + 0.0  # -0.0, too, is 0.0 then
    numbers[np.isnan(numbers)] = np.nan
    return numbers


# ---------------------------------------------------------------- comparing


def checked(witness: str) -> str:
    """Return a witness as it is; a ValueError if it is none."""
    if not witness.startswith("="):
        _samples(witness)
    return witness


def _samples(witness: str) -> tuple[float, npt.NDArray[np.float64]]:
    """Give the tolerance of a witness, and its elements."""
    tolerance, colon, digits = witness.rpartition(":")
    return float(tolerance) if colon else _APART, np.frombuffer(bytes.fromhex(digits), "<f8")


def compare(ranks: Sequence[tuple[int, Mapping[str, str]]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Find what is not the same on all ranks.

    Parameters
    ----------
    ranks
        Ranks with their witnesses, ascending.

    Returns
    -------
    dict
        By name, the first rank that has it and the others that have something else.
    """
    first: dict[str, tuple[int, str]] = {}
    differ = lru_cache(maxsize=None)(_differ)  # ranks on one kind of node have the same bits
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    for rank, mine in ranks:
        for name, witness in mine.items():
            whose, theirs = first.setdefault(name, (rank, witness))
            if witness != theirs and differ(theirs, witness):
                found[name] = whose, (*found.get(name, (whose, ()))[1], rank)
    return dict(sorted(found.items()))


def _differ(one: str, other: str) -> bool:
    if one.startswith("=") or other.startswith("="):
        return one[:9] == other[:9]  # else they looked at different things, which says nothing
    (tolerance, a), (_, b) = _samples(one), _samples(other)
    if a.shape != b.shape:
        return False
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return True
    a, b = a[finite], b[finite]
    if a.size == 1 and np.array_equal([a, b], np.rint([a, b])):
        return bool(a != b)  # a count, of steps say
    return bool(np.linalg.norm(a - b) > tolerance * max(np.linalg.norm(a), np.linalg.norm(b)))
