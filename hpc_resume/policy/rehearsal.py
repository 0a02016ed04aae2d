"""When and how a rehearsal interrupts a run: drawn from a seed, fitted to the script's own pace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["time limit", "preemption", "preemption without grace", "kill"]
Moment = Literal["start", "first step", "middle", "save"]

KINDS: tuple[Kind, ...] = ("time limit", "preemption", "kill", "preemption without grace")
#: Those that matter most come first, for rehearsals of few interruptions.
_MOMENTS: tuple[Moment, ...] = ("middle", "save", "start", "middle", "first step", "middle", "middle")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """What happens to one attempt.

    Parameters
    ----------
    kind
        How it is ended. ``kill`` is SIGKILL to one rank.
    moment
        While the processes start, before the first step, in the middle of training, while a checkpoint is written.
    part
        Where in that stretch of time, 0 to 1.
    victim
        Which of the ranks is killed, 0 to 1 over all of them.
    """

    kind: Kind
    moment: Moment
    part: float
    victim: float


def draw(seed: int, times: int) -> tuple[Interruption, ...]:
    """Draw the interruptions of a rehearsal: every kind and moment comes before any comes again.

    Parameters
    ----------
    seed
        The same seed gives the same interruptions.
    times
        How many.
    """
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    kinds: list[Kind] = []
    while len(kinds) < times:
        kinds += chance.sample(KINDS, len(KINDS))
    moments = [_MOMENTS[place % len(_MOMENTS)] for place in range(times)]
    chance.shuffle(moments)
    return tuple(
        Interruption(kind=kind, moment=moment, part=chance.random(), victim=chance.random())
        for kind, moment in zip(kinds, moments, strict=False)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long an uninterrupted run took over what.

    Parameters
    ----------
    start_s
        From the allocation to the beginning of the attempt: interpreters, imports.
    prepare_s
        From there to the first step: building the model, restoring.
    train_s, steps
        All steps.
    """

    start_s: float
    prepare_s: float
    train_s: float
    steps: int

    def delay_s(self, interruption: Interruption) -> float:
        """Seconds to wait, counted from where the interruption's moment begins, or from the step it is due at."""
        step_s = self.train_s / max(self.steps, 1)
        whole_s = {"start": self.start_s, "first step": self.prepare_s, "middle": step_s, "save": 0.0}
        return interruption.part * whole_s[interruption.moment]

    def due_step(self, interruption: Interruption, *, step: int, others: int) -> int:
        """Give the number of completed steps at which an interruption is due that comes in training.

        Parameters
        ----------
        step
            At which the attempt goes on.
        others
            Interruptions that are still to come, which need a share of the steps that are left.
        """
        # Not so late that the last step comes first. For a save it is the latest step: it may come before.
        part = 0.1 + 0.6 * interruption.part if interruption.moment == "middle" else 0.7
        return step + max(1, int(part * (self.steps - step) / (others + 1)))


def save_every(steps: int, times: int) -> int:
    """Give the steps between checkpoints, so that every attempt of a rehearsal can take a few."""
    return max(1, steps // (3 * (times + 1)))


def bit_for_bit(ranks: Sequence[int]) -> bool:
    """Whether a resumed run on these numbers of ranks, one after the other, must equal an uninterrupted one.

    With three or more, DDP may sum the gradients of the first step after a restart in another order.
    """
    return len(set(ranks)) == 1 and ranks[0] <= 2
