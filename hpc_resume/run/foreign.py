"""Loaders that are not ours: anything with ``state_dict`` and ``load_state_dict`` that gives batches.

Such a state is one rank's: it says how many batches this rank was handed, of its part of the data. So each rank's is
saved, and it is a position only where there are as many ranks again; unless the object says ``elastic = True``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from hpc_resume.errors import Declined, IntegrityError, StateError, UsageError
from hpc_resume.files import JsonObject
from hpc_resume.run import generators
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.workers import Shielded

#: More than this of tensors in a rank's position is no position any more.
_MOST_BYTES = 16 << 20
_TENSOR = "hpc_resume/tensor"
_DTYPES = frozenset({"uint8", "int8", "int16", "int32", "int64", "bool", "float16", "float32", "float64"})


def is_loader(item: Any) -> bool:
    """Whether a tracked object is a loader of somebody else: it can be iterated over, and has a state."""
    return has_position(item) and not isinstance(item, ElasticLoader | torch.nn.Module | Mapping)


def has_position(item: Any) -> bool:
    """Whether an iterable has a state that can be saved."""
    kind = type(item)
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(item, name, None)) for name in names) and (
        hasattr(kind, "__iter__") or hasattr(kind, "__next__")
    )


class ForeignLoader:
    """A loader, pass after pass, and its state as a part of this rank's.

    Parameters
    ----------
    key
        Under which it is tracked.
    loader
        The user's.
    rank, world_size
        This process's place.
    seed
        Of the run.
    """

    def __init__(self, key: str, loader: Any, *, rank: int, world_size: int, seed: int) -> None:
        self.key = key
        self.loader = loader
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._epoch = 0
        self._resumed = False
        #: Samplers that would draw their order from the global generator.
        self._lacking = {id(part) for part in self._parts() if getattr(part, "generator", part) is None}
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.worker_init_fn = Shielded(loader.worker_init_fn)

    @property
    def elastic(self) -> bool:
        """Whether the loader says that its state is a position on any number of ranks."""
        return bool(getattr(self.loader, "elastic", False))

    @property
    def name(self) -> str:
        """What it is."""
        return type(self.loader).__qualname__

    def __iter__(self) -> Iterator[Any]:
        """Go on from where it is, and begin anew when it has come to its end."""
        while True:
            begun = self._begin()
            resumed, self._resumed = self._resumed, False
            batches = 0
            for batch in begun:
                batches += 1
                yield batch
            if not batches and not resumed:
                if self._epoch == 0:
                    raise UsageError(f"run.steps: {self.key} ({self.name}) gave no batch at all")
                return  # it can be gone through once
            self._epoch += 1

    def _begin(self) -> Iterator[Any]:
        """Begin a pass, or go on in the one that was interrupted, as it was begun."""
        seed = generators.derive(self._seed, "pass", self._epoch, self._rank)
        for part in self._parts():
            if callable(tell := getattr(part, "set_epoch", None)):
                tell(self._epoch)
            if isinstance(part, Sampler) and id(part) in self._lacking:
                # One that skips what was handed out needs the order that it had when the pass was begun.
                vars(part)["generator"] = torch.Generator().manual_seed(seed)
        with generators.put_back():  # starting draws seeds of workers
            generators.seed_cpu(seed)
            return iter(self.loader)

    def _parts(self) -> list[Any]:
        """List the loader and what it is made of."""
        loader = self.loader
        batches = getattr(loader, "batch_sampler", None)
        parts = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
        return list({id(part): part for part in [*parts, getattr(loader, "dataset", None)]}.values())

    # ------------------------------------------------- state

    def state_dict(self) -> JsonObject:
        """Return the loader's state, and whose it is."""
        place = {} if self.elastic else {"rank": self._rank, "world_size": self._world_size}
        with generators.put_back():  # one that has not been begun may begin for it
            state = self.loader.state_dict()
        return {"epoch": self._epoch, "loader": _Packing(self.key).pack(state, (self.key,)), **place}

    def check_state(self, state: JsonObject) -> None:
        """Refuse a state that is no position here, before anything is loaded.

        Raises
        ------
        Declined
            If it was saved on another number of ranks, and says nothing on this one.
        IntegrityError
            If it is another rank's, or damaged.
        """
        if "loader" in state:
            try:
                _unpack(state["loader"])
            except (TypeError, ValueError, LookupError) as error:
                raise IntegrityError(
                    f"no state of a loader: {type(error).__name__}: {error!s:.200}"
                ) from error
        if self.elastic or "world_size" not in state:
            return
        saved = state["world_size"]
        if saved != self._world_size:
            raise Declined(
                f"{self.name} was saved on {saved} ranks, and its state on each says only where that rank was in its "
                f"own part of the data; there is no telling where {self._world_size} ranks go on. Continue on "
                f"{saved} ranks, or load with run.loader(dataset, global_batch=…), which goes on on any number; if "
                "its state is the same on any number of ranks, let it have an attribute elastic = True"
            )
        if state.get("rank") != self._rank:
            raise IntegrityError(
                f"where {self.name} of rank {self._rank} was is lost: the rank was gone when this was saved"
            )

    def load_state_dict(self, state: JsonObject) -> None:
        """Go to a position."""
        if "loader" not in state or "epoch" not in state:  # saved before it was iterable
            self.loader.load_state_dict(state)
            return
        self._epoch = int(state["epoch"])
        self._resumed = True
        self.loader.load_state_dict(_unpack(state["loader"]))


class _Packing:
    """Turns the tensors of a rank's position into bytes: a checkpoint's tensors are of all ranks."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._bytes = 0

    def pack(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._pack_tensor(value, path)
        kind = type(value)
        if kind in {dict, OrderedDict}:
            return kind((key, self.pack(each, (*path, str(key)))) for key, each in value.items())
        if kind in {list, tuple}:
            return kind(self.pack(each, (*path, str(place))) for place, each in enumerate(value))
        return value

    def _pack_tensor(self, value: torch.Tensor | np.ndarray[Any, Any], path: tuple[str, ...]) -> JsonObject:
        is_tensor = isinstance(value, torch.Tensor)
        where = "/".join(path)
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise StateError(f"{where}: a loader's state with {kind} in it can't be stored")
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        self._bytes += array.nbytes
        if self._bytes > _MOST_BYTES:
            raise StateError(
                f"{where}: the state of the loader {self._key} holds more than {_MOST_BYTES >> 20} MiB of tensors on "
                "this rank; have its state_dict() say where it is, not what it has read"
            )
        return {
            _TENSOR: [kind, list(array.shape), np.ascontiguousarray(array).tobytes()],
            "is_tensor": is_tensor,
        }


def _unpack(value: Any) -> Any:
    if type(value) in {dict, OrderedDict}:
        if _TENSOR in value:
            kind, shape, data = value[_TENSOR]
            if kind not in _DTYPES:
                raise IntegrityError(f"a loader's state with {kind!s:.40} in it")
            if not all(type(extent) is int and extent >= 0 for extent in shape):
                raise IntegrityError(f"a loader's state with a tensor of shape {shape!s:.40}")
            flat = np.frombuffer(bytearray(data), dtype=kind) if data else np.empty(0, dtype=kind)
            array = flat.reshape(shape)
            return torch.from_numpy(array) if value["is_tensor"] else array
        return type(value)((key, _unpack(each)) for key, each in value.items())
    if type(value) in {list, tuple}:
        return type(value)(_unpack(each) for each in value)
    return value
