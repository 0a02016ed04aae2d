"""The order of samples: which sample stands at which position, for any position, without making a list.

Positions count samples of all ranks from the beginning of the run, through all epochs. What stands at one follows from
the seed and the position alone: a keyed permutation of each epoch, or draws by weight; within windows of some global
batches it may be sorted by length. So the state of the data is one number, and going on from any position costs the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hpc_resume.errors import UsageError
from hpc_resume.files import JsonObject

Integers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
#: What random numbers are for: those of one purpose tell nothing of another's.
_WEIGHTED, _BATCHES, _INSIDE, _SAMPLES = 1, 2, 3, 4
#: Global batches that are sorted by length together, if nobody says.
WINDOW = 64


def _mix(values: _Words) -> _Words:
    """SplitMix64's finaliser. Source: Steele, Lea, Flood, OOPSLA 2014."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = values ^ (values >> np.uint64(31))
    return mixed


def _key(seed: int, epochs: npt.ArrayLike) -> _Words:
    """Mix a seed with each of some epochs."""
    low = np.asarray(epochs, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
    origin = np.uint64((seed & 0xFFFFFFFF) << 32) | low
    return _mix(origin ^ _mix(np.array([(seed >> 32) & 0xFFFFFFFF], dtype=np.uint64)))


def _numbers(seed: int, epochs: npt.ArrayLike, purpose: int, counters: npt.ArrayLike) -> _Words:
    """Give a random number of 64 bits for each counter of an epoch."""
    with np.errstate(over="ignore"):
        key = _mix(_key(seed, epochs) ^ np.uint64(purpose << 56))
        return _mix(_mix(key + np.asarray(counters, dtype=np.uint64)) ^ key)


def permute(positions: npt.ArrayLike, size: int, seed: int, epochs: npt.ArrayLike) -> Integers:
    """Give the sample indices at some positions of epochs' orders.

    A Feistel network over the next power of four, walked until it lands inside (at most four rounds of it
    on average): a bijection of ``range(size)`` for each (seed, epoch). Source: Black and Rogaway, Ciphers
    with Arbitrary Finite Domains, CT-RSA 2002.

    Parameters
    ----------
    positions
        Within the epoch, ``0 <= position < size``.
    size
        Samples in the dataset.
    seed, epochs
        Which orders; an epoch for each position, or one for all.
    """
    half_bits = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    values = np.array(positions, dtype=np.uint64, ndmin=1)
    distinct, which = np.unique(np.broadcast_to(epochs, values.shape), return_inverse=True)
    with np.errstate(over="ignore"):
        rounds = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95)
        keys = _mix(_key(seed, distinct) + rounds)
        outside = np.arange(len(values))
        while len(outside):
            left, right = values[outside] >> half_bits, values[outside] & half_mask
            for key in keys[:, which[outside]] if len(distinct) > 1 else keys:
                left, right = right, left ^ (_mix(right ^ key) & half_mask)
            values[outside] = left << half_bits | right
            outside = outside[values[outside] >= np.uint64(size)]
    found: Integers = values.astype(np.int64)
    return found


def sample_seeds(seed: int, epochs: Integers, numbers: Integers) -> list[int]:
    """Give the seeds of the generators that some samples are loaded with, 64 bits each."""
    seeds: list[int] = _numbers(seed, epochs, _SAMPLES, numbers).tolist()
    return seeds


@dataclass(frozen=True, slots=True)
class Draws:
    """Some samples of the order: arrays of one shape.

    Parameters
    ----------
    index
        Of each in the dataset.
    epoch
        In which it is used.
    number
        What tells it from the others of its epoch: its index, or which draw it is where samples are drawn again.
    """

    index: Integers
    epoch: Integers
    number: Integers

    def take(self, which: Any) -> Draws:
        """Take some of the samples, as an array is indexed."""
        return Draws(self.index[which], self.epoch[which], self.number[which])

    def put(self, which: Any, values: Draws) -> None:
        """Set some of the samples."""
        self.index[which], self.epoch[which], self.number[which] = values.index, values.epoch, values.number

    def shaped(self, shape: tuple[int, ...]) -> Draws:
        """Arrange the samples in another shape."""
        return Draws(self.index.reshape(shape), self.epoch.reshape(shape), self.number.reshape(shape))


