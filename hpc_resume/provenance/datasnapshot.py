"""A data snapshot: what a dataset consists of, file by file, wherever it lies.

Its digest is one over names, sizes and contents. As a file it is JSON, a file of the data on each line::

    {"schema": 1, "digest": "9d0c…", "seal": "17aa…",
    "files": [
    ["train/0001.jpg",1200,"5f3c…"],
    …
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import seal_lines, unseal_lines
from hpc_resume.untrusted import brief, check_nesting, parse_json, read_regular

SCHEMA = 1
#: A longer record is none: a million files take 80 MB.
LONGEST_BYTES = 1 << 30
#: Hex digits of a BLAKE3 hash that are kept: 128 bits, as ``b3sum --length 16`` shows.
HASH_DIGITS = 32
_HASH = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}")
_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

#: Of each object in an HDF5 file: element type, shape, and digests of attributes and contents.
Inside = Mapping[str, tuple[str, ...]]
INSIDE_FIELDS = ("type", "shape", "attributes", "contents")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a dataset.

    Parameters
    ----------
    size_bytes
        Its length.
    digest
        First 32 hex digits of the BLAKE3 hash of its bytes; ``None`` if they were not read.
    """

    size_bytes: int
    digest: str | None

    def __post_init__(self) -> None:
        if type(self.size_bytes) is not int or self.size_bytes < 0:
            raise ValueError(f"{brief(self.size_bytes)} is no size")
        if self.digest is not None and not is_digest(self.digest):
            raise ValueError(f"{brief(self.digest)} is no digest")


@dataclass(frozen=True, kw_only=True)
class DataSnapshot:
    """What a dataset consists of.

    Parameters
    ----------
    files
        By name: the path below the dataset's folder, with ``/``.
    fingerprints
        Of Hugging Face datasets that were given as objects, by name. They count like files.
    inside
        Of HDF5 files: what each object in them holds. Only for telling what has changed.
    saved
        Hugging Face datasets among the files: fingerprint, split, builder. Only for telling, too.
    """

    files: Mapping[str, FileEntry] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, Inside] = field(default_factory=dict)
    saved: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over names, sizes and contents; the same wherever the files lie, in any order."""
        hasher = blake3(b"hpc_resume data 1\n")
        for line in self._lines():
            hasher.update(line.encode())
        for name, fingerprint in sorted(self.fingerprints.items()):
            hasher.update(f"{_compact([name, fingerprint])}\n".encode())
        return hasher.hexdigest()[:HASH_DIGITS]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def read(self) -> bool:
        """Whether the contents of all files are known."""
        return all(entry.digest is not None for entry in self.files.values())

    def believing(self, earlier: DataSnapshot) -> DataSnapshot:
        """Take files that were not read for what they were, where name and size are the same."""
        if self.read:
            return self
        files = dict(self.files)
        for name, entry in self.files.items():
            known = earlier.files.get(name)
            if entry.digest is None and known is not None and known.size_bytes == entry.size_bytes:
                files[name] = known
        inside = {
            name: earlier.inside[name] for name in earlier.inside if files.get(name) == earlier.files[name]
        }
        return DataSnapshot(files=files, fingerprints=self.fingerprints, inside=inside, saved=self.saved)

    def _lines(self) -> Iterator[str]:
        for name in sorted(self.files):
            entry = self.files[name]
            yield f"{_compact([name, entry.size_bytes, entry.digest])}\n"

    def to_bytes(self) -> bytes:
        """Give the snapshot as its file; see the module."""
        rest: JsonObject = {"fingerprints": dict(self.fingerprints), "saved": dict(self.saved)}
        rest["inside"] = {name: dict(objects) for name, objects in self.inside.items()}
        lines = ",".join(self._lines())
        text = f'"files": [\n{lines}],\n"rest": {_compact(rest)}}}\n'
        return seal_lines(SCHEMA, self.digest, text.encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> DataSnapshot:
        """Read :meth:`to_bytes`.

        Raises
        ------
        ValueError
            If it is something else, or not what was written.
        """
        schema, digest, rest = unseal_lines(data)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema}, but this version reads {SCHEMA}")
        record = parse_json(b"{" + rest)
        check_nesting(record, 8)
        try:
            found = cls(
                files={
                    _text(name): FileEntry(size_bytes=size_bytes, digest=file_digest)
                    for name, size_bytes, file_digest in record["files"]
                },
                fingerprints=_texts(record["rest"]["fingerprints"]),
                inside={_text(k): read_inside(v) for k, v in record["rest"]["inside"].items()},
                saved={_text(k): _texts(v) for k, v in record["rest"]["saved"].items()},
            )
            if not found.inside.keys() <= found.files.keys():
                raise ValueError("it looks into files that are none")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it holds no snapshot ({error!s:.100})") from None
        if len(found.files) != len(record["files"]) or found.digest != digest:
            raise ValueError("its digest is not that of its files")
        return found

    @classmethod
    def load(cls, path: Path) -> DataSnapshot:
        """Read a file of :meth:`to_bytes`.

        Raises
        ------
        OSError
            If it can't be read.
        IntegrityError
            If it is not what was written.
        """
        data = read_regular(path, longest_bytes=LONGEST_BYTES)
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            raise IntegrityError(f"{path}: no data snapshot, or a damaged one ({error!s:.200})") from error


def is_digest(value: Any) -> bool:
    """Whether a value can be the digest of a snapshot or of a file."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def read_inside(value: Any) -> Inside:
    """Check what stands for the inside of an HDF5 file.

    Raises
    ------
    ValueError, TypeError, AttributeError
        If it is something else.
    """
    found = {_text(name): tuple(map(_text, fields)) for name, fields in value.items()}
    if any(len(fields) != len(INSIDE_FIELDS) for fields in found.values()):
        raise ValueError("an object of an HDF5 file has other fields")
    return found


def _texts(value: Any) -> dict[str, str]:
    return {_text(key): _text(text) for key, text in value.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return value
