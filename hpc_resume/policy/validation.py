"""Whether a restored state computes what the saved one did, and whether a state is like those before it.

Tolerances, where hardware or software differ: a sum of n terms that is added up in another order is off by about
sqrt(n) u relative to the sum of magnitudes, with u half a unit in the last place. Source: N. J. Higham, T. Mary,
*A New Approach to Probabilistic Rounding Error Analysis*, SIAM J. Sci. Comput. 41 (2019). fp32: u = 2^-24, and sums
of 65,536 terms: 2^8 u = 1.5e-5. In bf16, fp16 and TF32 the sums are kept in fp32, but what goes from layer to layer
is rounded: with u = 2^-8 (bf16) or 2^-11 that adds up to sqrt(16) u = 1.6e-2 or 2e-3 over 16 layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from hpc_resume.policy.saving import SAFE_PART

#: From the finest to the coarsest.
PRECISIONS = ("fp64", "fp32", "tf32", "fp16", "bf16")
#: Values near zero are compared with this part of the tolerance, absolutely: there, cancellation leaves only noise.
_NEAR_ZERO = 1e-3
#: A probe that takes longer is not run where a job ends at a time that is not known.
_SHORT_S = 5.0
#: Norms of so many checkpoints tell what is usual, and fewer than the second number tell nothing.
_LAST, _FEWEST = 8, 3


def coarsest(precisions: Sequence[str]) -> str:
    """Give the coarsest of some precisions; fp32 without any."""
    known = [PRECISIONS.index(each) for each in precisions if each in PRECISIONS]
    return PRECISIONS[max(known, default=1)]


def differences(
    before: Mapping[str, float], now: Mapping[str, float], *, tolerance: float | None
) -> Iterator[str]:
    """Say in words which values of a probe are others than before.

    Parameters
    ----------
    before, now
        Values by name.
    tolerance
        Relative difference that they may have; None: they must be the same to the bit.

    Examples
    --------
    >>> list(differences({"loss": 0.5}, {"loss": 0.75}, tolerance=1e-5))
    ['loss was 0.5 and is 0.75']
    >>> list(differences({"loss": 0.5}, {"loss": 0.500001}, tolerance=1e-5))
    []
    """
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            yield f"{name} is {'new' if name in now else 'gone'}"
        elif not _alike(before[name], now[name], tolerance):
            yield f"{name} was {before[name]!r} and is {now[name]!r}"


def _alike(a: float, b: float, tolerance: float | None) -> bool:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return tolerance is not None and math.isclose(a, b, rel_tol=tolerance, abs_tol=_NEAR_ZERO * tolerance)


def other_numerics(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what results depend on to the bit and what is not as before: ``"threads 4, now 8"``."""
    return [
        f"{name} {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def probe_fits(left_s: float | None, probe_s: float, save_s: float | None) -> bool:
    """Decide whether a probe may run before a save that a job's end waits for.

    Parameters
    ----------
    left_s
        Seconds until the job is killed; None if that is not known.
    probe_s, save_s
        What a probe, and a save together with it, were measured to take; None if no save was.

    Examples
    --------
    >>> probe_fits(30, 2.0, 20.0), probe_fits(25, 2.0, 20.0), probe_fits(None, 2.0, None)
    (True, False, True)
    """
    if left_s is None:
        return probe_s <= _SHORT_S
    if save_s is None:
        return 10 * probe_s <= left_s
    return probe_s + max(save_s - probe_s, 0.0) / SAFE_PART <= left_s


def usual_norms(past: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Tell what norms the modules of the last checkpoints had, oldest first; nothing of what is too new to say.

    Examples
    --------
    >>> usual_norms([{"model": 2.0}, {"model": 3.0}, {"model": 4.0}])
    {'model': 3.0}
    """
    last = past[-_LAST:]
    found = {}
    for module in last[-1] if last else ():
        norms = [each[module] for each in last if each.get(module, 0.0) > 0]
        if len(norms) >= _FEWEST:
            found[module] = median(norms)
    return found
