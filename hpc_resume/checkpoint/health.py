"""Whether a state is one to go on from: what is not finite in it, its norms, and what a probe gave before the save.

Each rank looks through its own part while it writes it. What all have found together stands in the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_resume.checkpoint.fields import listed, shown
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.structure import integer, string
from hpc_resume.files import JsonObject

if TYPE_CHECKING:
    import torch

#: What a tensor is for.
PARAMETER, BUFFER, OPTIMIZER, OTHER = "parameter", "buffer", "optimizer", "other"
#: By a tensor's name: what it is for, and the key that it is tracked under.
Roles = Mapping[str, tuple[str, str]]
#: So many tensors are named; of the others it is said how many.
_NAMED = 32
_WORDS = frozenset({"nan", "inf"})
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def roles_of(
    leaves: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module], optimizers: Collection[str]
) -> Roles:
    """Tell what the tensors of a state are for.

    Parameters
    ----------
    leaves
        The live tensors, by name.
    modules, optimizers
        What is tracked, by key.
    """
    from hpc_resume.checkpoint.placement import local_of

    buffers = {local_of(each).data_ptr() for module in modules.values() for each in module.buffers()}
    owners = {escape(key): key for key in (*modules, *optimizers)}
    roles = {}
    for name, tensor in leaves.items():
        key = owners.get(name.split("/", 1)[0], "")
        if key in modules:
            roles[name] = (BUFFER if local_of(tensor).data_ptr() in buffers else PARAMETER), key
        else:
            roles[name] = (OPTIMIZER if key in optimizers else OTHER), key
    return roles


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What one rank has found in its part of a state.

    Parameters
    ----------
    poisoned
        Parameters and optimizers' tensors that are not finite, each with ``"nan"`` or ``"inf"``.
    noticed
        Other tensors with NaN in them.
    more
        How many tensors more than those named.
    squares
        Sums of squares of the parameters, by tracked module.
    """

    poisoned: Mapping[str, str] = field(default_factory=dict)
    noticed: Mapping[str, str] = field(default_factory=dict)
    more: int = 0
    squares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, poisoned: Mapping[str, str], noticed: Mapping[str, str], squares: Mapping[str, float]
    ) -> Looked:
        """Name some of what is found, and count the rest."""
        named, left = _first(poisoned), _first(noticed)
        more = len(poisoned) + len(noticed) - len(named) - len(left)
        return cls(poisoned=named, noticed=left, more=more, squares=squares)

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {
            "poisoned": dict(self.poisoned),
            "noticed": dict(self.noticed),
            "more": self.more,
            "squares": dict(self.squares),
        }

    @classmethod
    def from_json(cls, record: Any) -> Looked:
        """From JSON; see :meth:`to_json`."""
        return cls(
            poisoned=_words(record["poisoned"]),
            noticed=_words(record["noticed"]),
            more=integer(record["more"]),
            squares=numbers(record["squares"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a probe gave.

    Parameters
    ----------
    values
        By name, for each rank; one for all if they agree.
    numerics
        What the bits of results depend on, besides the state: GPU, versions, threads …
    precision
        The coarsest that was computed in.
    repeats
        Whether it gave the same to the bit twice in a row.
    batch
        Digest of the stored batch, if it works on one.
    """

    values: tuple[Mapping[str, float], ...]
    numerics: JsonObject
    precision: str
    repeats: bool
    batch: str | None = None

    def of_rank(self, rank: int) -> Mapping[str, float]:
        """Give what a rank got."""
        return self.values[0 if len(self.values) == 1 else rank]

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {
            "values": [{name: _spelled(value) for name, value in each.items()} for each in self.values],
            "numerics": self.numerics,
            "precision": self.precision,
            "repeats": self.repeats,
            "batch": self.batch,
        }

    @classmethod
    def from_json(cls, record: Any) -> Probed:
        """From JSON; see :meth:`to_json`."""
        values = tuple(
            {string(name): _read(value) for name, value in shown(each).items()}
            for each in listed(record["values"])
        )
        if not values:
            raise ValueError("a probe without values")
        batch = record["batch"]
        return cls(
            values=values,
            numerics=shown(record["numerics"]),
            precision=string(record["precision"]),
            repeats=record["repeats"] is True,
            batch=None if batch is None else string(batch),
        )

    @classmethod
    def together(cls, ranks: Sequence[Probed | None]) -> Probed | None:
        """Put what all ranks got together; None if rank 0 has none."""
        first = ranks[0]
        if first is None:
            return None
        values = [{} if each is None else each.values[0] for each in ranks]
        spelled = [{name: _spelled(value) for name, value in each.items()} for each in values]
        alike = all(each == spelled[0] for each in spelled)
        return cls(
            values=tuple(values[:1] if alike else values),
            numerics=first.numerics,
            precision=first.precision,
            repeats=all(each is None or each.repeats for each in ranks),
            batch=first.batch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a rank knows of a state before it looks through it.

    Parameters
    ----------
    probed
        What a probe gave.
    usual, factor
        Norms of the modules so far, and by which factor they may differ; rank 0's count.
    """

    probed: Probed | None = None
    usual: Mapping[str, float] = field(default_factory=dict)
    factor: float | None = None

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        probed = None if self.probed is None else self.probed.to_json()
        return {"probed": probed, "usual": dict(self.usual), "factor": self.factor}

    @classmethod
    def from_json(cls, record: Any) -> Known:
        """From JSON; see :meth:`to_json`."""
        probed, factor = record["probed"], record["factor"]
        return cls(
            probed=None if probed is None else Probed.from_json(probed),
            usual=numbers(record["usual"]),
            factor=None if factor is None else number(factor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What is known of a checkpoint's state.

    Parameters
    ----------
    poisoned, noticed, more
        As for :class:`Looked`, of all ranks.
    norms
        Norm of the parameters of each tracked module that is finite.
    jumped
        Of the modules whose norm is far from what it was, what it was.
    probe
        What a probe gave just before.
    """

    poisoned: Mapping[str, str] = field(default_factory=dict)
    noticed: Mapping[str, str] = field(default_factory=dict)
    more: int = 0
    norms: Mapping[str, float] = field(default_factory=dict)
    jumped: Mapping[str, float] = field(default_factory=dict)
    probe: Probed | None = None

    @classmethod
    def together(cls, ranks: Sequence[Looked], known: Sequence[Known]) -> Health:
        """Put what all ranks have found together, and what they knew before."""
        usual, factor = known[0].usual, known[0].factor
        poisoned = {name: word for each in ranks for name, word in each.poisoned.items()}
        noticed = {name: word for each in ranks for name, word in each.noticed.items()}
        whole = Looked.of(poisoned, noticed, {})
        norms = {}
        for module in ranks[0].squares:
            if all(module in each.squares for each in ranks):
                norms[module] = math.sqrt(sum(each.squares[module] for each in ranks))
        jumped = {}
        for module, before in usual.items():
            now = norms.get(module)
            if factor is not None and now is not None and not before / factor <= now <= before * factor:
                jumped[module] = before
        probe = Probed.together([each.probed for each in known])
        if probe is not None and any(math.isnan(value) for each in probe.values for value in each.values()):
            poisoned = {**whole.poisoned, "probe": "nan"}
        else:
            poisoned = dict(whole.poisoned)
        return cls(
            poisoned=poisoned,
            noticed=whole.noticed,
            more=whole.more + sum(each.more for each in ranks),
            norms=norms,
            jumped=jumped,
            probe=probe,
        )

    @property
    def told(self) -> str:
        """Say in words what is not finite; empty if nothing is."""
        if not self.poisoned:
            return ""
        names = [f"{name} ({_SPELLED[word]})" for name, word in self.poisoned.items()]
        left = max(len(names) - 4, 0) + self.more
        return ", ".join(names[:4]) + (f" and {left} more" if left > 0 else "")

    def brief(self) -> JsonObject:
        """Give what the ranks of an attempt need to know of it; what there is nothing of is left out."""
        record: JsonObject = {
            "poisoned": self.told,
            "noticed": list(self.noticed),
            "norms": dict(self.norms),
            "jumped": dict(self.jumped),
        }
        return {key: value for key, value in record.items() if value}

    def to_json(self) -> JsonObject:
        """JSON form; what there is nothing of is left out."""
        record: JsonObject = {
            "poisoned": dict(self.poisoned),
            "noticed": dict(self.noticed),
            "more": self.more,
            "norms": dict(self.norms),
            "jumped": dict(self.jumped),
            "probe": None if self.probe is None else self.probe.to_json(),
        }
        return {key: value for key, value in record.items() if value}

    @classmethod
    def from_json(cls, record: Any) -> Health:
        """From JSON; see :meth:`to_json`."""
        record = shown(record)
        probe = record.get("probe")
        return cls(
            poisoned=_words(record.get("poisoned", {})),
            noticed=_words(record.get("noticed", {})),
            more=integer(record.get("more", 0)),
            norms=numbers(record.get("norms", {})),
            jumped=numbers(record.get("jumped", {})),
            probe=None if probe is None else Probed.from_json(probe),
        )


_SPELLED = {"nan": "NaN", "inf": "Inf"}


def _first(found: Mapping[str, str]) -> dict[str, str]:
    return {name: found[name] for name in sorted(found)[:_NAMED]}


def _words(record: Any) -> dict[str, str]:
    found = {string(name): string(word) for name, word in shown(record).items()}
    if not _WORDS.issuperset(found.values()):
        raise ValueError("something else than nan or inf where only those can be")
    return found


def numbers(record: Any) -> dict[str, float]:
    """Return an object of numbers."""
    return {string(name): number(value) for name, value in shown(record).items()}


def number(value: Any) -> float:
    """Return a number."""
    if type(value) not in {int, float}:
        raise TypeError("no number where there must be one")
    return float(value)


def _spelled(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)


def _read(value: Any) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else number(value)
