"""What a checkpoint says of its data: which snapshot, which preprocessing, and what was decided about changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpc_resume.files import JsonObject
from hpc_resume.provenance.datasnapshot import is_digest

#: Decisions that are handed on from checkpoint to checkpoint, newest last.
_KEPT = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A change that somebody allowed.

    Parameters
    ----------
    before, after
        What the data and its preprocessing were, and are, in a few characters each.
    reason
        Why.
    """

    before: str
    after: str
    reason: str

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {"before": self.before, "after": self.after, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """What a checkpoint, or the journal of an attempt, says of its data.

    Parameters
    ----------
    digest, validation
        Of the snapshots; ``None`` if nobody said what the data is.
    preprocessing
        Its version.
    checked
        How the attempt compared the data with the snapshot: ``contents``, ``sizes``, or ``no``.
    decisions
        Changes that were allowed.
    """

    digest: str | None = None
    validation: str | None = None
    preprocessing: str | None = None
    checked: str = "no"
    decisions: tuple[Decision, ...] = ()

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return any(each is not None for each in (self.digest, self.validation, self.preprocessing))

    @property
    def state(self) -> str:
        """Data and preprocessing, as a decision names them."""
        return f"{self.digest or 'unknown'}, preprocessing {self.preprocessing or 'unknown'}"

    def to_json(self) -> JsonObject:
        """JSON form; empty if it says nothing."""
        if not self:
            return {}
        return {
            "digest": self.digest,
            "validation": self.validation,
            "preprocessing": self.preprocessing,
            "checked": self.checked,
            "decisions": [each.to_json() for each in self.decisions[-_KEPT:]],
        }

    @classmethod
    def from_json(cls, record: Any) -> DataRecord:
        """Read :meth:`to_json`; what is none of its values is taken for missing."""
        if not isinstance(record, Mapping):
            return cls()
        digest, validation = record.get("digest"), record.get("validation")
        preprocessing, checked = record.get("preprocessing"), record.get("checked")
        decisions = record.get("decisions")
        return cls(
            digest=digest if is_digest(digest) else None,
            validation=validation if is_digest(validation) else None,
            preprocessing=preprocessing if isinstance(preprocessing, str) else None,
            checked=checked if isinstance(checked, str) and checked in {"contents", "sizes"} else "no",
            decisions=tuple(
                Decision(before=each["before"], after=each["after"], reason=each["reason"])
                for each in (decisions if isinstance(decisions, list) else ())
                if isinstance(each, dict)
                and all(isinstance(each.get(key), str) for key in ("before", "after", "reason"))
            ),
        )

    def sentence(self) -> str:
        """Say it in a line."""
        parts = [
            "" if self.digest is None else f"data {self.digest}",
            "" if self.preprocessing is None else f"preprocessing {self.preprocessing}",
            "" if self.validation is None else f"validation data {self.validation}",
            {"no": "not compared", "sizes": "compared by sizes"}.get(self.checked, "") if self.digest else "",
            *(f"changed because {each.reason!r}" for each in self.decisions[-1:]),
        ]
        return ", ".join(part for part in parts if part)
