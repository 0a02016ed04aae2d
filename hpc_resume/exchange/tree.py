"""Nested states: put together from paths, and typed JSON with some of its tensors left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from hpc_resume.checkpoint import objects
from hpc_resume.errors import IntegrityError

#: Names in dicts, places in lists.
Path = tuple["str | int", ...]

#: A list that a hostile path could blow up stops here.
_LONGEST_LIST = 1_000_000
_GONE = object()


def nested(entries: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Put values together by their paths, as ``torch.distributed.checkpoint`` took them apart.

    Raises
    ------
    IntegrityError
        If two paths contradict each other.
    """
    root: dict[Any, Any] = {}
    for path, value in entries:
        here: Any = root
        for part, following in pairwise(path):
            child = _get(here, part)
            if child is None:
                child = [] if isinstance(following, int) else {}
                _put(here, part, child)
            here = child
        if _get(here, path[-1]) is not None:
            raise IntegrityError(f"{path!r:.200}: two values stand there")
        _put(here, path[-1], value)
    return root


def _get(container: Any, part: str | int) -> Any:
    if isinstance(container, list) and isinstance(part, int):
        return container[part] if 0 <= part < len(container) else None
    if isinstance(container, dict):
        return container.get(part)
    raise IntegrityError(f"{part!r:.100}: within a value that is no container")


def _put(container: Any, part: str | int, value: Any) -> None:
    if isinstance(container, dict):
        container[part] = value
        return
    assert isinstance(part, int)
    if not 0 <= part < _LONGEST_LIST:
        raise IntegrityError(f"place {part} in a list")
    container.extend([None] * (part + 1 - len(container)))
    container[part] = value


def select(tree: Any, keep: Callable[[str], bool]) -> Any:
    """Leave tensors out of typed JSON: their entries go from dicts, and become None in lists.

    NumPy scalars become plain numbers.

    Parameters
    ----------
    tree
        Typed JSON.
    keep
        Whether a tensor stays, by its own name.
    """
    objects.decode(tree, lambda _tag, _name: None)  # it is what it must be, or says what is wrong
    chosen = _select(tree, keep)
    return None if chosen is _GONE else chosen


def _select(node: Any, keep: Callable[[str], bool]) -> Any:
    if isinstance(node, list):
        return [None if (child := _select(item, keep)) is _GONE else child for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        (tag, content), *_ = node.items()
        if tag in {*objects.TENSOR_TAGS, objects.SAME_TAG}:
            return node if keep(content[0] if tag == objects.SAME_TAG else content) else _GONE
        if tag == objects.TENSORS_TAG:
            return _select(objects.unfolded(content), keep)
        if tag == "$numpy":
            return objects.encode(objects.decode(node).item(), ())
        if tag in {"$dict", "$ordereddict", "$counter"}:
            pairs = [(key, _select(item, keep)) for key, item in content]
            return {tag: [[key, item] for key, item in pairs if item is not _GONE]}
        if tag in {"$tuple", "$set", "$frozenset"}:
            return {tag: _select(content, keep)}
        if tag.startswith("$"):
            return node
    children = {key: _select(item, keep) for key, item in node.items()}
    return {key: item for key, item in children.items() if item is not _GONE}
