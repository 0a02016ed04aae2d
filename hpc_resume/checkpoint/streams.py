"""Random generators of users, as a rank's own bytes: typed JSON, so that restoring runs no code.

Each rank draws from its own stream. What makes them alike or different from rank to rank is the script's business;
that they go on where they were is ours.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hpc_resume.checkpoint import objects
from hpc_resume.errors import IntegrityError, MismatchError, StateError

Stream = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
#: A state takes a whole number of these, so that the layout of a shard stays the same while numbers get longer.
_BYTES = 8192
#: Words of a Mersenne twister's state, and numbers that Philox draws at a time.
_PLACES = {"pos": 624, "buffer_pos": 4}


def is_stream(item: Any) -> bool:
    """Whether something is a random generator that can be tracked."""
    return isinstance(item, Stream)


def check(key: str, stream: Stream) -> None:
    """Refuse a generator that has no state.

    Raises
    ------
    StateError
        If it draws from the system's entropy.
    """
    if isinstance(stream, random.SystemRandom):
        raise StateError(
            f"track({key}=…): SystemRandom draws from the system's entropy and has no state; use random.Random(seed)"
        )


def take(key: str, stream: Stream) -> torch.Tensor:
    """Write the state of a generator as bytes, filled up with spaces: uint8, a multiple of 8192 long.

    Parameters
    ----------
    key
        Under which it is tracked, for messages.
    stream
        The generator.

    Raises
    ------
    StateError
        If its state holds something that can't be stored.
    """
    data = objects.dump(objects.encode(_state_of(stream), (key,)))
    data = data.ljust(-(-len(data) // _BYTES) * _BYTES)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def put(key: str, stream: Stream, saved: torch.Tensor) -> None:
    """Set a generator to a state that was taken.

    Raises
    ------
    MismatchError
        If it was another kind of generator.
    IntegrityError
        If it is no state of one.
    """
    if saved.dtype != torch.uint8 or saved.ndim != 1:
        raise IntegrityError(f"{key}: no state of a random generator")
    state = objects.decode(objects.parse(saved.numpy().tobytes()))
    now = _state_of(stream)
    if not isinstance(state, dict) or not isinstance(state.get("kind"), str):
        raise IntegrityError(f"{key}: no state of a random generator")
    if state["kind"] != now["kind"]:
        raise MismatchError(f"{key}: a {now['kind']} generator now, in the checkpoint a {state['kind']}")
    try:
        _put(stream, state["state"], now["state"])
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        raise IntegrityError(
            f"{key}: no state of a {now['kind']} generator: {type(error).__name__}: {error!s:.200}"
        ) from error


def reseed(stream: Stream, *names: int | str) -> None:
    """Begin a stream anew, from the numbers and words that name it."""
    digest = hashlib.sha256(",".join(map(str, names)).encode()).digest()
    seed = int.from_bytes(digest[:8], "little")
    if isinstance(stream, torch.Generator):
        stream.manual_seed(seed % 2**63)
    elif isinstance(stream, random.Random):
        stream.seed(seed)
    elif isinstance(stream, np.random.RandomState):
        stream.seed(seed % 2**32)
    else:
        fresh = type(stream.bit_generator)(seed)
        stream.bit_generator.state = fresh.state


def _state_of(stream: Stream) -> dict[str, Any]:
    if isinstance(stream, torch.Generator):
        return {"kind": f"torch {stream.device.type}", "state": stream.get_state().numpy().tobytes()}
    if isinstance(stream, random.Random):
        return {"kind": "Python", "state": stream.getstate()}
    if isinstance(stream, np.random.RandomState):
        state: Any = stream.get_state(legacy=False)
    else:
        state = stream.bit_generator.state
    return {"kind": f"NumPy {state['bit_generator']}", "state": _plain(state)}


def _plain(value: Any) -> Any:
    """Turn NumPy's arrays and numbers into Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _put(stream: Stream, state: Any, now: Any) -> None:
    if isinstance(stream, torch.Generator):
        if not isinstance(state, bytes) or len(state) != len(now):
            raise TypeError("a state of another size")
        stream.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(stream, random.Random):
        stream.setstate(state)
    elif isinstance(stream, np.random.RandomState):
        stream.set_state(_like(state, stream.get_state(legacy=False)))
    else:
        stream.bit_generator.state = _like(state, stream.bit_generator.state)


def _like(saved: Any, present: Any, key: str = "") -> Any:
    """Give a state of NumPy's back as what it was; NumPy itself believes whatever it is given.

    Parameters
    ----------
    saved
        As it was read.
    present
        The generator's state now: it has the same keys, and arrays of the same length.
    key
        Where in the state.
    """
    if isinstance(present, dict):
        if not isinstance(saved, dict) or saved.keys() != present.keys():
            raise TypeError(f"{key or 'state'}: other keys")
        return {each: _like(saved[each], present[each], each) for each in present}
    if isinstance(present, np.ndarray):
        made = np.array(saved, dtype=present.dtype)
        if made.shape != present.shape or made.tolist() != saved:
            raise ValueError(f"{key}: another array")
        return made
    wanted: type = next((kind for kind in (str, float) if isinstance(present, kind)), int)
    if type(saved) is not wanted:
        raise TypeError(f"{key}: no {wanted.__name__}")
    if key in _PLACES and not (isinstance(saved, int) and 0 <= saved <= _PLACES[key]):
        raise ValueError(f"{key}: a place outside of what was drawn")  # NumPy itself would read there
    return saved
