"""Whether what is being trained is still worth saving: what an attempt makes of what its saves have found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpc_resume.checkpoint.health import Health
from hpc_resume.checkpoint.manifest import FULL, Manifest
from hpc_resume.errors import NonFiniteError
from hpc_resume.journal import Journal
from hpc_resume.policy.validation import usual_norms
from hpc_resume.settings import ValidationSettings

#: Norms of so many checkpoints are kept.
_KEPT = 8


class Soundness:
    """Takes note of what was found in each committed checkpoint; all ranks of an attempt are told the same.

    Parameters
    ----------
    settings
        Of the run.
    say
        Into the log.
    journal
        On rank 0.
    """

    def __init__(
        self, settings: ValidationSettings, *, say: Callable[[str], None], journal: Journal | None
    ) -> None:
        self._settings = settings
        self._say = say
        self._journal = journal
        self._norms: list[Mapping[str, float]] = []
        self._in_a_row = 0
        self._last = ""
        self._noticed: set[str] = set()

    @property
    def usual(self) -> dict[str, float]:
        """Norms of the modules in the last few checkpoints."""
        return usual_norms(self._norms)

    def restored(self, health: Health) -> None:
        """Take note of the checkpoint that the attempt goes on from."""
        self._norms = [health.norms] if health.norms else []

    def take_note(self, step: int, found: Mapping[str, Any]) -> bool:
        """Take note of a checkpoint that was committed; tells whether a run may be resumed from it.

        Parameters
        ----------
        step
            Of the checkpoint.
        found
            :meth:`.Health.brief`; empty if nothing is known.
        """
        self._tell_others(step, found)
        poison = found.get("poisoned") or ""
        if not poison:
            self._in_a_row = 0
            if found.get("norms"):
                self._norms = [*self._norms, found["norms"]][-_KEPT:]
            return not (found.get("jumped") and self._settings.norm_jump == "hold_back")
        self._in_a_row += 1
        self._last = f"step {step}: {poison}"
        ignored = self._settings.nonfinite == "ignore"
        self._note("not_finite" if ignored else "held_back", step=step, what=poison)
        if ignored:
            self._say(f"step {step} has what is not finite: {poison}; it is resumed from all the same")
        else:
            self._say(
                f"the checkpoint of step {step} is HELD BACK: {poison}. It is kept, but a resume takes an older one; "
                "look at the learning rate, the gradients' norm and the loss of the steps before"
            )
        return ignored

    @property
    def lost(self) -> bool:
        """Whether training can't get anywhere any more."""
        most = 1 if self._settings.nonfinite == "stop" else self._settings.nonfinite_in_a_row
        return self._settings.nonfinite != "ignore" and most is not None and self._in_a_row >= most

    def check(self) -> None:
        """End the run if it is lost.

        Raises
        ------
        NonFiniteError
            On all ranks alike, where all have settled the same checkpoints.
        """
        if not self.lost:
            return
        many = "" if self._in_a_row == 1 else f", as in {self._in_a_row} checkpoints in a row"
        raise NonFiniteError(
            f"{self._last}{many}: training does not get out of that by itself. When it is mended (a "
            "lower learning rate, clipped gradients, another precision), submit again: it goes on from the newest "
            "checkpoint before that, or else from the start. To go on all the same: validation: {nonfinite: ignore}"
        )

    def _tell_others(self, step: int, found: Mapping[str, Any]) -> None:
        """Tell what is odd, and no reason to hold a checkpoint back."""
        if fresh := set(found.get("noticed") or ()) - self._noticed:
            self._noticed |= fresh
            names = ", ".join(sorted(fresh)[:4]) + (f" and {len(fresh) - 4} more" if len(fresh) > 4 else "")
            self._say(
                f"step {step}: there is NaN in {names}; no parameters, so it is resumed from all the same"
            )
            self._note("nan_noticed", step=step, what=names)
        for module, before in (found.get("jumped") or {}).items():
            now = found["norms"][module]
            self._say(
                f"step {step}: the norm of {module} is {now:.4g}, and was {before:.4g} in the checkpoints before: look at "
                "the loss and the learning rate of the steps before"
            )
            self._note("norm_jumped", step=step, module=module, norm=now, before=before)

    def _note(self, event: str, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.event(event, durable=True, **fields)


def passed_over(manifest: Manifest, settings: ValidationSettings, *, asked: bool = False) -> str:
    """Say why a run is not resumed from a checkpoint; empty if it is.

    Parameters
    ----------
    manifest
        Of the checkpoint.
    settings
        Of the run.
    asked
        A person has chosen it, in a fork or a rollback: that its norms are odd does not count then.
    """
    ignored = manifest.content == FULL and settings.nonfinite == "ignore"
    why = "" if ignored else manifest.held_back
    if not why and not asked and settings.norm_jump == "hold_back" and manifest.health.jumped:
        norms = manifest.health.norms
        parts = [
            f"{name} {was:.4g} → {norms[name]:.4g}"
            for name, was in manifest.health.jumped.items()
            if name in norms
        ]
        why = f"norms have jumped: {', '.join(parts)}"
    return why
