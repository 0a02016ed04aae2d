"""Taking a data snapshot: lists the files, reads those that are not known, by several threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hpc_resume.errors import UsageError
from hpc_resume.files import Clock, may_pass
from hpc_resume.provenance.crew import Crew
from hpc_resume.provenance.datafiles import IGNORED, DataFile, Stamp, list_files, named_roots, unreadable
from hpc_resume.provenance.datasnapshot import HASH_DIGITS, DataSnapshot, FileEntry, Inside
from hpc_resume.provenance.hashcache import HashCache, Known, settled
from hpc_resume.provenance.hdf5inside import MAGIC, look_inside
from hpc_resume.provenance.huggingface import saved_datasets

#: Read and hashed at once. Not by mmap: a file that is cut short meanwhile would kill the process.
_PIECE_BYTES = 1 << 20
#: The kernel is asked for this much ahead.
_AHEAD_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """How far a snapshot is; told several times a second.

    Parameters
    ----------
    files
        Files that there are, once all are listed; 0 before.
    done_bytes, total_bytes
        What has been read, of what has to be.
    """

    files: int = 0
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A snapshot, and what it cost.

    Parameters
    ----------
    snapshot
        Of the data.
    read_files, read_bytes
        What had to be read for it: not known from before.
    """

    snapshot: DataSnapshot
    read_files: int = 0
    read_bytes: int = 0


def _silent(_: Taking) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a snapshot is taken.

    Parameters
    ----------
    contents
        Whether files are read; else names and sizes are all.
    inside
        Whether HDF5 files are looked into, which reads them twice.
    ignore
        Patterns of names that do not count.
    threads
        How many read at once.
    cache
        Hashes from before; without it, everything is read.
    clock
        Unix time in seconds.
    """

    contents: bool = True
    inside: bool = True
    ignore: tuple[str, ...] = IGNORED
    threads: int = 8
    cache: HashCache | None = None
    clock: Clock = time.time


def take_snapshot(
    paths: Sequence[str | Path] | Mapping[str, str | Path],
    reading: Reading | None = None,
    *,
    fingerprints: Mapping[str, str] | None = None,
    tell: Callable[[Taking], None] = _silent,
) -> Taken:
    """Find out what a dataset consists of.

    Parameters
    ----------
    paths
        Folders and files, perhaps by name; of several without names, see
        :func:`~hpc_resume.provenance.datafiles.named_roots`.
    reading
        How.
    fingerprints
        Of datasets in memory, which belong to it.
    tell
        Told how far it is, several times a second; what it raises ends it.

    Raises
    ------
    UsageError
        If something is not there, can't be read, is no file, or changes meanwhile.
    OSError
        If the filesystem fails in a way that may pass.
    """
    reading = reading or Reading()
    if isinstance(paths, Mapping):
        roots = {name: named_roots([path])[""] for name, path in paths.items()}
    else:
        roots = named_roots(paths) if paths else {}
    files = list_files(roots, ignore=reading.ignore, threads=reading.threads, look=lambda: tell(Taking()))
    shelf = _Shelf(files, reading)
    unknown = shelf.unknown()
    total_bytes = sum(file.stamp.size_bytes for file in unknown)
    count = _Count()

    def look() -> None:
        tell(Taking(files=len(files), done_bytes=count.done_bytes, total_bytes=total_bytes))

    def work(file: DataFile) -> tuple[DataFile, Known, bool]:
        return file, *_read(file, reading, count, lambda: crew.halted)

    crew: Crew[DataFile, tuple[DataFile, Known, bool]] = Crew(work, threads=reading.threads, look=look)
    crew.add(unknown)
    try:
        for file, known, lasts in crew.results():
            shelf.learn(file, known, lasts=lasts)
    finally:
        shelf.keep()  # what has been read is known the next time, even if this ends here
    look()
    return Taken(
        snapshot=DataSnapshot(
            files={file.name: shelf.entry(file) for file in files},
            fingerprints=dict(fingerprints or {}),
            inside=shelf.insides(),
            saved=saved_datasets(files),
        ),
        read_files=len(unknown),
        read_bytes=total_bytes,
    )


class _Shelf:
    """What is known of the files of a dataset: from before, and what is learnt now.

    Parameters
    ----------
    files
        All of them.
    reading
        How the snapshot is taken.
    """

    def __init__(self, files: Sequence[DataFile], reading: Reading) -> None:
        self._files = files
        self._reading = reading
        self._known: dict[str, Known] = {}
        self._passing: set[str] = set()
        self._before: dict[str, dict[str, Known]] = {}
        self._learnt: set[str] = set()
        if not reading.contents:
            return
        if reading.cache is not None:
            self._before = {root: reading.cache.load(Path(root)) for root in {file.root for file in files}}
        for file in files:
            known = self._before.get(file.root, {}).get(file.below)
            if known is not None and known.stamp == file.stamp and (known.looked or not reading.inside):
                self._known[file.name] = known

    def unknown(self) -> list[DataFile]:
        """Files that must be read; the longest first, so that none is alone at the end."""
        if not self._reading.contents:
            return []
        unknown = [file for file in self._files if file.name not in self._known]
        return sorted(unknown, key=lambda file: (-file.stamp.size_bytes, file.name))

    def learn(self, file: DataFile, known: Known, *, lasts: bool) -> None:
        """Take note of a file that was read; it is kept for another time only if that ``lasts``."""
        self._known[file.name] = known
        self._learnt.add(file.root)
        if not lasts:
            self._passing.add(file.name)

    def keep(self) -> None:
        """Keep what is known for another time, where that is more or less than before."""
        if self._reading.cache is None or not self._reading.contents:
            return
        now: dict[str, dict[str, Known]] = {root: {} for root in self._before}
        for file in self._files:
            if file.name in self._known and file.name not in self._passing:
                now[file.root][file.below] = self._known[file.name]
        for root, known in now.items():
            if root in self._learnt or known.keys() != self._before[root].keys():
                self._reading.cache.store(Path(root), known)

    def entry(self, file: DataFile) -> FileEntry:
        """Give what the snapshot says of a file."""
        known = self._known.get(file.name)
        if known is None:
            return FileEntry(size_bytes=file.stamp.size_bytes, digest=None)
        return FileEntry(size_bytes=known.stamp.size_bytes, digest=known.digest)

    def insides(self) -> dict[str, Inside]:
        """Give what the HDF5 files among them hold."""
        return {name: known.inside for name, known in sorted(self._known.items()) if known.inside is not None}


class _Count:
    """Bytes that all threads have read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done_bytes = 0

    def add(self, size_bytes: int) -> None:
        with self._lock:
            self.done_bytes += size_bytes


