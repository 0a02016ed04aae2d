"""torch.distributed.checkpoint, driven as its documentation says, with fsync."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

warnings.filterwarnings("ignore", module="torch.distributed")


class Dcp:
    """One rank's saves and loads.

    Parameters
    ----------
    folder
        Where checkpoints go, each in a new subfolder.
    state
        What is saved.
    threads
        Of its writer.
    leader
        Whether this rank removes what is not needed any more.
    """

    def __init__(self, folder: Path, state: dict[str, Any], *, threads: int, leader: bool = True) -> None:
        self._folder = folder
        self._state = state
        self._threads = threads
        self._leader = leader
        self._turn = 0
        self._stager: DefaultStager | None = None

    def path(self) -> Path:
        """Folder of the newest checkpoint."""
        return self._folder / f"dcp-{self._turn}"

    def save(self) -> None:
        """Save synchronously."""
        self._turn += 1
        writer = dcp.FileSystemWriter(self.path(), sync_files=True, thread_count=self._threads)
        dcp.save(self._state, storage_writer=writer)

    def timed_save(self) -> float:
        """Seconds of a synchronous save."""
        begin = time.perf_counter()
        self.save()
        taken = time.perf_counter() - begin
        self.clear()
        return taken

    def timed_async_save(self, mode: str) -> tuple[float, float]:
        """Seconds that an async save blocks, and until it is durable.

        Parameters
        ----------
        mode
            ``"thread"`` or ``"process"`` (with shared memory), both with a stager that is kept.
        """
        self._turn += 1
        if self._stager is None:
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=mode == "process",
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
            self._stager = DefaultStager(options)
        kind = AsyncCheckpointerType.PROCESS if mode == "process" else AsyncCheckpointerType.THREAD
        writer = dcp.FileSystemWriter(self.path(), sync_files=True, thread_count=self._threads)
        begin = time.perf_counter()
        response = dcp.async_save(
            self._state, storage_writer=writer, async_checkpointer_type=kind, async_stager=self._stager
        )
        blocked = time.perf_counter() - begin
        future: Any = getattr(response, "upload_completion", response)
        future.result()
        taken = time.perf_counter() - begin
        self.clear()
        return blocked, taken

    def load(self, into: dict[str, Any], path: Path | None = None) -> float:
        """Seconds of a load into tensors."""
        begin = time.perf_counter()
        dcp.load(into, storage_reader=dcp.FileSystemReader(path or self.path()))
        return time.perf_counter() - begin

    def clear(self) -> None:
        """Remove the newest checkpoint."""
        if self._leader:
            shutil.rmtree(self.path(), ignore_errors=True)
