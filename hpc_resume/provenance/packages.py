"""Which packages are installed, read from the names of their folders: that takes milliseconds, not seconds."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FOLDER = re.compile(r"(?P<name>.+?)-(?P<version>\d[^-]*)(?:-py\d[\d.]*)?(?:-[a-z][^-]*)?\.(?:dist|egg)-info")
_SEPARATORS = re.compile(r"[-_.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """What is installed.

    Parameters
    ----------
    versions
        By normalised name, as in ``pip list``: lower case, with dashes.
    editable
        Folders of those that are installed in place (``pip install -e``).
    """

    versions: dict[str, str]
    editable: dict[str, str] = field(default_factory=dict)


def installed_packages(path: Sequence[str] | None = None) -> Packages:
    """Find the packages that this interpreter would import.

    Parameters
    ----------
    path
        Where it looks; by default ``sys.path``. What comes first counts.
    """
    versions: dict[str, str] = {}
    editable: dict[str, str] = {}
    for entry in sys.path if path is None else path:
        try:
            names = os.listdir(entry or ".")  # noqa: PTH208 - names are all that is needed
        except OSError:
            continue
        for folder in sorted(names):
            match = _FOLDER.fullmatch(folder)
            if match is None or (name := normalized(match["name"])) in versions:
                continue
            versions[name] = match["version"]
            if (place := _editable_place(Path(entry or ".", folder, "direct_url.json"))) is not None:
                editable[name] = place
    return Packages(versions=dict(sorted(versions.items())), editable=dict(sorted(editable.items())))


def imported_packages(candidates: Collection[str]) -> frozenset[str]:
    """Tell which of some packages this process has imported a module of."""
    modules = {name.partition(".")[0] for name in sys.modules}
    return frozenset(name for name in candidates if modules & _modules_of(name))


def normalized(name: str) -> str:
    """Spell a package's name in the one way. Source: PEP 503."""
    return _SEPARATORS.sub("-", name).lower()


def _editable_place(path: Path) -> str | None:
    """Read where a package is that was installed in place. Source: PEP 610."""
    try:
        told = json.loads(path.read_bytes())
        if told["dir_info"]["editable"] is True:
            return unquote(urlsplit(told["url"]).path)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _modules_of(name: str) -> set[str]:
    """Names of a package's top-level modules: by its own list, or by its own name."""
    own = {name.replace("-", "_")}
    try:
        files = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return own
    listed = files.read_text("top_level.txt")
    if listed is not None:
        return own | set(listed.split())
    tops = {file.parts[0] for file in files.files or () if file.suffix == ".py"}
    return own | {top.removesuffix(".py") for top in tops}
