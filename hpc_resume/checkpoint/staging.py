"""One rank's side of a checkpoint that is being taken: its shard, its receipt, and the commit if it is the last."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from hpc_resume.checkpoint.changes import Base, Changes
from hpc_resume.checkpoint.commit import (
    RECEIPTS,
    SHARDS,
    STAGING,
    committed_by,
    finish_commit,
    make_durable,
    ranks_with_receipts,
)
from hpc_resume.checkpoint.finite import look
from hpc_resume.checkpoint.health import Health, Known
from hpc_resume.checkpoint.image import Image, Piece
from hpc_resume.checkpoint.index import MAX_FILES, shard_file
from hpc_resume.checkpoint.manifest import MANIFEST, ShardRecord, read_manifest
from hpc_resume.checkpoint.receipt import Header, Receipt, carries_structure, objects_digest
from hpc_resume.checkpoint.shard import ShardWriter, WrittenShard
from hpc_resume.checkpoint.snapshot import Snapshot
from hpc_resume.errors import FencedError, IntegrityError
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.policy.saving import Estimate, Looking, refer_to_older
from hpc_resume.provenance.environment import gpu_peak_bytes
from hpc_resume.rundir import RunDirectory

#: How a path says that it is gone: missing, or on NFS stale.
_GONE = frozenset({errno.ENOENT, errno.ESTALE})


class Staging:
    """One rank's hold on the checkpoints that its attempt is taking.

    Parameters
    ----------
    run
        The run directory.
    attempt
        This attempt's number.
    rank, node
        Who writes, on which host.
    threads
        Writers of a shard.
    direct
        Write past the page cache where the filesystem can.
    longest_chain
        Number of older checkpoints that one may refer to for bytes that have not changed; 0: none.
    fs, clock
        Filesystem and Unix time in seconds.
    """

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        rank: int,
        node: str,
        *,
        threads: int = 2,
        direct: bool = True,
        longest_chain: int = 0,
        fs: Filesystem = DISK,
        clock: Clock = time.time,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._node = node
        self._longest_chain = min(longest_chain, MAX_FILES)
        self._fs = fs
        self._clock = clock
        self._writer = ShardWriter(threads=threads, fs=fs, direct=direct)
        self._written: dict[int, tuple[str, tuple[Piece, ...], Image, bytes]] = {}
        self._discarded: dict[int, int] = {}
        self._healths: dict[str, Health] = {}
        self._base: Base | None = None
        self._looking = Looking()
        #: What saves were measured to cost, for the next one.
        self.estimate = Estimate()
        #: Bytes that had changed at the last look; None if it was not looked at.
        self.last_changed_bytes: int | None = None

    def close(self) -> None:
        """End the writing threads."""
        self._writer.close()

    def folder(self, step: int) -> Path:
        """Staging folder of one checkpoint; a step that is tried once more gets a new one."""
        turn = self._discarded.get(step, 0)
        name = f"{step:010d}" if turn == 0 else f"{step:010d}.{turn}"
        return self._run.attempt(self._attempt) / STAGING / name

    def write(
        self,
        header: Header,
        snapshot: Snapshot,
        *,
        rank: int | None = None,
        only_changed: bool = False,
        known: Known | None = None,
    ) -> Receipt | None:
        """Make a rank's shard and receipt durable.

        Parameters
        ----------
        header
            Of the checkpoint.
        snapshot
            What to write.
        rank
            Whose shard it is, if not this rank's own: of one that has died.
        only_changed
            Leave out what has not changed even if that hardly pays: there is no time for more.
        known
            What is known of the state already.

        Returns
        -------
        Receipt or None
            None if the others go on without this rank, which was slow and counted as dead: the checkpoint
            is committed, or somebody is just doing it.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        OSError
            If the filesystem refuses.
        """
        folder = self.folder(header.step)
        by = self._rank
        rank = by if rank is None else rank
        try:
            self._make(folder)
            if self._make(folder / SHARDS) and self.committed_name(header.step) is not None:
                self._fs.remove_tree(folder)  # made again after the commit
                return None
            self._make(folder / RECEIPTS)
            begun = self._clock()
            file = shard_file(rank, header.world_size, by=None if rank == by else by)
            if snapshot.arena is not None:
                snapshot.arena.wait()
            seen = self._writer.beside(look, snapshot.pieces, snapshot.data, snapshot.roles)
            written, image, written_bytes, look_s = self._write_shard(
                folder / SHARDS / file, snapshot, own=rank == by, only_changed=only_changed
            )
            looked = seen.result()
            created = self._clock()
            receipt = Receipt(
                header=header,
                by=by,
                created=created,
                shard=ShardRecord(
                    file=file,
                    rank=rank,
                    node=self._node,
                    size_bytes=written.size_bytes,
                    index=written.index,
                    table=written.table,
                    digest=written.digest,
                    rest=written.rest,
                ),
                structure_digest=snapshot.structure.digest,
                structure=snapshot.structure if carries_structure(snapshot.structure, rank) else None,
                objects_digest=objects_digest(snapshot.objects),
                objects=snapshot.objects if rank == 0 else None,
                refers=tuple(sorted({checkpoint for checkpoint, _ in image.files})),
                witnesses=snapshot.witnesses,
                state_bytes=snapshot.size_bytes,
                written_bytes=written_bytes,
                write_s=round(created - begun - look_s, 4),
                gpu_peak_bytes=gpu_peak_bytes(),
                looked=looked,
                known=known or Known(),
            )
            self._fs.write_file(folder / RECEIPTS / receipt.file, receipt.to_bytes())
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if self.committed_name(header.step) is None:
                self._check_owner(header.step, error)
                if error.errno != errno.ENOENT:
                    raise
            return None
        self.estimate.add(
            written_bytes=written_bytes,
            state_bytes=snapshot.size_bytes,
            write_s=created - begun - look_s,
            whole_s=self._clock() - begun - look_s,
            look_s=look_s,
        )
        if rank == by:
            self._written[header.step] = (file, snapshot.pieces, image, written.checksums)
        return receipt

    def _make(self, path: Path) -> bool:
        """Make a folder; False if another rank was first."""
        try:
            self._fs.mkdir(path)
        except FileExistsError:
            return False
        return True

    def _write_shard(
        self, path: Path, snapshot: Snapshot, *, own: bool, only_changed: bool
    ) -> tuple[WrittenShard, Image, int, float]:
        """Write the whole shard, or what has changed of it.

        Returns how many bytes of tensors were written, too, and how long it took to find out which.
        """
        arena = None if snapshot.arena is None else snapshot.arena.bytes
        table = None
        look_s = 0.0
        base = self._base
        look = only_changed or (self._longest_chain > 0 and base is not None and self._looking.due())
        if own and look and base is not None and base.pieces is snapshot.pieces:
            begun = self._clock()
            changes = Changes.since(base, self._writer, snapshot.data, snapshot.cuts)
            table = changes.checksums
            look_s = self._clock() - begun
            self.last_changed_bytes = changes.changed_bytes
            worthwhile = only_changed or refer_to_older(
                changed_bytes=changes.changed_bytes,
                total_bytes=changes.total_bytes,
                estimate=self.estimate,
                chain=len(base.refers),
                longest_chain=self._longest_chain,
            )
            self._looking.found(worthwhile=changes.changed_bytes < changes.total_bytes // 2)
            if worthwhile:
                image, data = changes.shard(snapshot.data, snapshot.cuts)
                written = self._writer.write(path, image, data, table=table)
                return written, image, changes.changed_bytes, look_s
        written = self._writer.write(
            path, snapshot.image, snapshot.data, cuts=snapshot.cuts, table=table, arena=arena
        )
        return written, snapshot.image, snapshot.size_bytes, look_s

    def committed(self, step: int, name: str) -> None:
        """Take note that a checkpoint is committed: the next ones may refer to this rank's shard of it."""
        for earlier in [known for known in self._written if known < step]:
            del self._written[earlier]
        written = self._written.pop(step, None)
        if written is not None and self._longest_chain > 0:
            file, pieces, image, checksums = written
            # It may have been committed with what another rank wrote in our stead.
            if (self._run.checkpoints / name / file).exists():
                self._base = Base(checkpoint=name, file=file, pieces=pieces, image=image, checksums=checksums)

    def discard(self, step: int) -> None:
        """Remove what this rank has staged for a checkpoint that has failed; the last one removes the rest."""
        self._written.pop(step, None)
        folder = self.folder(step)
        ours = (f"rank-{self._rank:05d}-of-", f"{self._rank:05d}.")
        left = 0
        for place in (folder / SHARDS, folder / RECEIPTS):
            with contextlib.suppress(OSError):
                for name in self._fs.listdir(place):
                    if name.startswith(ours) or f".by-{self._rank:05d}." in name:
                        self._fs.unlink(place / name)
                    elif name != MANIFEST:
                        left += 1
        if not left:
            self._fs.remove_tree(folder)
        self._discarded[step] = self._discarded.get(step, 0) + 1

    def missing(self, step: int) -> list[int]:
        """Ranks of a staged checkpoint without a receipt; none if it is committed already.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        IntegrityError
            If it is gone without having been committed.
        """
        folder = self.folder(step)
        try:
            receipts = ranks_with_receipts(folder, self._fs)
            if not receipts:
                return [self._rank]
            first = Receipt.read(folder / RECEIPTS / next(iter(receipts.values())))
        except OSError as error:
            if error.errno not in _GONE:
                raise
            if self.committed_name(step) is not None:
                return []
            self._check_owner(step, error)
            raise IntegrityError(f"{folder}: is gone, and was not committed") from error
        return sorted(set(range(first.header.world_size)) - receipts.keys())

    def commit(self, step: int, *, take_over: bool = False) -> str | None:
        """Commit a checkpoint whose receipts are all there.

        Parameters
        ----------
        step
            Of the checkpoint.
        take_over
            Also if another rank has begun to: it seems to have died.

        Returns
        -------
        str or None
            Its name; None if another rank is just committing it.

        Raises
        ------
        FencedError
            If a later attempt owns the run; it finishes the commit in our stead.
        IntegrityError
            If the receipts do not belong together.
        OSError
            If the filesystem refuses.
        """
        try:
            manifest = finish_commit(self._run, self.folder(step), take_over=take_over, fs=self._fs)
        except (OSError, IntegrityError) as error:
            gone = isinstance(error, OSError) and error.errno in _GONE
            if not gone and not isinstance(error, IntegrityError):
                raise
            name = self.committed_name(step)
            if name is not None:  # another rank was faster
                make_durable(self._run, name, self._fs)
                return name
            self._check_owner(step, error)
            if not gone:
                raise
            return None
        self._healths[manifest.name] = manifest.health
        return manifest.name

    def health(self, name: str) -> Health:
        """Give what is known of the state in a checkpoint that this attempt has committed."""
        if name in self._healths:
            return self._healths.pop(name)
        try:
            return read_manifest(self._run.checkpoints / name).health
        except IntegrityError:
            return Health()

    def committed_name(self, step: int) -> str | None:
        """Name of the checkpoint that this attempt has committed for a step."""
        return committed_by(self._run, self._attempt, step)

    def _check_owner(self, step: int, error: Exception) -> None:
        """Raise if this attempt has been fenced off."""
        later = [number for number in self._run.attempt_numbers() if number > self._attempt]
        if not later and self.folder(step).parent.exists():
            return
        owner = f"attempt {later[-1]} has begun" if later else "its staging folder is gone"
        raise FencedError(
            f"{self._run.root}: attempt {self._attempt} can't commit step {step}: {owner}. "
            "Two jobs run in one run directory: cancel one, or give each its own run_dir"
        ) from error
