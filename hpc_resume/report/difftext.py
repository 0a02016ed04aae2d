"""A difference in words: a heading for each area, and lines below it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpc_resume.report.diff import Difference, State
from hpc_resume.untrusted import printable

if TYPE_CHECKING:
    from hpc_resume.checkpoint.norms import TensorChange

#: So many tensors, and so many values, are told; ``--json`` tells all.
_TOLD = 40


def parts(found: Difference) -> Iterator[tuple[str, list[str]]]:
    """Tell a difference.

    Yields
    ------
    (str, list of str)
        A heading, and what is below it; with nothing in them that steers a terminal.
    """
    for title, lines in _parts(found):
        yield _line(title), [_line(line) for line in lines]


def _parts(found: Difference) -> Iterator[tuple[str, list[str]]]:
    yield f"{found.labels[0]} → {found.labels[1]}: {'no difference' if found.equal else 'they differ'}", []
    if found.code:
        lines = []
        for each in found.code:
            lines += [f"{each.path} ({each.what})", *each.lines]
        yield "code", lines
    if found.settings:
        yield "configuration", [f"{each.grade:8}  {each.sentence}" for each in found.settings]
    if found.data:
        yield "data", [*map(str, found.data), *found.files]
    if found.environment:
        yield "environment", [f"{each.grade:8}  {each}" for each in found.environment]
    if found.state is not None:
        yield from _state(found.state)
    if found.unknown:
        yield "not compared", list(found.unknown)


def _state(state: State) -> Iterator[tuple[str, list[str]]]:
    steps = f"step {state.steps[0]} → {state.steps[1]}"
    if not state.tensors and not state.values:
        yield f"state: {state.count} tensors and all else equal bit for bit ({steps})", []
        return
    if state.tensors:
        title = f"tensors: {len(state.tensors)} of {state.count} differ ({steps})"
        yield title, [*_limited([_tensor(each) for each in state.tensors])]
    if state.values:
        yield "other state", [*_limited([f"{each.name}: {each.one} → {each.two}" for each in state.values])]


def _tensor(each: TensorChange) -> str:
    if not each.kinds[0] or not each.kinds[1]:
        where = "second" if not each.kinds[0] else "first"
        norm = each.norms[1] if not each.kinds[0] else each.norms[0]
        return f"{each.name}: only in the {where} ({each.kinds[0] or each.kinds[1]}, norm {norm:.6g})"
    norms = f"norm {each.norms[0]:.6g} → {each.norms[1]:.6g}"
    if each.kinds[0] != each.kinds[1] and math.isinf(each.largest):
        return f"{each.name}: {each.kinds[0]} → {each.kinds[1]}, {norms}"
    kinds = "" if each.kinds[0] == each.kinds[1] else f"{each.kinds[0]} → {each.kinds[1]}, "
    return (
        f"{each.name}: {kinds}{norms}, changed by {each.relative:.3g} of it; largest change {each.largest:.3g}, "
        f"relative {each.largest_relative:.3g}; {each.differing} of {each.elements} elements"
    )


def _limited(lines: list[str]) -> Iterator[str]:
    yield from lines[:_TOLD]
    if len(lines) > _TOLD:
        yield f"and {len(lines) - _TOLD} more (--json tells all)"


def _line(text: str) -> str:
    return printable(text).replace("\n", "\\n")
