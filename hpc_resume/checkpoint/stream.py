"""Writing a shard tensor by tensor: what does not fit into memory together, or is not there yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import xxhash

from hpc_resume.checkpoint.blocks import count_checksums
from hpc_resume.checkpoint.dtypes import name_of
from hpc_resume.checkpoint.image import Piece, full_image
from hpc_resume.checkpoint.shard import WrittenShard
from hpc_resume.checkpoint.snapshot import bytes_of
from hpc_resume.errors import StateError
from hpc_resume.files import DISK, Filesystem


def write_streamed(
    path: Path,
    pieces: Sequence[Piece],
    load: Callable[[int], torch.Tensor],
    *,
    threads: int = 2,
    fs: Filesystem = DISK,
) -> WrittenShard:
    """Write a shard, durable on return; holds as many tensors at a time as there are threads.

    Parameters
    ----------
    path
        The file; written under a temporary name beside it and renamed.
    pieces
        What it holds; none of them empty.
    load
        Gives the values of a piece by its number; called by several threads.
    threads
        That load, hash and write.
    fs
        The filesystem.

    Raises
    ------
    StateError
        If what is loaded is not what a piece says.
    OSError
        If the filesystem refuses; ``path`` then does not exist.
    """
    image = full_image(pieces)
    table = np.zeros(image.table[1] // 8, dtype=np.uint64)
    first = [0]
    for piece in pieces:
        first.append(first[-1] + count_checksums(piece.cut))

    def work(fd: int, number: int) -> None:
        piece, tensor = pieces[number], load(number)
        if tuple(tensor.shape) != piece.box.size or name_of(tensor.dtype) != piece.dtype:
            raise StateError(
                f"{piece.name}: {name_of(tensor.dtype)} {list(tensor.shape)}, but {piece.dtype} "
                f"{list(piece.box.size)} was announced"
            )
        data = bytes_of(tensor).data
        spans = chain.from_iterable(map(pairwise, piece.cut))  # the blocks, then the segments
        for place, (low, high) in enumerate(spans, first[number]):
            table[place] = xxhash.xxh3_64_intdigest(data[low:high])
        fs.write_all(fd, data, image.data[number][0])

    with fs.replacing(path, os.O_RDWR) as fd:
        fs.truncate(fd, image.size_bytes)
        with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="hpc-resume-stream") as pool:
            for _ in pool.map(partial(work, fd), range(len(pieces))):
                pass
        checksums = table.tobytes()
        fs.write_all(fd, checksums, image.table[0])
        for at, content in image.segments:
            fs.write_all(fd, content, at)
    return WrittenShard.of(image, checksums)
