"""Random generators: Python's, NumPy's, PyTorch's on the CPU and on every GPU, and those that users track.

Before ``run.track`` all ranks have the same seed, so that they initialise alike. From then on every rank has
streams of its own: restored where the run continues on as many ranks as before, and else derived from (seed,
step, rank), and for tracked ones their name, because the saved streams of N ranks say nothing about those of M.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from hpc_resume.checkpoint import streams
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError
from hpc_resume.run.attempt import ranks_text

#: Words of a Mersenne twister's state.
_MERSENNE_WORDS = 624


def seed_all(seed: int, *stream: int | str) -> None:
    """Seed every generator of this process from a seed and what names the stream."""
    digest = derive(seed, *stream)
    random.seed(digest)
    np.random.seed(digest % 2**32)  # noqa: NPY002 - users' code draws from the global generator
    torch.manual_seed(digest % 2**63)


def derive(seed: int, *stream: int | str) -> int:
    """Make a seed of 64 bits from a seed and what names the stream."""
    text = ",".join(map(str, (seed, *stream))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def seed_cpu(seed: int) -> None:
    """Seed the generators of this process that are the CPU's from 64 bits; a GPU's are left alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - as above
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Let the generators that are the CPU's be used for something else, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - as above
    cpu = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - as above
        torch.default_generator.set_state(cpu)


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
        mine, *others = (torch.cuda.get_rng_state(device) for device in _devices())
        states["rng/cuda"] = mine
        if others:
            states["rng/cuda_others"] = torch.stack(others)
    return states


def _devices() -> list[int]:
    """Give the GPUs that this process sees: its own first, then those after it, in a circle."""
    count = torch.cuda.device_count()
    return [(torch.cuda.current_device() + place) % count for place in range(count)]


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
        saved = [states["rng/cuda"], *states.get("rng/cuda_others", ())]
        for device, state in zip(
            _devices(), saved, strict=False
        ):  # the process may see more or fewer of them
            torch.cuda.set_rng_state(state, device)


def restore_all(
    state: TrackedState, reader: CheckpointReader, *, rank: int, world_size: int, seed: int
) -> str | None:
    """Set the generators of a rank to where they were, or begin them anew.

    Parameters
    ----------
    state
        What is tracked, users' generators among it.
    reader
        Of the checkpoint.
    rank, world_size
        This process's place.
    seed
        Of the run.

    Returns
    -------
    str or None
        Why they could not be restored, and begin streams that are derived from (seed, step, rank, name).

    Raises
    ------
    MismatchError
        If a generator is of another kind than it was.
    IntegrityError
        If a state is damaged.
    """
    manifest = reader.manifest
    why = None
    if manifest.world_size != world_size:
        why = f"the checkpoint was taken on {ranks_text(manifest.world_size)}"
    elif rank in manifest.missing_ranks:
        why = f"rank {rank} had died when the checkpoint was taken"
    own = {} if why else {f"rng/{name}": each for name, each in state.private(reader, rank, "rng/").items()}
    if why is None and "rng/torch" not in own:
        why = "the checkpoint has no states of generators"  # other tools wrote it, or it was imported
    if why is None:
        restore(own)
    else:
        seed_all(seed, manifest.step, rank)
    for name in state.restore_streams(reader):
        streams.reseed(state.streams[name], seed, manifest.step, rank, name)
    return why
