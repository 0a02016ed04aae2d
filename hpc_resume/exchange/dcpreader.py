"""For ``torch.distributed.checkpoint``: the StorageReader of this format."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from hpc_resume.checkpoint import objects
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.reader import Wanted
from hpc_resume.exchange.standins import StandIns


class DcpReader(StorageReader):
    """Lets ``torch.distributed.checkpoint.load`` read checkpoints of this format, whoever wrote them.

    Every byte is verified. Saved objects are loaded with ``weights_only=True``; what DCP's planner unpickles are
    bytes that this process has just written.

    Parameters
    ----------
    path
        A run's folder, or that of one checkpoint. A ``checkpoint_id`` that is given to ``load`` takes its place.
    step
        Which checkpoint; by default the newest full one.
    threads
        That read.

    Examples
    --------
    >>> import torch.distributed.checkpoint as dcp
    >>> state = {"model": model.state_dict()}  # doctest: +SKIP
    >>> dcp.load(state, storage_reader=hr.DcpReader("runs/gpt"))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str], *, step: int | None = None, threads: int = 2) -> None:
        super().__init__()
        self._path = Path(path).absolute()
        self._step = step
        self._threads = threads
        self._ckpt: Checkpoint | None = None
        self._stand_ins: StandIns | None = None
        self._values: dict[str, Any] = {}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin to read another checkpoint."""
        if checkpoint_id:
            self._path = Path(checkpoint_id).absolute()
        self._close()

    def _close(self) -> None:
        if self._ckpt is not None:
            self._ckpt.close()
            self._ckpt = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read what is in the checkpoint, by DCP's names.

        Raises
        ------
        CheckpointNotFound
            If there is none.
        IntegrityError
            If it is damaged.
        """
        self._close()
        self._ckpt = Checkpoint(self._path, step=self._step, threads=self._threads)
        stand_ins = self._stand_ins = StandIns(self._ckpt.record)
        planner = DefaultSavePlanner()  # takes a state apart as DCP does when it saves one
        planner.set_up_planner(objects.decode(self._ckpt.manifest.objects, stand_ins.get))
        self._values = planner.state_dict
        entries: dict[str, Any] = {}
        for fqn, value in planner.state_dict.items():
            name = stand_ins.name_of(value)
            if name is None:
                entries[fqn] = BytesStorageMetadata()
                continue
            shape = self._ckpt.record(name).shape
            # One chunk, whatever the shards are: the reader itself finds what it needs of them.
            entries[fqn] = TensorStorageMetadata(
                properties=TensorProperties(dtype=value.dtype),
                size=torch.Size(shape),
                chunks=[ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))],
            )
        return Metadata(
            state_dict_metadata=entries,
            planner_data=planner.mappings,
            storage_data={},
            storage_meta=StorageMeta(checkpoint_id=self._path),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Do nothing; see the base class."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read this rank's part; see the base class.

        Raises
        ------
        IntegrityError
            If bytes are damaged.
        """
        ckpt, stand_ins = self._ckpt, self._stand_ins
        assert ckpt is not None
        assert stand_ins is not None
        wanted, targets = [], []
        for item in plan.items:
            fqn = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                data = io.BytesIO()
                torch.save(stand_ins.resolve(self._values[fqn], ckpt.__getitem__), data)
                data.seek(0)
                planner.load_bytes(item, data)
                continue
            target = planner.resolve_tensor(item).detach()
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            name = stand_ins.name_of(self._values[fqn])
            assert name is not None
            wanted.append(Wanted(ckpt.stored_as(name), box, target))
            targets.append((item, target))
        with torch.no_grad():
            ckpt.reader.read_all(wanted)
        for item, target in targets:
            planner.commit_tensor(item, target)
        self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future
