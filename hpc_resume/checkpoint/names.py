"""Names of tensors: the path in the state, joined by ``/``."""

from __future__ import annotations

import re
from collections.abc import Collection

from hpc_resume.untrusted import check_text

MAX_NAME_LENGTH = 2048
_SPECIAL = re.compile(r"[%/\0]|^\.$")


def check_name(name: str) -> str:
    """Return a tensor's name as it is; a ValueError if there can be none."""
    check_names((name,))
    return name


def check_names(names: Collection[str]) -> None:
    """Check that there can be tensors of these names; a ValueError if not."""
    longest = max(map(len, names), default=0)
    if longest > MAX_NAME_LENGTH:
        raise ValueError(f"a name of {longest} characters, more than {MAX_NAME_LENGTH}")
    check_text("".join(names))


def escape(component: str) -> str:
    """Make one component of a name that HDF5 takes as a link's name."""
    if not _SPECIAL.search(component):
        return component or "%"
    escaped = component.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return "%2E" if escaped == "." else escaped


def unescape(component: str) -> str:
    """Give back what :func:`escape` was given."""
    if component == "%":
        return ""
    for code, character in (("%2E", "."), ("%00", "\0"), ("%2F", "/"), ("%25", "%")):
        component = component.replace(code, character)
    return component


def below(prefix: str, components: Collection[str]) -> list[str]:
    """Name what lies below a path, one component each: many at once."""
    together = "".join(components)
    if any(special in together for special in "%/\0") or "." in components or "" in components:
        return [f"{prefix}/{escape(component)}" for component in components]
    return [f"{prefix}/{component}" for component in components]
