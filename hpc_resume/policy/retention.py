"""Which checkpoints may be deleted: whatever is kept keeps all that it refers to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A checkpoint as its manifest describes it.

    Parameters
    ----------
    name, step
        Of the checkpoint.
    full
        Whether a run can be resumed from it.
    valid
        Whether it is whole, as far as is known; what is not is never deleted.
    refers
        Names of earlier ones in which bytes of it lie.
    size_bytes
        Of its own shards.
    set_aside
        A rollback says that the run does not go on from it.
    jumped
        Its norms are far from those before: some runs do not go on from it.
    """

    name: str
    step: int
    full: bool
    valid: bool
    refers: tuple[str, ...]
    size_bytes: int
    set_aside: bool = False
    jumped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What is to become of a run's checkpoints.

    Parameters
    ----------
    remove
        Names in the order in which they may be deleted: at no moment is one there that refers to one that
        is not.
    keep
        Names of the others, newest first, each with the reason.
    """

    remove: tuple[str, ...]
    keep: Mapping[str, str]


def plan_retention(
    newest_first: Sequence[Candidate],
    *,
    keep: int,
    every_steps: int | None = None,
    pinned: Collection[str] = (),
    drop_set_aside: bool = False,
) -> RetentionPlan:
    """Decide what to keep of a run's checkpoints.

    Parameters
    ----------
    newest_first
        All of them.
    keep
        How many of the newest full ones; at least one.
    every_steps
        Keep each full one whose step is a multiple of this, too.
    pinned
        Names to keep in any case.
    drop_set_aside
        Delete what a rollback has set aside, unless it is pinned or referred to; without it, that is kept. It
        never counts as one of the newest, nor as one of every k-th step.

    Raises
    ------
    ValueError
        If ``keep`` or ``every_steps`` is less than 1: the newest full one is never deleted.

    Examples
    --------
    >>> a = Candidate(name="a", step=10, full=True, valid=True, refers=(), size_bytes=9)
    >>> b = Candidate(name="b", step=20, full=True, valid=True, refers=(), size_bytes=9)
    >>> c = Candidate(name="c", step=30, full=True, valid=True, refers=("a",), size_bytes=1)
    >>> plan = plan_retention([c, b, a], keep=1)
    >>> plan.remove
    ('b',)
    >>> plan.keep
    {'c': 'newest full one', 'a': 'c refers to it'}
    """
    if keep < 1 or (every_steps is not None and every_steps < 1):
        raise ValueError(f"keep={keep}, every_steps={every_steps}: at least 1")
    sound = [each for each in newest_first if each.full and each.valid and not each.set_aside]
    why: dict[str, str] = {}
    for place, each in enumerate(sound[:keep]):
        why[each.name] = "newest full one" if place == 0 else f"one of the newest {keep}"
    steady = next((each for each in sound if not each.jumped), None)
    if steady is not None:
        why.setdefault(steady.name, "newest full one whose norms have not jumped")
    for each in newest_first:
        reason = _reason(each, sound[0] if sound else None, every_steps, pinned)
        if each.set_aside and reason not in _FOR_ALL:
            reason = "" if drop_set_aside else "set aside by a rollback"
        if reason and each.name not in why:
            why[each.name] = reason
    by_name = {each.name: each for each in newest_first}
    reached = list(why)
    for name in reached:  # grows while it is gone through
        for older in by_name[name].refers:
            if older in by_name and older not in why:
                why[older] = f"{name} refers to it"
                reached.append(older)
    return RetentionPlan(
        remove=_referring_first([each for each in newest_first if each.name not in why]),
        keep={each.name: why[each.name] for each in newest_first if each.name in why},
    )


#: Reasons that hold for what is set aside, too.
_FOR_ALL = frozenset({"no full one is whole", "pinned", "damaged, kept for inspection"})


def _reason(
    each: Candidate, newest: Candidate | None, every_steps: int | None, pinned: Collection[str]
) -> str:
    """Why a checkpoint is kept that is not among the newest; empty if nothing speaks for it."""
    if newest is None:
        return "no full one is whole"
    if each.name in pinned:
        return "pinned"
    if not each.valid:
        return "damaged, kept for inspection"
    if each.full and every_steps is not None and each.step % every_steps == 0:
        return f"step is a multiple of {every_steps}"
    if not each.full and each.step > newest.step:
        return "newer than the newest full one"
    return ""


def _referring_first(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Order candidates such that each comes before those that it refers to."""
    left = {each.name: each for each in candidates}
    ordered: list[str] = []
    while left:
        needed = {older for each in left.values() for older in each.refers if older != each.name}
        free = [name for name in left if name not in needed] or list(left)  # a cycle can't be: any order then
        ordered += free
        for name in free:
            del left[name]
    return tuple(ordered)
