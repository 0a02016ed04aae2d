"""The staging area: host memory that is laid out as a shard's file, allocated once and kept.

A snapshot copies the live tensors to their places in it and lets training go on; the writer then hands it to
the disk as it is. Fresh memory is what makes snapshots slow (measured: 10 to 20 times a copy into memory that
is mapped already), so the area is touched once and stays.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hpc_resume.checkpoint.dtypes import torch_dtype
from hpc_resume.checkpoint.hashing import Bytes
from hpc_resume.checkpoint.image import ALIGN_BYTES, Image, Piece

#: Larger tensors are copied by several threads, in parts of this size.
_PART_BYTES = 4 << 20

#: Place in the staging area, and the live tensor.
_Pair = tuple[torch.Tensor, torch.Tensor]


class Arena:
    """Memory for the image of one shard.

    Parameters
    ----------
    image, pieces
        The file and what it holds.
    threads
        That copy.
    pinned
        Page-locked, for tensors on a GPU.
    """

    def __init__(self, image: Image, pieces: Sequence[Piece], *, threads: int, pinned: bool) -> None:
        self.image = image
        self.pieces = pieces
        self.pinned = pinned
        self.size_bytes = -(-image.size_bytes // ALIGN_BYTES) * ALIGN_BYTES
        if pinned:
            self._memory = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=True)
        else:
            pages = mmap.mmap(-1, self.size_bytes)
            with contextlib.suppress(AttributeError, OSError):  # old kernels
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        self.bytes: Bytes = self._memory.numpy()
        self._threads = max(threads, 1)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="hpc-resume-stage")
        self._touch()
        for at, content in image.segments:
            self.bytes[at : at + len(content)] = np.frombuffer(content, np.uint8)
        self.data: tuple[Bytes, ...] = tuple(self.bytes[at : at + length] for at, length in image.data)
        self._large = [length >= _PART_BYTES // 4 for _, length in image.data]
        self._views = self._typed()
        self._events: list[torch.cuda.Event] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def _touch(self) -> None:
        step = -(-self.size_bytes // self._threads)
        parts = [self.bytes[begin : begin + step] for begin in range(0, self.size_bytes, step)]
        list(self._pool.map(lambda part: part.fill(0), parts))

    def _typed(self) -> list[torch.Tensor]:
        """Each piece's place as a tensor of its shape and type."""
        views = []
        for piece, (at, length) in zip(self.pieces, self.image.data, strict=True):
            raw = self._memory[at : at + length].view(torch_dtype(piece.dtype))
            views.append(raw.view(piece.box.size))
        return views

    def stage(self, sources: Sequence[torch.Tensor]) -> None:
        """Copy the tensors to their places.

        On return the tensors may be changed: those on the CPU have been copied, and work that is queued on
        a GPU from now on waits there for the copies. :meth:`wait` tells when all bytes have arrived.

        Parameters
        ----------
        sources
            One for each piece, of its shape and type.
        """
        large: list[tuple[Bytes, Bytes]] = []
        small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        remote: dict[torch.device, list[_Pair]] = {}
        for number, source in enumerate(sources):
            if not source.is_cpu:
                remote.setdefault(source.device, []).append((self._views[number], source))
            elif self._large[number] and source.is_contiguous():
                flat = source.reshape(-1).view(torch.uint8).numpy()
                target = self.data[number]
                large += [
                    (target[begin : begin + _PART_BYTES], flat[begin : begin + _PART_BYTES])
                    for begin in range(0, len(target), _PART_BYTES)
                ]
            else:
                small[0].append(self._views[number])
                small[1].append(source)
        self._events = [self._copy_from_gpu(device, pairs) for device, pairs in remote.items()]
        copies = self._pool.map(lambda pair: np.copyto(*pair), large)
        if small[0]:
            with torch.no_grad():
                torch._foreach_copy_(small[0], small[1])
        for _ in copies:
            pass

    def _copy_from_gpu(self, device: torch.device, pairs: Sequence[_Pair]) -> torch.cuda.Event:
        """Queue copies on a stream of their own, behind what is queued already and before what comes."""
        current = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.no_grad():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                source.record_stream(stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        current.wait_event(event)
        return event

    def wait(self) -> None:
        """Wait until copies from GPUs have arrived."""
        for event in self._events:
            event.synchronize()

    def close(self) -> None:
        """End the threads; the memory goes when nobody holds it any more."""
        self._pool.shutdown()
