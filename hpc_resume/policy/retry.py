"""Whether a run goes on after an attempt, and how: by what ended it, what came before, and the budget.

Causes are the values of :class:`hpc_resume.scheduler.cause.Cause`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_resume.policy.decision import Decision
from hpc_resume.settings import BudgetSettings

#: The allocation was taken away, or could not be used: no fault of the run, so these do not count as idle.
_TAKEN_AWAY = frozenset({"preemption", "requeue", "node_failure", "bad_node", "declined"})
#: How often each cause may end attempts in a row without progress: names of settings. The others, time
#: limits among them, have no limit of their own.
_BUDGETS = {
    "crash": "crashes",
    "out_of_memory": "out_of_memory",
    "hang": "hangs",
    "node_failure": "node_failures",
    "preemption": "preemptions",
    "requeue": "preemptions",
    "bad_node": "node_failures",
}
#: Attempts that lasted as long as they could: waiting before the next one would save nobody anything.
_LASTED = frozenset({"time_limit"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PastAttempt:
    """An attempt as the policy sees it.

    Parameters
    ----------
    number
        From 1.
    cause
        What ended it.
    first_step
        Completed steps at its start; ``None`` if it died before it knew.
    node_type
        What kind of nodes it ran on.
    faulty
        Nodes on which a rank crashed, or that failed.
    """

    number: int
    cause: str
    first_step: int | None = None
    node_type: str | None = None
    faulty: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What came before an attempt.

    Parameters
    ----------
    past
        Attempts of the same submission, ascending: a person who submits anew begins a new budget.
    faults
        For each node that failed, the attempts of the run in which it did.
    further_types
        Whether there is a node type after the one that this attempt runs on.
    """

    past: tuple[PastAttempt, ...] = ()
    faults: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    further_types: bool = False

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> History:
        """Read what ``dataclasses.asdict`` gave, after its way through JSON."""
        past = (PastAttempt(**{**each, "faulty": tuple(each["faulty"])}) for each in record["past"])
        faults = {node: tuple(numbers) for node, numbers in record["faults"].items()}
        return cls(past=tuple(past), faults=faults, further_types=record["further_types"])


def in_vain(past: Sequence[PastAttempt], first_step: int) -> list[PastAttempt]:
    """Give the attempts at the end of a history that saved nothing new.

    Parameters
    ----------
    past
        Ascending.
    first_step
        Step at which the attempt after them begins, which is what the last of them had saved.

    Examples
    --------
    >>> steps = [0, 100, 100]
    >>> past = [PastAttempt(number=n, cause="crash", first_step=at) for n, at in enumerate(steps, 1)]
    >>> [each.number for each in in_vain(past, 100)], in_vain(past, 150)
    ([2, 3], [])
    """
    found: list[PastAttempt] = []
    after = first_step
    for each in reversed(past):
        # One that died before it restored anything began, for all we know, where the next one does.
        before = after if each.first_step is None else each.first_step
        if after > before:
            break
        found.insert(0, each)
        after = before
    return found


def why_spent(idle: Sequence[PastAttempt], budget: BudgetSettings) -> str | None:
    """Tell why a run may not be continued after these attempts in a row without progress, or ``None``.

    Parameters
    ----------
    idle
        Ascending; the last one is the one that ends, or has ended.
    budget
        How many there may be.
    """
    if not idle:
        return None
    last = idle[-1]
    counted = [each for each in idle if each.cause not in _TAKEN_AWAY]
    if len(counted) >= budget.max_idle and last.cause not in _TAKEN_AWAY:
        return f"no progress in {_attempts(len(counted))} in a row (budget.max_idle)"
    name = _BUDGETS.get(last.cause)
    limit = getattr(budget, name) if name else None
    same = [each for each in idle if _BUDGETS.get(each.cause) == name]
    if last.cause == "out_of_memory":  # another node type may have had less
        same = [each for each in same if each.node_type == last.node_type]
    if limit is not None and len(same) >= limit:
        words = last.cause.replace("_", " ")
        return f"no progress in {_attempts(len(same))} in a row that ended by {words} (budget.{name})"
    return None


