"""Reading boxes out of a committed checkpoint: wanted boxes x saved boxes = byte runs, each verified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.manifest import BLOCK_BYTES, Manifest, StoredBox
from hpc_resume.checkpoint.shard import read_blocks
from hpc_resume.errors import IntegrityError

if TYPE_CHECKING:
    import torch


class CheckpointReader:
    """Reads tensors of one checkpoint; every byte that it hands out has been verified.

    Parameters
    ----------
    folder
        The checkpoint.
    manifest
        Its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._fds: dict[int, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read(self, name: str, want: Box, out: torch.Tensor) -> None:
        """Fill ``out`` with a box of a tensor.

        Parameters
        ----------
        name
            Of the tensor, as in the manifest.
        want
            The box.
        out
            Its shape is the box's size, its type the tensor's; on any device, of any strides.

        Raises
        ------
        IntegrityError
            If bytes are damaged or missing; ``out`` is then undefined.
        """
        tensor = self.manifest.tensors[name]
        if tuple(out.shape) != want.size or dtypes.name_of(out.dtype) != tensor.dtype:
            raise ValueError(f"{name}: {tuple(out.shape)} of {out.dtype} for {want.size} of {tensor.dtype}")
        for stored in tensor.boxes:
            part = stored.box.intersect(want)
            if part is not None:
                try:
                    self._copy(stored, part, want, out)
                except (IntegrityError, OSError) as error:
                    file = self.folder / self.manifest.shards[stored.shard].file
                    raise IntegrityError(f"{file}: {name}: {error}") from error

    def _copy(self, stored: StoredBox, part: Box, want: Box, out: torch.Tensor) -> None:
        import torch

        if part == stored.box == want and out.is_contiguous() and out.device.type == "cpu":
            self._read(stored, 0, _bytes_of(out))
            return
        item = out.element_size()
        first, stop = part.element_range_in(stored.box)
        block = first * item // BLOCK_BYTES
        low = block * BLOCK_BYTES
        high = min(-(-stop * item // BLOCK_BYTES) * BLOCK_BYTES, stored.length)
        raw = torch.empty(high - low, dtype=torch.uint8)
        self._read(stored, block, _bytes_of(raw))
        # The range holds the part in whole rows of the first dimension that the part is cut in; view the
        # stored box around it without reading the rest: an index into strides computed from the box.
        strides = _strides(stored.box.size)
        elements = raw[first * item - low : stop * item - low].clone().view(out.dtype)
        source = torch.as_strided(elements, part.size, strides)
        out[part.slices_in(want)].copy_(source)

    def _read(self, stored: StoredBox, first_block: int, into: memoryview) -> None:
        read_blocks(
            self._open(stored.shard), stored.offset, stored.length, stored.checksums, first_block, into
        )
        self.bytes_read += len(into)

    def _open(self, shard: int) -> int:
        if shard not in self._fds:
            path = self.folder / self.manifest.shards[shard].file
            self._fds[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._fds[shard]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(size)
    for index in range(len(size) - 2, -1, -1):
        strides[index] = strides[index + 1] * size[index + 1]
    return tuple(strides)
