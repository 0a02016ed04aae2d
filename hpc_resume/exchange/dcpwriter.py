"""For ``torch.distributed.checkpoint``: the StorageWriter of this format.

DCP plans and gathers as it always does; what it lets the storage decide is ours: each rank writes one HDF5 shard
with an index and checksums, and the coordinator commits with one manifest. ``checkpoint_id`` is a run's folder.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    Metadata,
    SavePlan,
    SavePlanner,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import STAGING, claim_attempt, parent_of, publish
from hpc_resume.checkpoint.image import Image, Piece, full_image
from hpc_resume.checkpoint.index import shard_file
from hpc_resume.checkpoint.manifest import FULL, Manifest, ShardRecord
from hpc_resume.checkpoint.saved import load_saved
from hpc_resume.checkpoint.shard import ShardWriter, WrittenShard
from hpc_resume.checkpoint.snapshot import bytes_of
from hpc_resume.checkpoint.stream import write_streamed
from hpc_resume.errors import FencedError, StateError, UsageError
from hpc_resume.exchange.dcpstate import Stored, gathered, name_of
from hpc_resume.provenance.environment import describe_environment, essentials
from hpc_resume.rundir import RunDirectory, checkpoint_step

REASON = "dcp"
#: A saved object up to this size stands in the manifest, if JSON can say what it is.
_MANIFEST_BYTES = 64 * 1024
#: In a folder's name: step-100, epoch=2-step=100, 100; but not run-7.
_STEP = re.compile(r"step[-_=]?(\d+)|^(\d+)$")
#: Attempts that this process has begun, by run folder: however many writers there are, they are one owner.
_CLAIMED: dict[Path, int] = {}


@dataclass(frozen=True, slots=True)
class _Save:
    """What the coordinator tells the ranks of a save."""

    folder: str
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells the coordinator of its shard."""

    shard: ShardRecord
    written_bytes: int
    write_s: float


