"""When the last save before a known end of the job begins, and how long to wait for a step to end.

A save that begins a lead D before the end is committed in time with the chance F(D) that saving takes no longer,
and keeps what has been done until then. So the best lead maximises (T - D) F(D), where T is all the work that
would be lost without it. F is log-normal, fitted to saves that were measured.

Source: the shape of measured saves on shared filesystems; checked by simulation (T = 60, median 5, sigma 0.35:
lead 9.7, of which 48.8 are kept, against 31.2 with the mean as the lead and 40.0 with four medians).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from hpc_resume.policy.saving import SAFE_PART, patience_s

#: Scatter of a save's time until it is measured, and how many measurements that guess counts for.
_SIGMA = 0.35
_SIGMA_WEIGHT = 4
#: Shorter than the clock can tell.
_SHORTEST_S = 1e-3
#: From the last step's end to having asked for the continuation, besides saving: two scheduler commands of
#: 10 to 100 ms (measured), ranks that agree and leave.
LAST_WORD_S = 2.0
#: Lead where no save was measured and no warning is configured: this, but no more than a quarter of the time.
_UNMEASURED_S = 60.0
_UNMEASURED_PART = 0.25
#: So many of the newest steps tell how long one takes.
_STEPS = 256
#: Longest time that a save is waited for where none was measured: a large state on a slow filesystem takes its time.
_SAVE_S = 3600.0
#: A save faster or slower than these quantiles is not reckoned with.
_FASTEST, _SLOWEST = 0.05, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveTime:
    """How long a save takes, from the end of a step to the commit: a log-normal distribution.

    Parameters
    ----------
    median_s
        Half of all saves are faster.
    sigma
        Standard deviation of the logarithm.
    measured
        How many saves it was learnt from.
    """

    median_s: float
    sigma: float
    measured: int = 0

    @classmethod
    def fit(cls, seconds: Sequence[float]) -> SaveTime | None:
        """Learn from measured saves; None without any.

        Few of them say little about their scatter, so a usual one is mixed in, and what the median may be off by
        is added.
        """
        if not seconds:
            return None
        logs = [math.log(max(each, _SHORTEST_S)) for each in seconds]
        n = len(logs)
        mean = sum(logs) / n
        squares = sum((each - mean) ** 2 for each in logs)
        variance = (_SIGMA_WEIGHT * _SIGMA**2 + squares) / (_SIGMA_WEIGHT + n - 1)
        return cls(median_s=math.exp(mean), sigma=math.sqrt(variance * (1 + 1 / n)), measured=n)

    def chance(self, lead_s: float) -> float:
        """Probability that a save takes no longer than this."""
        if lead_s <= 0:
            return 0.0
        return NormalDist().cdf(math.log(lead_s / self.median_s) / self.sigma)

    def quantile_s(self, probability: float) -> float:
        """Time that a save takes no longer than with a probability."""
        return self.median_s * math.exp(self.sigma * NormalDist().inv_cdf(probability))

    def __str__(self) -> str:
        return f"a save {self.median_s:.3g} s (sigma {self.sigma:.2f}, {self.measured} measured)"


def best_lead_s(work_s: float, save: SaveTime) -> float:
    """Tell how long before the end the last save should begin.

    Parameters
    ----------
    work_s
        From the newest committed checkpoint to the end of the job: all that may be lost.
    save
        How long a save takes.

    Examples
    --------
    >>> round(best_lead_s(60, SaveTime(median_s=5, sigma=0.35)), 1)
    9.7
    """
    # The derivative of log((T - D) F(D)) falls, because a log-normal F is log-concave: one zero, by bisection.
    low, high = 0.0, max(work_s, 0.0)
    for _ in range(60):
        lead_s = (low + high) / 2
        score = math.log(lead_s / save.median_s) / save.sigma if lead_s > 0 else -math.inf
        density = NormalDist().pdf(score) / (save.sigma * lead_s) if lead_s > 0 else 0.0
        chance = save.chance(lead_s)
        if chance == 0.0 or (work_s - lead_s) * density > chance:
            low = lead_s
        else:
            high = lead_s
    return (low + high) / 2


def save_lead_s(work_s: float, save: SaveTime) -> float:
    """Tell how long before the end the last save does begin; parameters as for :func:`best_lead_s`.

    With less time than a usual save takes and a margin, it would count as one that does not fit, and only the model
    would be saved.
    """
    safe_s = save.median_s / SAFE_PART
    lead_s = best_lead_s(work_s, save)
    return max(lead_s, safe_s) if safe_s < work_s else lead_s


@dataclass(slots=True)
class StepTimes:
    """How long the newest steps took; one thread adds while another reads.

    Attributes
    ----------
    added
        Number of steps so far.
    """

    added: int = 0
    _seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float) -> None:
        """Take note of a step; the first one, which compiles and warms up, gives way to the second."""
        if self.added == 1:
            self._seconds[0] = seconds
        elif len(self._seconds) < _STEPS:
            self._seconds.append(seconds)
        else:
            self._seconds[self.added % _STEPS] = seconds
        self.added += 1

    def most_s(self) -> float:
        """95th percentile; 0 before the first step."""
        ordered = sorted(self._seconds)
        return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StopPlan:
    """When all ranks are asked to stop.

    Parameters
    ----------
    lead_s
        Before the end of the job.
    quiet_s
        So long before that moment no other save is begun, which might be under way still.
    why
        The numbers behind it.
    """

    lead_s: float
    quiet_s: float = 0.0
    why: str


def plan_stop(
    *, work_s: float, begun: bool, saves_s: Sequence[float], step_s: float, warning_lead_s: float
) -> StopPlan:
    """Tell how long before the end of the job all ranks are asked to stop.

    Parameters
    ----------
    work_s
        From the newest committed checkpoint to the end of the job.
    begun
        Whether this attempt has completed a step; before, there is nothing to save, and nothing to lose by
        going on to the end.
    saves_s
        Measured saves, from the end of a step to the commit.
    step_s
        What a step may take: the one that is being done will be completed.
    warning_lead_s
        What is configured: counts until a save has been measured.
    """
    if not begun:
        return StopPlan(lead_s=LAST_WORD_S, why="no step is completed")
    save = SaveTime.fit(saves_s)
    quiet_s = 0.0
    if save is None:
        lead_s = max(warning_lead_s, min(_UNMEASURED_S, _UNMEASURED_PART * work_s))
        what = f"no save was measured, so a lead of {lead_s:.3g} s"
    else:
        lead_s = save_lead_s(work_s, save)
        quiet_s = save.quantile_s(_SLOWEST)
        what = f"{save}, so a lead of {lead_s:.3g} s"
    lead_s += step_s + LAST_WORD_S
    return StopPlan(lead_s=lead_s, quiet_s=quiet_s, why=f"{what}; a step {step_s:.3g} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a stop may be in coming, in seconds from now.

    Parameters
    ----------
    leave_s
        Then not even a fast save fits any more: whoever can leaves as it is. None: no such moment is known.
    give_up_s
        Then the process leaves by force.
    """

    leave_s: float | None
    give_up_s: float