def decide(
    now: PastAttempt,
    history: History,
    budget: BudgetSettings,
    *,
    progressed: bool,
    begun: bool,
    mistake: bool = False,
    chance: float,
) -> Decision:
    """Decide how a run goes on.

    Parameters
    ----------
    now
        The attempt that ends.
    history
        What came before it.
    budget
        How often a run is continued.
    progressed
        Whether this attempt has saved anything new.
    begun
        Whether it had completed a step.
    mistake
        An exception of the script's own before the first step: every further attempt would repeat it.
    chance
        A random number in [0, 1), so that runs that failed together do not come back together.
    """
    if now.cause == "cancel":
        return Decision(
            action="stop",
            why="a person cancelled it, and a cancel is for good until a person starts it again",
        )
    if mistake:
        return Decision(
            action="stop",
            why="it failed before its first step, and every further attempt would: mend the script, and submit again",
        )
    faults = {node: list(found) for node, found in history.faults.items()}
    for node in now.faulty:
        faults.setdefault(node, []).append(now.number)
    exclude, because = _bad_nodes(faults, budget)
    if now.cause == "out_of_memory":
        if history.further_types:
            why = "it needs more memory than there was, so the next node type is tried"
            return Decision(action="continue", why=_join(why, because), exclude=exclude, move_on=True)
        if not begun:
            return Decision(
                action="stop",
                why="its first step needs more memory than there is, and there is no further node type: use a smaller "
                "micro-batch, or add a larger node type, and submit again",
            )
    idle = [] if progressed else [*in_vain(history.past, now.first_step or 0), now]
    if (spent := why_spent(idle, budget)) is not None:
        return Decision(
            action="stop",
            why=f"{spent}: something fails every time; read the log of the last attempt, and submit again when it is "
            "mended",
        )
    delay_s = _backoff_s(idle, budget, chance)
    return Decision(
        action="continue", why=_join(_progress(idle, delay_s), because), delay_s=delay_s, exclude=exclude
    )


def avoid(nodes: Sequence[str], history: History, budget: BudgetSettings) -> Decision | None:
    """Decide whether an attempt leaves at once for other nodes; ``None`` if it stays.

    An attempt that ended without a last word could not say which nodes the next one must not get. Leaving is
    tried once: where there are no other nodes, the run stays.

    Parameters
    ----------
    nodes
        Where it was started.
    history
        What came before it.
    budget
        How often a node may fail.
    """
    bad, why = _bad_nodes(history.faults, budget)
    if not set(bad) & set(nodes) or (history.past and history.past[-1].cause == "bad_node"):
        return None
    return Decision(action="continue", why=why, exclude=bad)


def _backoff_s(idle: Sequence[PastAttempt], budget: BudgetSettings, chance: float) -> float:
    """Seconds to wait: none at first, then twice as long each time, give or take a half."""
    repeats = len(idle) - 1
    if repeats < 1 or idle[-1].cause in _LASTED:
        return 0.0
    # The exponent is bounded so that hundreds of preemptions stay a number.
    usual_s = min(budget.backoff_s * 2.0 ** min(repeats - 1, 60), budget.longest_backoff_s)
    return float(round(usual_s * (0.5 + chance), 1))


def _bad_nodes(faults: Mapping[str, Sequence[int]], budget: BudgetSettings) -> tuple[tuple[str, ...], str]:
    """Nodes that have failed too often in this run, and the reason."""
    if budget.node_faults is None:
        return (), ""
    bad = {node: found for node, found in sorted(faults.items()) if len(found) >= budget.node_faults}
    told = [f"{node} is avoided: it failed in attempts {_list(found)}" for node, found in bad.items()]
    return tuple(bad), "; ".join(told)


def _progress(idle: Sequence[PastAttempt], delay_s: float) -> str:
    if not idle:
        return "it has saved something new"
    nothing = "it has saved nothing new"
    if len(idle) > 1:
        nothing = f"{_attempts(len(idle))} in a row have saved nothing new"
    return f"{nothing}, so the next one waits {delay_s:.0f} s" if delay_s else nothing


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"


def _list(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
