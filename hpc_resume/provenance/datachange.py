"""What differs between two data snapshots, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from hpc_resume.files import JsonObject
from hpc_resume.provenance.datasnapshot import INSIDE_FIELDS, DataSnapshot, FileEntry, Inside
from hpc_resume.untrusted import printable

#: So many names are told one by one, unless more are asked for.
TOLD = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataChange:
    """From one snapshot to another.

    Parameters
    ----------
    added, removed
        Names of files.
    renamed
        Pairs of an old and a new name, of a file whose contents are the same.
    changed
        Names of files, or of objects in HDF5 files (``images.h5:/train/x``), each with what differs.
    rewritten
        HDF5 files whose bytes differ and whose contents do not: no change.
    unread
        Number of files that are compared by their size alone.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    changed: tuple[tuple[str, str], ...] = ()
    rewritten: tuple[str, ...] = ()
    unread: int = 0

    def __bool__(self) -> bool:
        """Whether the data is not the same."""
        return bool(self.added or self.removed or self.renamed or self.changed)

    def counts(self) -> str:
        """Say in words how much of what: ``"1 changed, 2 added"``."""
        kinds = ("changed", "added", "removed", "renamed", "rewritten")
        counted = [f"{len(getattr(self, kind)):,} {kind}" for kind in kinds if getattr(self, kind)]
        return ", ".join(counted) or "nothing changed"

    def lines(self, most: int | None = TOLD) -> list[str]:
        """Name what differs, a line each.

        Parameters
        ----------
        most
            So many lines, and then how many more there are; ``None``: all.
        """
        found = [printable(each).replace("\n", "\\n") for each in self._sentences()]
        if most is None or len(found) <= most:
            return found
        return [*found[:most], f"and {len(found) - most:,} more"]

    def _sentences(self) -> Iterator[str]:
        yield from (f"changed: {name} ({what})" for name, what in self.changed)
        yield from (f"renamed: {old} → {new}" for old, new in self.renamed)
        yield from (f"removed: {name}" for name in self.removed)
        yield from (f"added: {name}" for name in self.added)
        yield from (f"rewritten: {name} (other bytes, the same contents)" for name in self.rewritten)

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {
            "same": not self,
            "changed": [{"name": name, "what": what} for name, what in self.changed],
            "renamed": [list(pair) for pair in self.renamed],
            "removed": list(self.removed),
            "added": list(self.added),
            "rewritten": list(self.rewritten),
            "unread": self.unread,
        }


def compare_data(old: DataSnapshot, new: DataSnapshot) -> DataChange:
    """Compare two snapshots.

    Where the contents of a file are not known on both sides, its size decides.
    """
    if old.digest == new.digest:
        return DataChange(unread=0 if old.read else len(old.files))
    changed: list[tuple[str, str]] = []
    rewritten: list[str] = []
    unread = 0
    for name in sorted(old.files.keys() & new.files.keys()):
        one, two = old.files[name], new.files[name]
        if None in {one.digest, two.digest}:
            unread += 1
        if _same(one, two):
            continue
        insides = old.inside.get(name), new.inside.get(name)
        if insides[0] is None or insides[1] is None:
            changed.append((name, _what(one, two)))
        elif objects := list(_objects(name, insides[0], insides[1])):
            changed += objects
        else:
            rewritten.append(name)
    for name in sorted(old.fingerprints.keys() & new.fingerprints.keys()):
        before, after = old.fingerprints[name], new.fingerprints[name]
        if before != after:
            changed.append((name, f"Hugging Face fingerprint {before} → {after}"))
    removed = {*old.files, *old.fingerprints} - {*new.files, *new.fingerprints}
    added = {*new.files, *new.fingerprints} - {*old.files, *old.fingerprints}
    renamed = _renamed(old, new, removed, added)
    return DataChange(
        added=tuple(sorted(added.difference(new for _, new in renamed))),
        removed=tuple(sorted(removed.difference(old for old, _ in renamed))),
        renamed=renamed,
        changed=tuple(changed),
        rewritten=tuple(rewritten),
        unread=unread,
    )


def _same(one: FileEntry, two: FileEntry) -> bool:
    if one.size_bytes != two.size_bytes:
        return False
    return one.digest is None or two.digest is None or one.digest == two.digest


def _what(one: FileEntry, two: FileEntry) -> str:
    if one.size_bytes == two.size_bytes:
        return f"other contents, {one.size_bytes:,} bytes as before"
    return f"{one.size_bytes:,} → {two.size_bytes:,} bytes"


def _objects(file: str, old: Inside, new: Inside) -> Iterator[tuple[str, str]]:
    """Name the objects of an HDF5 file that differ."""
    for name in sorted(old.keys() | new.keys()):
        one, two = old.get(name), new.get(name)
        if one == two:
            continue
        if one is None or two is None:
            yield f"{file}:{name}", "added" if one is None else "removed"
            continue
        what = [
            f"{field} {before} → {after}" if field in {"type", "shape"} else field
            for field, before, after in zip(INSIDE_FIELDS, one, two, strict=True)
            if before != after
        ]
        yield f"{file}:{name}", ", ".join(what)


def _renamed(
    old: DataSnapshot, new: DataSnapshot, removed: set[str], added: set[str]
) -> tuple[tuple[str, str], ...]:
    """Pair files that are gone with new ones of the same contents."""
    there: dict[FileEntry, list[str]] = defaultdict(list)
    for name in sorted(added & new.files.keys(), reverse=True):
        there[new.files[name]].append(name)
    pairs = []
    for name in sorted(removed & old.files.keys()):
        entry = old.files[name]
        if entry.digest is not None and there[entry]:
            pairs.append((name, there[entry].pop()))
    return tuple(pairs)
