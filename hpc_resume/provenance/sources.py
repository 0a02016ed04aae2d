"""The sources that a run keeps, each once by its digest, and the one that its jobs run from.

::

    sources/
      3f9a1c2e5b7d8f01.zip     the files, not compressed
      3f9a1c2e5b7d8f01.json    their names, sizes and digests
      3f9a1c2e5b7d8f01/        the same files to run from, read-only; beside them links to what is no source
      5b7d8f013f9a1c2e.patch   what git shows as changed
      chosen.json              which of them the run's jobs run from

What was written is never changed, except ``chosen.json``, which is replaced when a person submits other code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import uuid
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.files import DISK, Filesystem, JsonObject
from hpc_resume.provenance.listing import Listing, SourceFile
from hpc_resume.provenance.source import MOST_BYTES, Source
from hpc_resume.rundir import RunDirectory, sealed
from hpc_resume.untrusted import check_nesting, parse_json, read_regular

SCHEMA = 1
#: The ZIP format counts from 1980; every file has this time, so that the same files give the same bytes.
_TIME = (1980, 1, 1, 0, 0, 0)
#: A longer archive or list is none; names and headers take their part.
_LONGEST_ARCHIVE_BYTES = MOST_BYTES + (1 << 25)
_LONGEST_RECORD_BYTES = 1 << 24
_DIGEST = re.compile(r"[0-9a-f]{16}")
_CHOSEN = "chosen.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which source the jobs of a run run from.

    Parameters
    ----------
    digest
        Of the source.
    root
        The project's folder, from which it was taken.
    taken
        Unix time in seconds.
    git
        What git said of it; see :class:`~hpc_resume.provenance.git.Revision`.
    shared
        It lies in the folder of the array that the run is one of.
    """

    digest: str
    root: str
    taken: float
    git: JsonObject | None = None
    shared: bool = False

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {
            "schema": SCHEMA,
            "source": self.digest,
            "root": self.root,
            "taken": self.taken,
            "git": self.git,
            "shared": self.shared,
        }