class DcpWriter(StorageWriter, BlockingAsyncStager):
    """Lets ``torch.distributed.checkpoint.save`` and ``async_save`` write checkpoints of this format.

    Every save adds one committed checkpoint to the folder; none is overwritten.

    Parameters
    ----------
    path
        A folder of its own: that of a run which ``hr.Run`` trains is refused. A ``checkpoint_id`` that is given
        to ``save`` takes its place.
    step
        Of the next save. Without it: the number in the folder's name if it says so (``step-100``, ``100``), else one
        more than that of the newest checkpoint.
    threads
        That write.

    Examples
    --------
    >>> import torch.distributed.checkpoint as dcp
    >>> dcp.save({"model": model.state_dict()}, storage_writer=hr.DcpWriter("ckpts", step=100))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], *, step: int | None = None, threads: int = 2) -> None:
        BlockingAsyncStager.__init__(self)
        self._path = Path(path).absolute()
        self._step = step
        self._threads = threads
        self._folder: Path | None = None
        self._layout: tuple[tuple[Piece, ...], Image] | None = None
        #: Name of the checkpoint that was committed last, on the coordinator.
        self.committed: str | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return "://" not in str(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """Return what planners are told."""
        return StorageMeta(checkpoint_id=self._path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save."""
        if checkpoint_id:
            self._path = Path(checkpoint_id).absolute()

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Begin a save; see the base class.

        Raises
        ------
        UsageError
            If ranks shall save without each other: then nobody could commit.
        """
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "DcpWriter: use_collectives=False leaves nobody to commit; save with collectives"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide where the ranks write; on the coordinator.

        Raises
        ------
        UsageError
            If the folder is that of a run of ``hr.Run``.
        FencedError
            If another process writes there by now.
        """
        run = RunDirectory(self._path)
        run.create(self._path.name)
        if any((run.attempt(number) / "attempt.json").exists() for number in run.attempt_numbers()):
            raise UsageError(
                f"{self._path}: is the folder of a run of hr.Run, which saves by itself and must be the only one; "
                "give DcpWriter a folder of its own"
            )
        attempt = _claim(run)
        if self._folder is not None:  # of a save that failed
            shutil.rmtree(self._folder, ignore_errors=True)
        step = self._choose_step(run)
        self._folder = run.attempt(attempt) / STAGING / f"{step:010d}-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir()
        (self._folder / "shards").mkdir()
        return [
            replace(plan, storage_data=_Save(str(self._folder), rank, len(plans)))
            for rank, plan in enumerate(plans)
        ]

    def _choose_step(self, run: RunDirectory) -> int:
        if self._step is not None:
            step, self._step = self._step, None
            return step
        if (found := _STEP.search(self._path.name)) is not None:
            return int(found[1] or found[2])
        names = run.checkpoint_names()
        return checkpoint_step(names[-1]) + 1 if names else 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard; see the base class.

        Raises
        ------
        StateError
            If something can't be stored so that loading it runs no code; names it.
        FencedError
            If another process writes there by now.
        """
        save = plan.storage_data
        if getattr(planner, "_enable_plan_caching", False) or not isinstance(save, _Save):
            raise UsageError(
                "DcpWriter: a planner that caches plans keeps from the ranks where to write: "
                "use DefaultSavePlanner(enable_plan_caching=False)"
            )
        paths = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
        results, pieces, sources = [], [], []
        for item in plan.items:
            name = name_of(paths.get(item.index.fqn, (item.index.fqn,)))
            stored, source = _stored(item, planner)
            results.append(WriteResult(index=item.index, size_in_bytes=0, storage_data=stored))
            if stored.box is not None and stored.box.volume:
                pieces.append(Piece(name, stored.dtype, stored.shape, stored.box))
                sources.append(source)
        begun = time.time()
        file = shard_file(save.rank, save.world_size)
        try:
            written = self._write(Path(save.folder) / "shards" / file, tuple(pieces), sources, planner)
        except FileNotFoundError as error:
            raise _fenced(self._path) from error
        record = ShardRecord(
            file=file,
            rank=save.rank,
            node=os.uname().nodename,
            size_bytes=written.size_bytes,
            index=written.index,
            table=written.table,
            digest=written.digest,
            rest=written.rest,
        )
        told = _Written(record, sum(piece.length for piece in pieces), round(time.time() - begun, 4))
        results.append(
            WriteResult(index=MetadataIndex(""), size_in_bytes=told.written_bytes, storage_data=told)
        )
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(
        self,
        path: Path,
        pieces: tuple[Piece, ...],
        sources: list[torch.Tensor | WriteItem],
        planner: SavePlanner,
    ) -> WrittenShard:
        """Write tensors on the CPU as they are; what lies on a GPU comes over one by one."""

        def load(number: int) -> torch.Tensor:
            source = sources[number]
            tensor = source if isinstance(source, torch.Tensor) else planner.resolve_data(source)
            assert isinstance(tensor, torch.Tensor)
            if (
                dtypes.name_of(tensor.dtype) != pieces[number].dtype
                or tuple(tensor.shape) != pieces[number].box.size
            ):
                raise StateError(
                    f"{pieces[number].name}: {tensor.dtype} {list(tensor.shape)} in place of "
                    f"{pieces[number].dtype} {list(pieces[number].box.size)}, as the planner had announced"
                )
            return tensor.detach()

        first = load(0) if pieces else None
        if first is not None and first.device.type != "cpu":
            return write_streamed(path, pieces, load, threads=self._threads)
        if self._layout is None or self._layout[0] != pieces:
            self._layout = pieces, full_image(pieces)
        data = [bytes_of(load(number)) for number in range(len(pieces))]
        writer = ShardWriter(threads=self._threads)
        try:
            return writer.write(path, self._layout[1], data, cuts=[piece.cut for piece in pieces])
        finally:
            writer.close()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit; on the coordinator, when all ranks have written.

        Raises
        ------
        FencedError
            If another process writes there by now.
        """
        assert self._folder is not None
        run = RunDirectory(self._path)
        attempt = int(self._folder.parent.parent.name)
        step = int(self._folder.name.partition("-")[0])
        structure, tree = gathered(metadata, results)
        told = [
            each.storage_data for rank in results for each in rank if isinstance(each.storage_data, _Written)
        ]
        manifest = Manifest(
            run_id=run.identity()["run_id"],
            attempt=attempt,
            step=step,
            samples=0,
            reason=REASON,
            content=FULL,
            note="",
            parent=parent_of(run, step),
            refers=(),
            created=time.time(),
            world_size=len(results),
            shards=tuple(sorted((each.shard for each in told), key=lambda shard: shard.rank)),
            structure=structure,
            objects=tree,
            differing_ranks=(),
            missing_ranks=(),
            node_type=None,
            config=None,
            environment=essentials(describe_environment()),
            costs={
                "write_s": max(each.write_s for each in told),
                "state_bytes": sum(each.written_bytes for each in told),
                "written_bytes": sum(each.written_bytes for each in told),
            },
        )
        try:
            self.committed = publish(run, self._folder, manifest)
        except FileNotFoundError as error:
            raise _fenced(self._path) from error
        self._folder = None


def _stored(item: WriteItem, planner: SavePlanner) -> tuple[Stored, torch.Tensor | WriteItem]:
    """Say what of an item is stored, and give its bytes or the item that they come from."""
    if item.type != WriteItemType.BYTE_IO:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        spelled = dtypes.name_of(item.tensor_data.properties.dtype)
        return Stored(spelled, tuple(item.tensor_data.size), box), item
    resolved_bytes = planner.resolve_data(item)
    assert isinstance(resolved_bytes, io.BytesIO)
    data = resolved_bytes.getvalue()
    try:
        value = load_saved(data)
    except StateError as error:
        raise StateError(
            f"{item.index.fqn}: {error}; save numbers, strings, containers and tensors"
        ) from error
    if len(data) <= _MANIFEST_BYTES:
        try:
            return Stored("", (), None, objects.encode(value, (item.index.fqn,))), item
        except StateError:
            pass  # tensors within tuples, say
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return Stored("uint8", tuple(raw.shape), Box.whole(raw.shape)), raw


def _claim(run: RunDirectory) -> int:
    """Begin an attempt, or go on with the one that this process has begun."""
    attempt = _CLAIMED.get(run.root)
    if attempt is not None and (run.attempt(attempt) / STAGING).is_dir():
        return attempt
    if attempt is not None and max(run.attempt_numbers(), default=0) > attempt:
        raise _fenced(run.root)
    _CLAIMED[run.root] = claim_attempt(run)
    return _CLAIMED[run.root]


def _fenced(path: Path) -> FencedError:
    return FencedError(
        f"{path}: another process has begun to write there, so this one may commit nothing more; "
        "give each its own folder"
    )
