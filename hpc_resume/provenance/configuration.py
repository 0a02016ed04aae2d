"""How two resolved configurations differ: setting by setting, and how much each difference matters.

They are compared as plain values, not as :class:`~hpc_resume.config.Config`: an earlier version may have written
one of them, with settings that there are no more.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.records import configuration_path, has_configuration
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import NodeType
from hpc_resume.untrusted import brief, read_regular

#: What is never changed by accident.
IMMUTABLE = frozenset({"seed"})
#: What the script is given, and which numbers it computes with.
_LOOK = re.compile(r"entry\..*|node_types\.[^.]*\.(precision|micro_batch)|data\..*|allow_.*", re.DOTALL)
#: Reasons, and where the run lies: no settings of the training.
_PASSED_OVER = frozenset({"why", "allow_config_change", "allow_data_change", "allow_drift", "run_dir"})
#: May hold passwords.
_HIDDEN = "environment.variables."
ARGUMENT = "entry.kwargs."
#: More than this is no configuration.
_LONGEST_BYTES = 1 << 18
_MOST_NAMES = 4096
_DEEPEST = 12
_LONGEST_TEXT = 300

Grade = Literal["harmless", "look", "stop"]


class _Loader(yaml.SafeLoader):
    """Takes no references, with which a small file could spell a huge value; what we write has none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to parts of itself")
        return super().compose_node(parent, index)


class _Absent:
    """In place of the value of a setting that is not there."""

    def __repr__(self) -> str:
        return "not set"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One setting that is another one now.

    Parameters
    ----------
    name
        Dotted name: ``entry.kwargs.lr``.
    old, new
        JSON values, short ones; ``None`` too if it was, or is, not set.
    grade
        ``"harmless"``: nothing that is trained depends on it; ``"look"``: it does; ``"stop"``: a run must not go
        on with another one unless somebody says that this is meant.
    """

    name: str
    old: Any
    new: Any
    grade: Grade

    @property
    def short(self) -> str:
        """Name as people write it: an argument of the script without what stands before it."""
        return self.name.removeprefix(ARGUMENT)

    @property
    def sentence(self) -> str:
        """Tell it in a few words."""
        if self.name.startswith(_HIDDEN):
            return f"{self.name} is another one"
        return f"{self.short} was {_words(self.old)}, is {_words(self.new)}"

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {"name": self.name, "old": self.old, "new": self.new, "grade": self.grade}


def read_configuration(run: RunDirectory, digest: str) -> JsonObject | None:
    """Read a configuration that a run was given.

    Parameters
    ----------
    run
        The run directory.
    digest
        Which one.

    Returns
    -------
    dict or None
        Its settings as they stand in the file; None if there is none.

    Raises
    ------
    IntegrityError
        If it is not what was written.
    """
    if not has_configuration(run, digest):
        return None
    path = configuration_path(run, digest)
    try:
        data = read_regular(path, longest_bytes=_LONGEST_BYTES)
        if hashlib.sha256(data).hexdigest()[:16] != digest:
            raise ValueError("its digest is not its name")
        values = yaml.load(data, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: is no configuration ({str(error).splitlines()[0]:.200})") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{path}: is no configuration (it holds {brief(values)})")
    return values


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """Compare two configurations.

    Parameters
    ----------
    old, new
        As :func:`read_configuration` gives them. A setting that one of them does not know, because another
        version wrote it, counts as set to its default.

    Returns
    -------
    tuple of Change
        By name; what needs an explicit word first.

    Raises
    ------
    IntegrityError
        If one of them is nested too deeply, or has too many settings.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    found = []
    for name in before.keys() | after.keys():
        default = _default(name)
        was, now = before.get(name, default), after.get(name, default)
        if name in _PASSED_OVER or _same(was, now):
            continue
        if _is_filled(name, was, after) or _is_filled(name, now, before):
            continue
        if name not in after and not name.startswith(("entry.", "node_types.")):
            continue  # there is no such setting any more
        hidden = name.startswith(_HIDDEN)
        found.append(
            Change(
                name=name,
                old=None if hidden else _shown(was),
                new=None if hidden else _shown(now),
                grade="stop" if name in IMMUTABLE else "look" if _LOOK.fullmatch(name) else "harmless",
            )
        )
    return tuple(sorted(found, key=lambda each: (_GRAVITY.index(each.grade), each.name)))


_GRAVITY = ("stop", "look", "harmless")


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give all settings of a configuration by dotted name; node types go by their names.

    Raises
    ------
    IntegrityError
        As :func:`changes`.
    """
    return {name: _shown(value) for name, value in _flat(values)}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Go through all settings; never through more than there can be, whatever refers to what in the file."""
    stack: list[tuple[str, Any, int]] = [("", values, 0)]
    count = 0
    while stack:
        name, value, depth = stack.pop()
        count += 1
        if count > _MOST_NAMES or depth > _DEEPEST:
            raise IntegrityError("a configuration with too many settings, or too deep ones")
        if isinstance(value, Mapping) and (value or not name):
            inner = [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            inner = _named(value)
        else:
            yield name, value
            continue
        for key, each in inner:
            if len(stack) > _MOST_NAMES:
                raise IntegrityError("a configuration with too many settings")
            stack.append((f"{name}.{key}" if name else key, each, depth + 1))


def _named(items: list[Any]) -> list[tuple[str, Any]]:
    """Give node types by their names, so that they may change places; what has none by its place."""
    names = [each.get("name") for each in items]
    named = all(isinstance(name, str) and "." not in name for name in names) and len(set(names)) == len(names)
    return [(names[place] if named else str(place), each) for place, each in enumerate(items)]


_DEFAULTS = dict(_flat(Config().model_dump(mode="json")))
_NODE_TYPE = {name: value for name, value in NodeType().model_dump(mode="json").items() if name != "name"}


def _default(name: str) -> Any:
    if name.startswith("node_types."):
        return _NODE_TYPE.get(name.rpartition(".")[2], ABSENT)
    return _DEFAULTS.get(name, ABSENT)


def _same(one: Any, other: Any) -> bool:
    if one is ABSENT or other is ABSENT:
        return one is other
    return _spelled(one) == _spelled(other)


def _is_filled(name: str, value: Any, names: Collection[str]) -> bool:
    """Whether an empty mapping or list is no other value but one that has something in it on the other side."""
    return value in ({}, []) and any(each.startswith(f"{name}.") for each in names)


def _shown(value: Any) -> Any:
    """Give a value for a record: JSON, and not too long."""
    if value is ABSENT:
        return None
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, int) or abs(value) < 1 << 63 else brief(value)
    text = value if isinstance(value, str) else _spelled(value)
    if len(text) > _LONGEST_TEXT:
        return f"{text[:_LONGEST_TEXT]}… ({hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]})"
    return value if isinstance(value, str | list) else text


def _words(value: Any) -> str:
    return "not set" if value is None else _spelled(value)


def _spelled(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # dates, and what refers to itself
        return brief(value)


def sentences(found: Iterable[Change]) -> str:
    """Tell changes in a line; of those that do not matter, the names."""
    known = list(found)
    told = [each.sentence for each in known if each.grade != "harmless"]
    if harmless := [each.short for each in known if each.grade == "harmless"]:
        told.append(
            f"{'besides ' if told else ''}{', '.join(harmless)} (nothing that is trained depends on it)"
        )
    return "; ".join(told)
