"""Whether the times that a job is given suffice for a save; each shortfall in words, with the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpc_resume.policy.deadline import SaveTime, save_lead_s
from hpc_resume.policy.saving import SAFE_PART

#: A job that spends more of its time limit on waiting for its end is worth a word.
_WASTEFUL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """What saving a run was measured to take.

    Parameters
    ----------
    step
        Of the newest checkpoint.
    seconds
        Of the newest saves, the newest one first.
    """

    step: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The times that a job is given.

    Parameters
    ----------
    where
        Partition or node type, as people call it.
    time_limit_s
        None if it is not known.
    warning_lead_s
        0: there is no warning.
    lead_is_meant
        Whether somebody has set the lead, who will have had a save in mind.
    grace_s
        From the notice of a preemption; None: nobody preempts it.
    kill_wait_s
        From SIGTERM, or the end of the grace time, to SIGKILL.
    every_s, every_steps
        Cadence of periodic checkpoints.
    """

    where: str
    time_limit_s: float | None
    warning_lead_s: float
    lead_is_meant: bool
    grace_s: float | None
    kill_wait_s: float
    every_s: float | None
    every_steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """A time that does not suffice.

    Parameters
    ----------
    hopeless
        No attempt could ever save anything.
    text
        What, with the numbers, what follows from it, and what to do.
    """

    hopeless: bool
    text: str


def shortfalls(given: Given, saves: Savings | None) -> Iterator[Shortfall]:
    """Find the times that can't cover a save.

    Parameters
    ----------
    given
        What the job is given.
    saves
        What saving took; None for a run without checkpoints, where only the settings can contradict each other.
    """
    if saves is None:
        if given.lead_is_meant and _preempted_s(given) < given.warning_lead_s:
            yield _warning(
                f"{_grace(given)}, less than the {given.warning_lead_s:g} s that warning_lead_s allows for a save: "
                f"{_after_a_preemption(given)}"
            )
        return
    save = SaveTime.fit(saves.seconds)
    assert save is not None
    took = f"saving this run took {saves.seconds[0]:.3g} s (step {saves.step})"
    if given.time_limit_s is not None:
        yield from _limit(given.time_limit_s, save, saves, took)
    if 0 < given.warning_lead_s < saves.seconds[0] / SAFE_PART:
        yield _warning(
            f"the warning comes {given.warning_lead_s:g} s before the end, but {took}; the run's own clock stops it in "
            "time as long as it can ask Slurm for the end of the job, but where it can't (in a container, say) that "
            f"save is lost: set warning_lead_s to {_round(save.quantile_s(0.95) / SAFE_PART)} or more"
        )
    if _preempted_s(given) < saves.seconds[0]:
        yield _warning(f"{_grace(given)}, but {took}: {_after_a_preemption(given)}")


def _limit(limit_s: float, save: SaveTime, saves: Savings, took: str) -> Iterator[Shortfall]:
    fastest_s = min(saves.seconds)
    if fastest_s >= limit_s:
        many = (
            f", and the fastest of {len(saves.seconds)} {fastest_s:.3g} s" if len(saves.seconds) > 1 else ""
        )
        yield Shortfall(
            hopeless=True,
            text=f"the time limit is {limit_s:g} s, but {took}{many}: no attempt could save anything; set time_limit_s "
            f"to {_round(10 * save.quantile_s(0.95))} or more",
        )
        return
    lead_s = save_lead_s(limit_s, save)
    if lead_s > _WASTEFUL * limit_s:
        yield _warning(
            f"the time limit is {limit_s:g} s, and {took}: the last save of each attempt must begin {lead_s:.3g} s "
            f"before the end; set time_limit_s to {_round(10 * save.quantile_s(0.95))} or more"
        )


def _preempted_s(given: Given) -> float:
    """Time from the notice of a preemption to the end."""
    return float("inf") if given.grace_s is None else given.grace_s + given.kill_wait_s


def _grace(given: Given) -> str:
    return f"grace time of {given.where} is {given.grace_s or 0:g} s, KillWait {given.kill_wait_s:g} s"


def _after_a_preemption(given: Given) -> str:
    lost = "a preemption will lose the work since the last periodic checkpoint; checkpoint"
    if given.every_s is not None:
        return f"{lost}.every_s={given.every_s:g} bounds it"
    if given.every_steps is not None:
        return f"{lost}.every_steps={given.every_steps} bounds it"
    return "a preemption will lose all work of the attempt, for there are no periodic checkpoints: set checkpoint.every_s"


def _warning(text: str) -> Shortfall:
    return Shortfall(hopeless=False, text=text)


def _round(seconds: float) -> int:
    """Round up to what people would write."""
    step = 10 if seconds < 300 else 60
    return int(-(-seconds // step) * step)
