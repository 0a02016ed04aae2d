"""The raw limits: the same bytes by the plainest system calls, and memcpy."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

_CHUNK_BYTES = 8 << 20


class Raw:
    """Writes and reads a file of some bytes with several threads.

    Parameters
    ----------
    folder
        Where the file goes.
    size_bytes
        Of the file.
    threads
        That write, copy and read.
    """

    def __init__(self, folder: Path, size_bytes: int, *, threads: int = 2) -> None:
        self._path = folder / "raw.bin"
        self._size = -(-size_bytes // 4096) * 4096
        self._pool = ThreadPoolExecutor(threads)
        memory = mmap.mmap(-1, self._size)
        np.frombuffer(memory, np.uint8)[:] = 1  # the pages are there
        self._memory = memoryview(memory)
        self._spans = [
            (begin, min(begin + _CHUNK_BYTES, self._size)) for begin in range(0, self._size, _CHUNK_BYTES)
        ]

    def write(self, *, direct: bool) -> float:
        """Seconds of ``pwrite`` and ``fsync``."""
        begin = time.perf_counter()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
        fd = os.open(self._path, flags)
        list(
            self._pool.map(lambda span: os.pwrite(fd, self._memory[span[0] : span[1]], span[0]), self._spans)
        )
        os.fsync(fd)
        os.close(fd)
        taken = time.perf_counter() - begin
        self._path.unlink()
        return taken

    def read(self, path: Path, into: list[torch.Tensor]) -> float:
        """Seconds of ``preadv`` of a file's bytes, end to end, into tensors."""
        jobs, offset = [], 0
        for tensor in into:
            data = tensor.view(-1).view(torch.uint8).numpy().data
            jobs += [
                (data[begin : begin + _CHUNK_BYTES], offset + begin)
                for begin in range(0, len(data), _CHUNK_BYTES)
            ]
            offset += len(data)
        begin = time.perf_counter()
        fd = os.open(path, os.O_RDONLY)
        list(self._pool.map(lambda job: os.preadv(fd, [job[0]], job[1]), jobs))
        os.close(fd)
        return time.perf_counter() - begin

    def copy(self, sources: list[torch.Tensor]) -> float:
        """Seconds of ``memcpy`` of tensors into memory that is there already."""
        target = np.frombuffer(self._memory, np.uint8)
        jobs, offset = [], 0
        for tensor in sources:
            data = tensor.view(-1).view(torch.uint8).numpy()
            for begin in range(0, len(data), _CHUNK_BYTES):
                part = data[begin : begin + _CHUNK_BYTES]
                jobs.append((target[offset : offset + len(part)], part))
                offset += len(part)
        begin = time.perf_counter()
        list(self._pool.map(lambda job: np.copyto(*job), jobs))
        return time.perf_counter() - begin