def patience(
    *, ends_in_s: float | None, ending: bool, saves_s: Sequence[float], watchdog_s: float
) -> Patience:
    """Tell how long to wait for a step boundary after a stop was asked for.

    Parameters
    ----------
    ends_in_s
        Until the job is killed; None if that is not known.
    ending
        Whether the stop was asked for because of that end. If not, a boundary that does not come is a hang.
    saves_s
        Measured saves.
    watchdog_s
        What is configured, for a stop of which no end is known.
    """
    if ends_in_s is None:
        return Patience(leave_s=None, give_up_s=watchdog_s)
    last_s = max(ends_in_s - LAST_WORD_S, 0.0)
    if not ending:
        return Patience(leave_s=None, give_up_s=min(watchdog_s, last_s))
    save = SaveTime.fit(saves_s)
    fastest_s = 0.0 if save is None else save.quantile_s(_FASTEST)
    return Patience(leave_s=max(last_s - max(fastest_s, LAST_WORD_S), 0.0), give_up_s=last_s)


def save_limit_s(saves_s: Sequence[float]) -> float:
    """Tell how long a save may take, with a signal to stop waiting for its end, before it counts as one that hangs.

    Parameters
    ----------
    saves_s
        Measured saves.
    """
    return patience_s(max(saves_s), None) if saves_s else _SAVE_S