class Order:
    """Which sample stands at which position.

    Parameters
    ----------
    size
        Samples in the dataset.
    global_batch
        Samples in a step.
    seed
        Of all that is random in it.
    shuffle
        Whether the order is random.
    drop_last
        An epoch ends with its last whole global batch; what is left of it is not used.
    weights
        Draw each sample with replacement, as often as its weight says, shape ``(size,)``.
    lengths
        Of each sample, shape ``(size,)``: samples of about one length come into one global batch.
    window
        Global batches that are sorted by length together.

    Raises
    ------
    UsageError
        If the weights or lengths are none.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        weights: Any = None,
        lengths: Any = None,
        window: int = WINDOW,
    ) -> None:
        if drop_last and size < global_batch:
            raise UsageError(
                f"run.loader: drop_last=True leaves nothing of {size} samples in global batches of {global_batch}"
            )
        if weights is not None and not shuffle:
            raise UsageError("run.loader: weights=… draws at random; leave out shuffle=False")
        if window < 1:
            raise UsageError(f"run.loader: window={window} must be 1 or more")
        self.size = size
        #: Samples of an epoch that are used.
        self.epoch_samples = size // global_batch * global_batch if drop_last else size
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._window = window
        self._lengths = None if lengths is None else _values("lengths", lengths, size)
        self._cumulative: npt.NDArray[np.float64] | None = None
        self._last = size - 1
        described: JsonObject = {"size": size, "global_batch": global_batch, "seed": seed, "shuffle": shuffle}
        if drop_last:
            described["drop_last"] = True
        if weights is not None:
            values = _values("weights", weights, size)
            with np.errstate(over="ignore"):
                self._cumulative = np.cumsum(values)
            if not 0 < self._cumulative[-1] < np.inf:
                raise UsageError("run.loader: weights=… adds up to nothing, or to more than can be counted")
            self._last = int(np.flatnonzero(values)[-1])
            described["weights"] = _digest(values)
        if self._lengths is not None:
            described |= {"lengths": _digest(self._lengths), "window": window}
        #: What the order follows from, as JSON.
        self.described = described
        self._sorted: dict[int, Draws] = {}

    def at(self, positions: Integers) -> Draws:
        """Give the samples at some positions, of any shape."""
        flat = positions.reshape(-1)
        found = self._base(flat) if self._lengths is None else self._bucketed(flat)
        return found.shaped(positions.shape)

    def _base(self, positions: Integers) -> Draws:
        """Give the samples at some positions without regard to lengths."""
        epochs = positions // self.epoch_samples
        inner = positions - epochs * self.epoch_samples
        if not self._shuffle:
            return Draws(inner, epochs, inner)
        if self._cumulative is None:
            index = permute(inner, self.size, self._seed, epochs)
            return Draws(index, epochs, index)
        bits = _numbers(self._seed, epochs, _WEIGHTED, inner) >> np.uint64(11)
        targets = bits.astype(np.float64) * 2.0**-53 * self._cumulative[-1]
        index = np.searchsorted(self._cumulative, targets, side="right")
        return Draws(np.minimum(index, self._last), epochs, inner)  # rounding may reach the sum itself

    # ------------------------------------------------- by length

    def _bucketed(self, positions: Integers) -> Draws:
        begins, ends = self._windows(positions // self._global_batch)
        mixed = begins == ends
        found = Draws(*(np.empty(len(positions), dtype=np.int64) for _ in range(3)))
        found.put(mixed, self._base(positions[mixed]))
        for begin in np.unique(begins[~mixed]).tolist():
            inside = ~mixed & (begins == begin)
            part = self._by_length(begin, int(ends[inside][0]))
            found.put(inside, part.take(positions[inside] - begin * self._global_batch))
        return found

    def _windows(self, steps: Integers) -> tuple[Integers, Integers]:
        """Give the steps that each one is sorted with: the first, and one past the last; the same if with none.

        A window is of one epoch. So steps that have samples of two are in none.
        """
        batch, length = self._global_batch, self.epoch_samples
        epochs = steps * batch // length
        first, last = -(-epochs * length // batch), (epochs + 1) * length // batch
        begins = steps - (steps - first) % self._window
        inside = (first <= steps) & (steps < last)
        return np.where(inside, begins, steps), np.where(
            inside, np.minimum(begins + self._window, last), steps
        )

    def _by_length(self, begin: int, end: int) -> Draws:
        """Sort a window by length, and shuffle its global batches and what is in each."""
        if begin not in self._sorted:
            assert self._lengths is not None
            batch = self._global_batch
            draws = self._base(np.arange(begin * batch, end * batch))
            places = np.argsort(self._lengths[draws.index], kind="stable").reshape(-1, batch)
            if self._shuffle:
                of_batches = _numbers(self._seed, begin, _BATCHES, np.arange(len(places)))
                places = places[np.argsort(of_batches, kind="stable")]
                # Else rank 0 would have the shortest of each, and wait for the last rank.
                inside = _numbers(self._seed, begin, _INSIDE, np.arange(places.size)).reshape(places.shape)
                places = np.take_along_axis(places, np.argsort(inside, axis=1, kind="stable"), axis=1)
            self._sorted = {begin: draws.take(places.reshape(-1))}
        return self._sorted[begin]


def _values(name: str, given: Any, size: int) -> npt.NDArray[np.float64]:
    """Take what is given for each sample: finite, and not negative."""
    try:
        values = np.ascontiguousarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"run.loader: {name}=… must be a number for each sample ({error!s:.100})") from error
    if values.shape != (size,):
        raise UsageError(
            f"run.loader: {name}=… has shape {list(values.shape)}, the dataset {size} samples; give one for each"
        )
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        raise UsageError(f"run.loader: {name}[{place}] is {values[place]}; each must be finite and 0 or more")
    return values


def _digest(values: npt.NDArray[np.float64]) -> str:
    return xxhash.xxh3_128_hexdigest(values.astype("<f8", copy=False).data)
