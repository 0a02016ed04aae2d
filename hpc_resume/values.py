"""Values that people write: YAML files, ``key=value`` words, and how later ones lie over earlier ones."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

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


# YAML 1.1, which PyYAML follows, calls a number without a dot but with an exponent a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def parse_value(text: str) -> Any:
    """Read the right side of ``key=value`` as YAML; what is no YAML is text."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
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
    """Read a file of settings.

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
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold settings as 'name: value' lines, but is a {type(values).__name__}"
        )
    return values


def merge(
    into: dict[str, Any], values: Mapping[Any, Any], origin: str, origins: dict[str, str], at: str = ""
) -> None:
    """Lay ``values`` over ``into``, level by level, and note in ``origins`` where each came from."""
    for key, value in values.items():
        name = f"{at}{key}"
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
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
        here = here.setdefault(part, {})
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
