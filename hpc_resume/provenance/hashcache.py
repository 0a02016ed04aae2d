"""Hashes of files that have been read before, so that a dataset that has not changed is not read again.

A hash counts as long as the file's size, its times of modification and of status change and its inode are those of
when it was read. A file that was changed just before it was read may be changed again without its times showing
it, as filesystems' clocks tick slowly; such a hash is not kept. (git calls such files "racily clean".)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.provenance.datafiles import Stamp
from hpc_resume.provenance.datasnapshot import LONGEST_BYTES, Inside, is_digest, read_inside
from hpc_resume.rundir import seal_lines, unseal_lines
from hpc_resume.untrusted import parse_json, read_regular

SCHEMA = 1
#: Coarsest tick of a filesystem's times. Source: FAT, 2 s; ext3, NFS on it, and HFS+ have 1 s.
TICK_NS = 2_000_000_000
#: What nobody has used for so long is deleted: datasets that lay on a node's own disk for one job.
_KEPT_S = 90 * 86400.0
_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a file's contents.

    Parameters
    ----------
    stamp
        Of when it was read.
    digest
        Of its bytes.
    inside
        Of an HDF5 file: what it holds, if that could be read.
    looked
        Whether that was tried, or the file is no HDF5 file.
    """

    stamp: Stamp
    digest: str
    inside: Inside | None = None
    looked: bool = True


def settled(stamp: Stamp, now_ns: int) -> bool:
    """Whether a file that is read now can't be changed any more without its stamp showing it."""
    return stamp.touched_ns + TICK_NS < now_ns


def user_cache(environ: Mapping[str, str]) -> Path | None:
    """Folder of this user's hashes, by the XDG Base Directory Specification; ``None`` without a home."""
    for variable, rest in (("XDG_CACHE_HOME", ()), ("HOME", (".cache",))):
        if environ.get(variable, "").startswith("/"):
            return Path(environ[variable], *rest, "hpc_resume", "data")
    return None


class HashCache:
    """Hashes of files below some folders of data, in a file for each of those.

    Several processes and users may use it at once: files are replaced whole, and the last one wins. What is damaged
    is as if it were not there, and a folder that can't be written to costs time alone.

    Parameters
    ----------
    folders
        Where the files lie; all are written, and the first that knows a file is believed.
    fs
        The calls that reach the disk.
    clock
        Unix time in seconds.
    """

    def __init__(self, folders: Sequence[Path], *, fs: Filesystem = DISK, clock: Clock = time.time) -> None:
        self._folders = tuple(folders)
        self._fs = fs
        self._clock = clock

    def load(self, root: Path) -> dict[str, Known]:
        """Give what is known of the files below a folder, by path in it; of a single file, by ``""``."""
        found: dict[str, Known] = {}
        for folder in reversed(self._folders):
            path = self._path(folder, root)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                data = read_regular(path, longest_bytes=LONGEST_BYTES)
                found.update(_read(data, _key(root)))
                os.utime(path)  # it is in use
        return found

    def store(self, root: Path, known: Mapping[str, Known]) -> None:
        """Keep what is known of the files below a folder, in place of what was."""
        data = _write(known, _key(root))
        for folder in self._folders:
            with contextlib.suppress(OSError):
                self._fs.make_dirs(folder)
                self._fs.write_file(self._path(folder, root), data)
                self._clean(folder)

    def _clean(self, folder: Path) -> None:
        for path in folder.glob("*.json"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < self._clock() - _KEPT_S:
                    self._fs.unlink(path)

    @staticmethod
    def _path(folder: Path, root: Path) -> Path:
        return folder / f"{_key(root)}.json"


def _key(root: Path) -> str:
    return str(blake3(os.fsencode(os.path.realpath(root))).hexdigest()[:32])


def _write(known: Mapping[str, Known], key: str) -> bytes:
    lines = ",\n".join(
        _compact([name, *each.stamp, each.digest, each.looked, each.inside and dict(each.inside)])
        for name, each in known.items()
    )
    return seal_lines(SCHEMA, key, f'"files": [\n{lines}\n]}}\n'.encode())


def _read(data: bytes, key: str) -> Iterator[tuple[str, Known]]:
    schema, found_key, rest = unseal_lines(data)
    if schema != SCHEMA or found_key != key:
        raise ValueError("of another version or another folder")
    for name, *numbers, digest, looked, inside in parse_json(b"{" + rest)["files"]:
        stamp = Stamp(*numbers)
        if not isinstance(name, str) or any(type(each) is not int for each in stamp) or not is_digest(digest):
            raise ValueError("no hash of a file")
        objects = None if inside is None else read_inside(inside)
        yield name, Known(stamp=stamp, digest=digest, looked=looked is True, inside=objects)
