"""Values that people write: YAML files, ``key=value`` words, and how later ones lie over earlier ones."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from hpc_resume.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text ``1e-3``, which the loader would read as a number."""


# YAML 1.1, which PyYAML follows, calls a number without a dot but with an exponent a string.
for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
    )

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_DATE = "tag:yaml.org,2002:timestamp"


def _value(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Leave ``1:30:00`` a string: YAML 1.1 calls it a number to the base of 60, of any length."""
    if node.tag in _NUMBERS and ":" in node.value:
        return node.value
    try:
        return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    except ValueError:
        return node.value  # it looks like a number or a date, but is none: 0x_, 2024-13-01


@dataclass(frozen=True, slots=True)
class Written:
    """A value of YAML that is no text, beside the text that stands there: which is meant, the setting's type says.

    Parameters
    ----------
    value
        As YAML reads it: ``00123`` is 83.
    text
        As it is spelled.
    """

    value: Any
    text: str

    def __str__(self) -> str:
        return self.text


#: The type of what becomes text in the end, but may be a bool: a number is kept if it would be spelled as it was.
AnyWritten = Annotated[Any, Written]


class _SettingsLoader(_Loader):
    """Gives numbers, bools and dates as :class:`Written`."""


def _written(loader: _SettingsLoader, node: yaml.ScalarNode) -> Any:
    value = _Loader.yaml_constructors[node.tag](loader, node)
    return value if isinstance(value, str) else Written(value, node.value)


for _tag in (*_NUMBERS, _DATE):
    _Loader.add_constructor(_tag, _value)
for _tag in (*_NUMBERS, _DATE, "tag:yaml.org,2002:bool"):
    _SettingsLoader.add_constructor(_tag, _written)


def as_meant(value: Any, kind: Any) -> Any:
    """Choose, for every :class:`Written` in a value, between value and text.

    Parameters
    ----------
    value
        What :func:`read_yaml` and :func:`parse_setting` give, and any other value, which is left as it is.
    kind
        The type that is wanted: a group of settings, or a field's annotation.
    """
    kind, origin = _bare(kind)
    if isinstance(value, Written):
        while origin is tuple:  # one in place of a list, which only some settings take
            kind, origin = _bare(get_args(kind)[0])
        if kind is str:
            return value.text
        if kind == AnyWritten and not isinstance(value.value, bool):
            as_spelled = isinstance(value.value, (int, float)) and str(value.value) == value.text
            return value.value if as_spelled else value.text
        return value.value
    group = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    if isinstance(value, dict):
        if group is not None:
            fields = group.model_fields
            names = {as_meant(key, str): each for key, each in value.items()}
            return {
                name: as_meant(each, fields[name].annotation if name in fields else Any)
                for name, each in names.items()
            }
        of_keys, of_values = get_args(kind) if origin is dict else (Any, Any)
        return {as_meant(key, of_keys): as_meant(each, of_values) for key, each in value.items()}
    if type(value) in {list, tuple, set}:
        # A list in place of a group is one of words.
        of_items = get_args(kind)[0] if origin is tuple else str if group is not None else Any
        return type(value)(as_meant(each, of_items) for each in value)
    return value


def _bare(kind: Any) -> tuple[Any, Any]:
    """Take off what a type says besides what is meant: that there may be none, and what the value must be like."""
    origin = get_origin(kind)
    if origin in {Union, UnionType}:
        some = [each for each in get_args(kind) if each is not NoneType]
        return _bare(some[0]) if len(some) == 1 else (Any, None)
    return _bare(get_args(kind)[0]) if origin is Annotated and kind != AnyWritten else (kind, origin)


def spell(value: Any, **style: Any) -> str:
    """Write a value as YAML that is read back as that value; ``style`` is that of :func:`yaml.dump`."""
    return str(yaml.dump(value, Dumper=_Dumper, **style))


def parse_value(text: str) -> Any:
    """Read the right side of ``key=value`` as YAML; what is no YAML is text."""
    return _parse(text, _Loader)


def parse_setting(text: str) -> Any:
    """Read the same where it is a setting: with :class:`Written` in it, for :func:`as_meant`."""
    return _parse(text, _SettingsLoader)


def _parse(text: str, loader: type[_Loader]) -> Any:
    try:
        value = yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return text
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text  # "a: b" on a command line is text
    return value


def parse_list(text: str) -> list[Any]:
    """Read ``"1e-3,3e-4"`` as YAML reads what stands between brackets."""
    values = parse_value(f"[{text}]")
    return values if isinstance(values, list) else [text]


def parse_assignments(
    pairs: Sequence[str], *, flag: str, parse: Callable[[str], Any] = parse_value
) -> dict[str, Any]:
    """Read ``["lr=1e-3", ...]``; ``parse`` reads what is right of the ``=``.

    Raises
    ------
    ConfigError
        If one has no ``=`` or no name, or a name is given twice.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{flag} {pair}: no assignment; write {flag} name=value")
        if key.strip() in values:
            raise ConfigError(f"{flag} {pair}: {key.strip()} is given twice; leave one out")
        values[key.strip()] = parse(text)
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of settings, with :class:`Written` in it, for :func:`as_meant`.

    Raises
    ------
    ConfigError
        If there is none, if it is no YAML, or if it holds something else than names and values.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"the current folder is {Path.cwd()}"
        raise ConfigError(f"{path}: no such configuration file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a configuration file: {error}") from error
    try:
        values = yaml.load(text, Loader=_SettingsLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold settings as 'name: value' lines, but is a {type(values).__name__}"
        )
    return values


def lay(values: dict[str, Any], over: Mapping[str, Any], origin: str, origins: dict[str, str]) -> None:
    """Lay settings over ``values``, each by its dotted name, or group by group: what a group leaves out stays."""
    for key, value in over.items():
        if isinstance(value, Mapping) and "." not in key:
            merge(values, {key: value}, origin, origins)
        else:
            put(values, key, value, origin, origins)


def merge(
    into: dict[str, Any], values: Mapping[Any, Any], origin: str, origins: dict[str, str], at: str = ""
) -> None:
    """Lay ``values`` over ``into``, level by level, and note in ``origins`` where each came from."""
    for key, value in values.items():
        name = f"{at}{key}"
        if isinstance(value, Mapping) and (value or isinstance(into.get(key), dict)):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                origins.pop(name, None)
            # What a group leaves out has its default, and does not come from here.
            merge(into[key], value, origin, origins, f"{name}.")
            continue
        into[key] = copy.deepcopy(value)  # later values are laid over it in place
        for stale in [known for known in origins if known.startswith(f"{name}.")]:
            del origins[stale]
        origins[name] = origin


def put(values: dict[str, Any], dotted: str, value: Any, origin: str, origins: dict[str, str]) -> None:
    """Set one setting by its dotted name; a number is a place in a list."""
    *parents, last = dotted.split(".")
    here: Any = values
    for depth, part in enumerate(parents):
        if isinstance(here, list):
            here = here[_place(here, part, dotted, origin)]
            continue
        if part == "node_types" and depth == 0:
            here.setdefault(part, [{}])  # the default has one node type, whose fields can be set
        here.setdefault(part, {})
        if isinstance(here[part], tuple):  # as settings hold a list
            here[part] = list(here[part])
        here = here[part]
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"{origin}: {dotted}: {'.'.join(parents[: depth + 1])} is a single value")
    if isinstance(here, list):
        here[_place(here, last, dotted, origin)] = value
    else:
        here[last] = value
    for stale in [known for known in origins if known.startswith(f"{dotted}.")]:
        del origins[stale]
    origins[dotted] = origin


def _place(items: list[Any], part: str, dotted: str, origin: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise ConfigError(f"{origin}: {dotted}: {part!r} is no place in a list of {len(items)}")
    return int(part)