class Sources:
    """The sources of one run, or of an array's runs.

    Parameters
    ----------
    folder
        They are in.
    fs
        The calls that reach the disk.
    """

    def __init__(self, folder: Path, *, fs: Filesystem = DISK) -> None:
        self.folder = folder
        self._fs = fs

    @classmethod
    def of(cls, run: RunDirectory, *, shared: bool = False) -> Sources:
        """Give a run's own, or those of the array that it is one of."""
        return cls(run.root.parent / run.sources.name if shared else run.sources)

    # ---------------------------------------------------------------- keeping

    def keep(self, source: Source) -> str:
        """Keep a source unless it is there; gives its digest."""
        listing = source.listing
        digest = listing.digest
        record = self.folder / f"{digest}.json"
        if not record.exists():
            self._fs.make_dirs(self.folder)
            archive = _archive(source)
            self._fs.write_file(self.folder / f"{digest}.zip", archive)
            values = {
                "schema": SCHEMA,
                "source": digest,
                "archive": hashlib.sha256(archive).hexdigest(),
                "files": listing.to_json(),
            }
            self._fs.write_file(record, sealed(values))
        return digest

    def keep_patch(self, patch: bytes) -> str:
        """Keep a patch unless it is there; gives its digest."""
        digest = hashlib.sha256(patch).hexdigest()[:16]
        path = self.folder / f"{digest}.patch"
        if not path.exists():
            self._fs.make_dirs(self.folder)
            self._fs.write_file(path, patch)
        return digest

    def choose(self, chosen: Chosen) -> None:
        """Have the run's next attempts run from a source."""
        self._fs.make_dirs(self.folder)
        self._fs.write_file(self.folder / _CHOSEN, sealed(chosen.to_json()))

    def chosen(self) -> Chosen | None:
        """Tell what the run's jobs run from; ``None`` if nobody has chosen.

        Raises
        ------
        IntegrityError
            If the record is damaged.
        """
        path = self.folder / _CHOSEN
        try:
            record = _record(path)
        except FileNotFoundError:
            return None
        known = isinstance(record["root"], str) and isinstance(record["taken"], int | float)
        if not known or not isinstance(record["git"], dict | None) or type(record["shared"]) is not bool:
            raise IntegrityError(f"{path}: damaged (its fields are of other kinds)")
        return Chosen(
            digest=record["source"],
            root=record["root"],
            taken=record["taken"],
            git=record["git"],
            shared=record["shared"],
        )

    # ---------------------------------------------------------------- reading

    def listing(self, digest: str) -> Listing:
        """List the files of a source.

        Raises
        ------
        CheckpointNotFound
            If it was not kept.
        IntegrityError
            If the list is damaged.
        """
        return self._listed(digest)[0]

    def read(self, digest: str, paths: Collection[str]) -> dict[str, bytes]:
        """Read files of a source, each compared with its digest.

        Raises
        ------
        CheckpointNotFound
            If it was not kept.
        IntegrityError
            If one is damaged; names it.
        """
        listing = self.listing(digest)
        archive, data = self._archived(digest)
        found = {}
        for path in paths:
            content = _member(archive, data, path, listing.files[path])
            if content is None:
                raise IntegrityError(f"{self.folder / f'{digest}.zip'}: {path} is not what was written")
            found[path] = content
        return found

    def altered(self, tree: Path, digest: str) -> list[str]:
        """Name the files of a source's folder that are not what was kept, and those that are missing or too many."""
        listing = self.listing(digest)
        wrong = [path for path, each in listing.files.items() if not _is(tree / path, each)]
        return sorted([*wrong, *(path for path in _there(tree) if path not in listing.files)])

    # ---------------------------------------------------------------- running

    def check_out(self, digest: str, source: Source | None = None) -> Path:
        """Make the folder to run a source from, unless it is there; all or nothing, whoever else does it.

        Parameters
        ----------
        digest
            Of a source that was kept.
        source
            The same as it was read; its folder gets links to what was left out.
        """
        tree = self.folder / digest
        if not tree.is_dir():
            listing = self.listing(digest)
            draft = self.folder / f".{digest}.{uuid.uuid4().hex}"
            try:
                draft.mkdir()
                for path, data in self.read(digest, listing.files).items():
                    target = draft / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data)
                    target.chmod(0o555 if listing.files[path].executable else 0o444)
                with contextlib.suppress(OSError):  # somebody was faster
                    self._fs.rename(draft, tree)
            finally:
                self._fs.remove_tree(draft)
        if source is not None:
            _link(tree, source)
        return tree

    # ---------------------------------------------------------------- verifying

    def check(self) -> Iterator[tuple[Path, str]]:
        """Find what of all that is kept is not what was written; it only reads.

        Yields
        ------
        (Path, str)
            A file, and what is wrong with it.
        """
        if not self.folder.is_dir():
            return
        records = {path.stem for path in self.folder.glob("*.json")} - {_CHOSEN.removesuffix(".json")}
        archives = {path.stem for path in self.folder.glob("*.zip")}
        for digest in sorted(records | archives):
            yield from self.check_source(digest)
        for path in sorted(self.folder.glob("*.patch")):
            if _sha256(path)[:16] != path.stem:
                yield path, "is not what was written"
        try:
            self.chosen()
        except IntegrityError as error:
            yield self.folder / _CHOSEN, str(error).removeprefix(f"{self.folder / _CHOSEN}: ")

    def has(self, digest: str) -> bool:
        """Whether the list of a source is there."""
        return _DIGEST.fullmatch(digest) is not None and (self.folder / f"{digest}.json").is_file()

    def check_source(self, digest: str) -> Iterator[tuple[Path, str]]:
        """Find what of one source is not what was written; see :meth:`check`."""
        path, archive_path = self.folder / f"{digest}.json", self.folder / f"{digest}.zip"
        try:
            listing, archive_digest = self._listed(digest)
        except (IntegrityError, CheckpointNotFound) as error:
            yield path, str(error).removeprefix(f"{path}: ")
            return
        if _sha256(archive_path) != archive_digest:
            try:
                archive, data = self._archived(digest)
            except (IntegrityError, CheckpointNotFound) as error:
                yield archive_path, str(error).removeprefix(f"{archive_path}: ")
            else:
                wrong = [
                    name for name, each in listing.files.items() if _member(archive, data, name, each) is None
                ]
                yield from ((archive_path, f"{name} is not what was written") for name in wrong)
                if not wrong:
                    yield archive_path, "is not what was written"
        if (tree := self.folder / digest).is_dir():
            for name in self.altered(tree, digest):
                yield tree / name, "is not what was written"

    def files_of(self, digest: object) -> list[Path]:
        """Files that keep a source; none if it is not here, or if that is no digest."""
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            return []
        found = [self.folder / f"{digest}{kind}" for kind in (".zip", ".json")]
        return found if all(path.is_file() for path in found) else []

    def _listed(self, digest: str) -> tuple[Listing, str]:
        path = self.folder / f"{digest}.json"
        if _DIGEST.fullmatch(digest) is None:
            raise IntegrityError(f"{digest!r:.100} is no digest of a source")
        try:
            record = _record(path)
            listing, archive = Listing.from_json(record["files"]), record["archive"]
        except FileNotFoundError:
            raise CheckpointNotFound(f"{path}: is gone, so this source is not known") from None
        except (LookupError, IntegrityError) as error:
            raise IntegrityError(f"{path}: damaged ({str(error).removeprefix(f'{path}: ')})") from None
        if record["source"] != digest or listing.digest != digest:
            raise IntegrityError(f"{path}: damaged (its files have another digest)")
        return listing, str(archive)

    def _archived(self, digest: str) -> tuple[zipfile.ZipFile, bytes]:
        path = self.folder / f"{digest}.zip"
        try:
            data = read_regular(path, longest_bytes=_LONGEST_ARCHIVE_BYTES)
            return zipfile.ZipFile(io.BytesIO(data)), data
        except FileNotFoundError:
            raise CheckpointNotFound(f"{path}: is gone") from None
        except Exception as error:  # noqa: BLE001 - zipfile has no one error for what is no ZIP archive
            raise IntegrityError(f"{path}: is not what was written ({error!s:.100})") from None


