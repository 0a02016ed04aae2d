"""Random generators: Python's, NumPy's, PyTorch's on the CPU and on the GPU.

Before ``run.track`` all ranks have the same seed, so that they initialise alike. From then on every rank has
streams of its own: restored where the run continues on as many ranks as before, and else derived from (seed,
step, rank), because the saved streams of N ranks say nothing about those of M.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch

from hpc_resume.errors import IntegrityError

#: Words of a Mersenne twister's state.
_MERSENNE_WORDS = 624


def seed_all(seed: int, *stream: int) -> None:
    """Seed every generator of this process from a seed and the numbers that name the stream."""
    text = ",".join(map(str, (seed, *stream))).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    random.seed(digest)
    np.random.seed(digest % 2**32)  # noqa: NPY002 - users' code draws from the global generator
    torch.manual_seed(digest % 2**63)


def capture() -> dict[str, torch.Tensor]:
    """Return the states of this process's generators, as uint8 and int64 tensors by name."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - as above
    states = {
        "rng/python": torch.tensor([version, *words], dtype=torch.int64),
        # A fixed length, whether there is one or not: then every checkpoint is laid out alike.
        "rng/python_gauss": torch.tensor([0.0, 0.0] if gauss is None else [1.0, gauss], dtype=torch.float64),
        "rng/numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64).copy()),
        "rng/numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "rng/torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: Mapping[str, torch.Tensor]) -> None:
    """Set this process's generators to captured states.

    Raises
    ------
    IntegrityError
        If they are none.
    """
    try:
        _restore(states)
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise IntegrityError(
            f"no states of random generators: {type(error).__name__}: {error!s:.200}"
        ) from error


def _restore(states: Mapping[str, torch.Tensor]) -> None:
    version, *words = states["rng/python"].tolist()
    has_next, gauss = states["rng/python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_next else None))
    position, has_gauss, cached = states["rng/numpy_rest"].tolist()
    keys = states["rng/numpy"].numpy().astype(np.uint32)
    if not 0 <= position <= keys.size == _MERSENNE_WORDS:
        raise ValueError("NumPy's place is outside its words")  # NumPy itself would read there
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002 - as above
    torch.set_rng_state(states["rng/torch"])
    if torch.cuda.is_available() and "rng/cuda" in states:
        torch.cuda.set_rng_state(states["rng/cuda"])
