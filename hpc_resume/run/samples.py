"""Loading samples: what is random in a sample follows from the sample, not from who loads it.

Before each sample the generators of Python, NumPy and PyTorch (the CPU's) are seeded from (seed, epoch, index), in
workers and in the rank's own process alike; there, its own streams are put back afterwards, so that loading moves
nothing that dropout draws from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils.data import get_worker_info

from hpc_resume.errors import UsageError
from hpc_resume.run import generators
from hpc_resume.run.order import Draws, sample_seeds


class SampleKey(NamedTuple):
    """What names the use of a sample; good as a seed: ``np.random.default_rng(hr.sample_key())``.

    Parameters
    ----------
    seed
        Of the run.
    epoch
        From 0.
    number
        Index of the sample; with ``weights``, which draw of the epoch it is.
    """

    seed: int
    epoch: int
    number: int


_current: SampleKey | None = None
#: Tells what a batch is collated with from what its first sample is loaded with.
_COLLATING = 0x9E3779B97F4A7C15


def sample_key() -> SampleKey:
    """Name the sample that is being loaded: for datasets that need the epoch, or have generators of their own.

    Returns
    -------
    SampleKey
        ``(seed, epoch, number)``, the same on any number of ranks and workers.

    Raises
    ------
    UsageError
        Outside of the ``__getitem__`` of a dataset that ``run.loader`` was given.
    """
    if _current is None:
        raise UsageError(
            "hr.sample_key: no sample is being loaded here; call it inside of __getitem__ of a dataset that "
            "run.loader was given (one with __getitems__ needs augment_seed=True)"
        )
    return _current


class Samples:
    """A dataset as DataLoader sees it: gives whole batches for what the order drew.

    Parameters
    ----------
    dataset
        The user's.
    collate
        Makes a batch of samples.
    seed
        Of the run.
    seeded
        Whether generators are seeded before each sample.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *, seed: int, seeded: bool) -> None:
        self.dataset = dataset
        self._collate = collate
        self._seed = seed
        self._seeded = seeded

    def __getitems__(self, part: Draws) -> Any:
        """Load a rank's part of a global batch, and collate it."""
        if not self._seeded:
            return self._collate(self._unseeded(part))
        if get_worker_info() is not None:
            return self._load(part)
        with generators.put_back():
            return self._load(part)

    def _load(self, part: Draws) -> Any:
        global _current  # noqa: PLW0603 - datasets ask for it, and nothing of ours is passed to them
        seeds = sample_seeds(self._seed, part.epoch, part.number)
        rows = zip(seeds, part.index.tolist(), part.epoch.tolist(), part.number.tolist(), strict=True)
        samples = []
        try:
            for seed, index, epoch, number in rows:
                _current = SampleKey(self._seed, epoch, number)
                generators.seed_cpu(seed)
                samples.append(self.dataset[index])
        finally:
            _current = None
        # What collating draws (masking of tokens) must not depend on what the last sample has drawn.
        generators.seed_cpu(seeds[0] ^ _COLLATING)
        return self._collate(samples)

    def _unseeded(self, part: Draws) -> Sequence[Any]:
        global _current  # noqa: PLW0603 - as above
        indices = part.index.tolist()
        if getattr(self.dataset, "__getitems__", None):
            found: Sequence[Any] = self.dataset.__getitems__(indices)
            return found
        samples = []
        try:
            for index, epoch, number in zip(indices, part.epoch.tolist(), part.number.tolist(), strict=True):
                _current = SampleKey(self._seed, epoch, number)
                samples.append(self.dataset[index])
        finally:
            _current = None
        return samples


def as_it_is(batch: Any) -> Any:
    """Return a batch that is collated already."""
    return batch


class Unwrapped:
    """Initialises a worker such that ``torch.utils.data.get_worker_info().dataset`` is the user's.

    Parameters
    ----------
    then
        The user's ``worker_init_fn``.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then

    def __call__(self, worker: int) -> None:
        """Run in the worker."""
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, Samples):
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._then is not None:
            self._then(worker)