def _archive(source: Source) -> bytes:
    """Put the files of a source into a ZIP archive; the same files give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path, (data, executable) in sorted(source.contents.items()):
            entry = zipfile.ZipInfo(path, _TIME)
            entry.create_system = 3  # Unix: the permissions count
            entry.external_attr = (0o100555 if executable else 0o100444) << 16
            archive.writestr(entry, data)
    return out.getvalue()


def _member(archive: zipfile.ZipFile, data: bytes, path: str, wanted: SourceFile) -> bytes | None:
    """Read a file of an archive; ``None`` if it is not what was written. No length in it is believed."""
    try:
        if archive.getinfo(path).file_size != wanted.size_bytes or wanted.size_bytes > len(data):
            return None
        with archive.open(path) as member:
            content = member.read(wanted.size_bytes + 1)
    except Exception:  # noqa: BLE001 - zipfile has no one error for what is no ZIP archive
        return None
    same = hashlib.sha256(content).hexdigest() == wanted.digest
    return content if same else None


def _record(path: Path) -> dict[str, Any]:
    """Read a sealed record of this module."""
    try:
        data = read_regular(path, longest_bytes=_LONGEST_RECORD_BYTES)
        record = parse_json(data)
        check_nesting(record, 6)
        good = isinstance(record, dict) and sealed(record) == data
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged ({error!s:.200})") from None
    if not good:
        raise IntegrityError(f"{path}: damaged (its digest differs)")
    if record.get("schema") != SCHEMA or not _DIGEST.fullmatch(str(record.get("source"))):
        raise IntegrityError(f"{path}: damaged, or a later version's")
    found: dict[str, Any] = record
    return found


def _is(path: Path, wanted: SourceFile) -> bool:
    try:
        data = read_regular(path, longest_bytes=wanted.size_bytes, follow=False)
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == wanted.digest


def _there(tree: Path) -> Iterator[str]:
    """List the regular files of a source's folder; what Python compiles and links are not looked at."""
    for folder, folders, names in os.walk(tree):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                yield path.relative_to(tree).as_posix()


def _link(tree: Path, source: Source) -> None:
    """Link what was left out of a source into its folder, so that code finds it beside itself as before."""
    for path in source.left_out:
        link, target = tree / path, source.root / path
        if link.is_symlink() and os.readlink(link) == str(target):  # noqa: PTH115 - as it is spelled
            continue
        draft = link.with_name(f".{uuid.uuid4().hex}.link")
        try:
            draft.symlink_to(target)
            draft.replace(link)
        except OSError:  # a name that is too long, say: code that needs it says so
            draft.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular(path, longest_bytes=_LONGEST_ARCHIVE_BYTES)).hexdigest()
    except OSError:
        return ""
