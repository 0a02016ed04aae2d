"""The files of a source by name, size and digest: what identifies it, and what two of them are compared by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject

#: More files are no source; a longer path is no path (Linux: PATH_MAX).
MAX_FILES = 20_000
_LONGEST_PATH = 4095
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a source.

    Parameters
    ----------
    size_bytes
        Its length.
    executable
        Whether it may be run as a program.
    digest
        SHA-256 of its bytes.
    """

    size_bytes: int
    executable: bool
    digest: str

    def __post_init__(self) -> None:
        whole = type(self.size_bytes) is int and self.size_bytes >= 0 and type(self.executable) is bool
        if not whole or not isinstance(self.digest, str) or not _SHA256.fullmatch(self.digest):
            raise IntegrityError("a file's size or digest is malformed")

    @classmethod
    def of(cls, data: bytes, *, executable: bool) -> SourceFile:
        """Describe a file with these bytes."""
        return cls(size_bytes=len(data), executable=executable, digest=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a source.

    Parameters
    ----------
    files
        By path, relative to the project's folder, with ``/`` between its parts.
    """

    files: Mapping[str, SourceFile]

    def __post_init__(self) -> None:
        if len(self.files) > MAX_FILES:
            raise IntegrityError(f"lists {len(self.files)} files, more than {MAX_FILES}")
        folders = {str(parent) for path in self.files for parent in PurePosixPath(path).parents}
        for path in self.files:
            if not is_plain_path(path) or path in folders:
                raise IntegrityError(f"{path!r:.200} is no path of a file within a folder")

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over paths, permissions to run, and digests of contents."""
        lines = [[path, each.executable, each.digest] for path, each in sorted(self.files.items())]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]

    @property
    def size_bytes(self) -> int:
        """Length of all files together."""
        return sum(each.size_bytes for each in self.files.values())

    def to_json(self) -> JsonObject:
        """JSON form: a list for each path."""
        return {
            path: [each.size_bytes, each.executable, each.digest] for path, each in sorted(self.files.items())
        }

    @classmethod
    def from_json(cls, record: Any) -> Listing:
        """Read :meth:`to_json`.

        Raises
        ------
        IntegrityError
            If it is something else.
        """
        try:
            return cls(
                {
                    path: SourceFile(size_bytes=size_bytes, executable=executable, digest=digest)
                    for path, (size_bytes, executable, digest) in record.items()
                }
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise IntegrityError(f"no list of files ({error!s:.100})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileChanges:
    """How the files of one source differ from those of another; paths, sorted."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    @classmethod
    def between(cls, one: Listing, two: Listing) -> FileChanges:
        """Compare two listings."""
        return cls(
            added=tuple(sorted(two.files.keys() - one.files.keys())),
            removed=tuple(sorted(one.files.keys() - two.files.keys())),
            changed=tuple(
                sorted(
                    path for path in one.files.keys() & two.files.keys() if one.files[path] != two.files[path]
                )
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def text(self, *, most: int = 6) -> str:
        """Tell the changes in a line: ``train.py, +new.py, -old.py``."""
        names = [*self.changed, *(f"+{path}" for path in self.added), *(f"-{path}" for path in self.removed)]
        return enumerated(names, most=most)


def enumerated(names: Iterable[str], *, most: int = 6) -> str:
    """Put names into a line, the first few of many."""
    listed = list(names)
    if len(listed) <= most:
        return ", ".join(listed)
    return f"{', '.join(listed[: most - 1])} and {len(listed) - most + 1} more"


def is_plain_path(path: object) -> bool:
    """Whether a path stays within its folder, and is spelled in the one way."""
    return (
        isinstance(path, str)
        and 0 < len(path) <= _LONGEST_PATH
        and "\0" not in path
        and not path.startswith("/")
        and all(part not in {"", ".", ".."} for part in path.split("/"))
        and path.isprintable()
    )