def _read(file: DataFile, reading: Reading, count: _Count, halted: Callable[[], bool]) -> tuple[Known, bool]:
    """Read a file; also tells whether what is known of it now can be kept."""
    began_ns = int(reading.clock() * 1e9)
    try:
        # It was a regular file when it was listed; should it be a pipe now, this does not wait for a writer.
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            before = Stamp.of(os.fstat(fd))
            digest, done, is_hdf5 = _hash(fd, before.size_bytes, count, halted)
            inside = look_inside(file.path, halted=halted) if is_hdf5 and reading.inside else None
            after = Stamp.of(os.fstat(fd) if inside is None else Path(file.path).stat())
        finally:
            os.close(fd)
    except OSError as error:
        if may_pass(error):
            raise
        raise unreadable(file.path, error) from error
    if (before != after or done != before.size_bytes) and not halted():
        raise UsageError(
            f"{file.path}: was changed while it was read, so nobody can say what the data is; wait until "
            "nothing writes into the data any more"
        )
    known = Known(stamp=after, digest=digest, inside=inside, looked=reading.inside or not is_hdf5)
    return known, settled(after, began_ns) and not halted()


def _hash(fd: int, size_bytes: int, count: _Count, halted: Callable[[], bool]) -> tuple[str, int, bool]:
    """Hash a file; also gives how many bytes that were, and whether it is HDF5."""
    hasher = blake3()
    piece = bytearray(min(_PIECE_BYTES, max(size_bytes, 1)))
    view = memoryview(piece)
    is_hdf5 = False
    done = ahead = 0
    while done < size_bytes and not halted() and (got := os.preadv(fd, [view], done)):
        if done == 0:
            is_hdf5 = bytes(view[: len(MAGIC)]) == MAGIC
        if done >= ahead and size_bytes > _PIECE_BYTES:
            ahead = done + _AHEAD_BYTES // 2
            os.posix_fadvise(fd, done, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        hasher.update(view[:got])
        done += got
        count.add(got)
    return hasher.hexdigest()[:HASH_DIGITS], done, is_hdf5
