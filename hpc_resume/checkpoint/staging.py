"""One rank's side of a checkpoint that is being taken: its shard, its receipt, and the commit if it is the last."""

from __future__ import annotations

import time
from pathlib import Path

from hpc_resume.checkpoint.changes import Base, Changes
from hpc_resume.checkpoint.commit import STAGING, finish_commit, read_receipts
from hpc_resume.checkpoint.image import Image, Piece
from hpc_resume.checkpoint.index import MAX_FILES, shard_file
from hpc_resume.checkpoint.manifest import ShardRecord, read_manifest
from hpc_resume.checkpoint.receipt import Header, Receipt, carries_structure, objects_digest
from hpc_resume.checkpoint.shard import ShardWriter, WrittenShard
from hpc_resume.checkpoint.snapshot import Snapshot
from hpc_resume.errors import FencedError, IntegrityError
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.policy.saving import Estimate, Looking, refer_to_older
from hpc_resume.rundir import RunDirectory, checkpoint_step


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
        """Staging folder of one checkpoint."""
        return self._run.attempt(self._attempt) / STAGING / f"{step:010d}"

    def write(
        self, header: Header, snapshot: Snapshot, *, rank: int | None = None, only_changed: bool = False
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

        Returns
        -------
        Receipt or None
            None if the checkpoint was committed without this rank, which was slow and counted as dead.

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
            for path in (folder, folder / "shards", folder / "receipts"):
                try:
                    self._fs.mkdir(path)
                except FileExistsError:
                    continue  # another rank was first
            begun = self._clock()
            file = shard_file(rank, header.world_size, by=None if rank == by else by)
            path = folder / "shards" / file
            written, image, written_bytes = self._write_shard(
                path, snapshot, own=rank == by, only_changed=only_changed
            )
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
                write_s=round(created - begun, 4),
            )
            self._fs.write_file(folder / "receipts" / receipt.file, receipt.to_bytes())
        except FileNotFoundError as error:
            if self._own_commit(header.step) is not None:
                return None
            raise self._fenced(header.step) from error
        self.estimate.add(written_bytes=written_bytes, write_s=created - begun, whole_s=self._clock() - begun)
        if rank == by:
            self._written[header.step] = (file, snapshot.pieces, image, written.checksums)
        return receipt

    def _write_shard(
        self, path: Path, snapshot: Snapshot, *, own: bool, only_changed: bool
    ) -> tuple[WrittenShard, Image, int]:
        """Write the whole shard, or what has changed of it; returns how many bytes of tensors were written."""
        arena = None
        if snapshot.arena is not None:
            snapshot.arena.wait()
            arena = snapshot.arena.bytes
        table = None
        base = self._base
        look = only_changed or (self._longest_chain > 0 and base is not None and self._looking.due())
        if own and look and base is not None and base.pieces is snapshot.pieces:
            changes = Changes.since(base, self._writer, snapshot.data, snapshot.cuts)
            table = changes.checksums
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
                return self._writer.write(path, image, data, table=table), image, changes.changed_bytes
        written = self._writer.write(
            path, snapshot.image, snapshot.data, cuts=snapshot.cuts, table=table, arena=arena
        )
        return written, snapshot.image, snapshot.size_bytes

    def committed(self, step: int, name: str) -> None:
        """Take note that a checkpoint is committed: the next ones may refer to this rank's shard of it."""
        for earlier in [known for known in self._written if known < step]:
            del self._written[earlier]
        written = self._written.pop(step, None)
        if written is not None and self._longest_chain > 0:
            file, pieces, image, checksums = written
            self._base = Base(checkpoint=name, file=file, pieces=pieces, image=image, checksums=checksums)

    def missing(self, step: int) -> list[int]:
        """Ranks of a staged checkpoint without a receipt; none if it is committed already.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        """
        try:
            receipts = read_receipts(self.folder(step), self._fs)
        except FileNotFoundError as error:
            if self._own_commit(step) is not None:
                return []
            raise self._fenced(step) from error
        if not receipts:
            return [self._rank]
        world_size = next(iter(receipts.values())).header.world_size
        return sorted(set(range(world_size)) - receipts.keys())

    def commit(self, step: int) -> str:
        """Commit a checkpoint whose receipts are all there.

        Returns
        -------
        str
            Its name.

        Raises
        ------
        FencedError
            If a later attempt owns the run; it finishes the commit in our stead.
        IntegrityError
            If the receipts do not belong together.
        """
        try:
            return finish_commit(self._run, self.folder(step), fs=self._fs)
        except FileNotFoundError as error:
            name = self._own_commit(step)
            if name is None:
                raise self._fenced(step) from error
            return name  # another rank was faster

    def _own_commit(self, step: int) -> str | None:
        """Name of the checkpoint that this attempt has committed for a step."""
        for name in self._run.checkpoint_names():
            if checkpoint_step(name) == step:
                try:
                    manifest = read_manifest(self._run.checkpoints / name)
                except IntegrityError:
                    continue
                if manifest.attempt == self._attempt:
                    return name
        return None

    def _fenced(self, step: int) -> FencedError:
        later = [number for number in self._run.attempt_numbers() if number > self._attempt]
        owner = f"attempt {later[-1]} has begun" if later else "its staging folder is gone"
        return FencedError(
            f"{self._run.root}: attempt {self._attempt} can't commit step {step}: {owner}. "
            "Two jobs run in one run directory: cancel one, or give each its own run_dir"
        )
