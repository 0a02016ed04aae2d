"""The manifest: the one file that says what a checkpoint is.

A manifest that contradicts itself cannot be constructed, and one that exists cannot be changed. The file is
canonical JSON: writing what was read gives the same bytes, so any flipped bit in it shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.dtypes import item_bytes
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import checkpoint_name

SCHEMA = 1
MANIFEST = "manifest.json"
#: Bytes under one checksum. Source: measured; a megabyte is still in the cache when it is hashed.
BLOCK_BYTES = 1 << 20
_SHARD_FILE = re.compile(r"rank-\d{5,}-of-\d{5,}\.h5")
_CHECKSUM = re.compile(r"(?:[0-9a-f]{16})*")


def shard_file(rank: int, world_size: int) -> str:
    """File name of one rank's shard."""
    return f"rank-{rank:05d}-of-{world_size:05d}.h5"


def block_count(length: int) -> int:
    """Return the number of checksums over ``length`` bytes."""
    return -(-length // BLOCK_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBox:
    """Where the bytes of one box lie.

    Parameters
    ----------
    shard
        Index into the manifest's shards.
    box
        Which piece of the tensor it is.
    offset, length
        Bytes in the shard file; elements in C order, little-endian.
    checksums
        xxh3-64 of each :data:`BLOCK_BYTES`, 16 hex digits each, end to end.
    """

    shard: int
    box: Box
    offset: int
    length: int
    checksums: str

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0 or self.shard < 0:
            raise IntegrityError(f"a box at offset {self.offset} with {self.length} bytes")
        if not _CHECKSUM.fullmatch(self.checksums) or len(self.checksums) != 16 * block_count(self.length):
            raise IntegrityError(
                f"a box of {self.length} bytes must have {block_count(self.length)} checksums"
            )

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {
            "shard": self.shard,
            "start": list(self.box.start),
            "size": list(self.box.size),
            "offset": self.offset,
            "length": self.length,
            "checksums": self.checksums,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StoredBox:
        """From JSON; see :meth:`to_json`."""
        box = Box(_integers(record["start"]), _integers(record["size"]))
        return cls(
            shard=_integer(record["shard"]),
            box=box,
            offset=_integer(record["offset"]),
            length=_integer(record["length"]),
            checksums=_string(record["checksums"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """One global tensor: shape, element type, and the boxes that tile it."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[StoredBox, ...]

    def __post_init__(self) -> None:
        size = item_bytes(self.dtype)
        if any(stored.length != stored.box.volume * size for stored in self.boxes):
            raise IntegrityError("a box's length in bytes is not its volume times its element's size")
        if not covers_once(self.shape, [stored.box for stored in self.boxes]):
            raise IntegrityError(f"the boxes do not tile a tensor of shape {list(self.shape)} exactly once")

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One shard file: its size, and a checksum over every byte of it that belongs to no box."""

    file: str
    rank: int
    node: str
    size_bytes: int
    rest: str

    def __post_init__(self) -> None:
        if not _SHARD_FILE.fullmatch(self.file):
            raise IntegrityError(f"{self.file!r} is no name of a shard")
        if self.size_bytes < 0 or not re.fullmatch(r"[0-9a-f]{16}", self.rest):
            raise IntegrityError(f"{self.file}: size or checksum is malformed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is.

    Parameters
    ----------
    run_id, attempt
        Who wrote it.
    step
        Completed steps.
    samples
        Samples consumed, over all ranks.
    reason
        Why it was taken: ``cadence``, ``stop``, ``done``.
    parent
        Name of the checkpoint before it in this run, or None.
    created
        Unix time in seconds.
    world_size
        Ranks that wrote it.
    shards, tensors
        The bytes.
    objects
        The non-tensor state as typed JSON.
    differing_ranks
        Ranks whose non-tensor state was not rank 0's; theirs lies in their shards.
    node_type, config, environment, costs
        Where it was written, with which resolved configuration, in which environment; measured seconds and
        bytes.
    """

    run_id: str
    attempt: int
    step: int
    samples: int
    reason: str
    parent: str | None
    created: float
    world_size: int
    shards: tuple[ShardRecord, ...]
    tensors: Mapping[str, TensorRecord]
    objects: Any
    differing_ranks: tuple[int, ...]
    node_type: str | None
    config: str | None
    environment: JsonObject
    costs: JsonObject

    def __post_init__(self) -> None:
        if self.step < 0 or self.samples < 0 or self.attempt < 0 or self.world_size < 1:
            raise IntegrityError(f"step {self.step}, samples {self.samples}, world size {self.world_size}")
        if len(self.shards) != self.world_size:
            raise IntegrityError(f"{len(self.shards)} shards for {self.world_size} ranks")
        for rank, shard in enumerate(self.shards):
            if shard.rank != rank or shard.file != shard_file(rank, self.world_size):
                raise IntegrityError(
                    f"shard {rank} of {self.world_size} is {shard.file} of rank {shard.rank}"
                )
        for name, tensor in self.tensors.items():
            for stored in tensor.boxes:
                if stored.shard >= len(self.shards):
                    raise IntegrityError(f"{name}: shard {stored.shard} of {len(self.shards)}")
                if stored.offset + stored.length > self.shards[stored.shard].size_bytes:
                    raise IntegrityError(f"{name}: a box ends after its shard does")

    @property
    def content_id(self) -> str:
        """32 hex digits of SHA-256 over everything else."""
        return hashlib.sha256(_canonical(self._body())).hexdigest()[:32]

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return checkpoint_name(self.step, self.content_id)

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return the canonical file content."""
        body = self._body()
        return _canonical({"schema": SCHEMA, "content_id": self.content_id, **body})

    def _body(self) -> JsonObject:
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        body["differing_ranks"] = list(self.differing_ranks)
        body["shards"] = [
            {"file": s.file, "rank": s.rank, "node": s.node, "size_bytes": s.size_bytes, "rest": s.rest}
            for s in self.shards
        ]
        body["tensors"] = {
            name: {"shape": list(t.shape), "dtype": t.dtype, "boxes": [box.to_json() for box in t.boxes]}
            for name, t in sorted(self.tensors.items())
        }
        return body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises
        ------
        IntegrityError
            If it is damaged, contradicts itself, or has another schema.
        """
        try:
            record = json.loads(data, parse_constant=_no_constant)
            if not isinstance(record, dict):
                raise IntegrityError("no JSON object")  # noqa: TRY301 - one place turns all into one error
            if record.get("schema") != SCHEMA:
                raise IntegrityError(  # noqa: TRY301 - as above
                    f"schema {record.get('schema')!r}, but this version reads {SCHEMA}: update hpc_resume"
                )
            manifest = cls._from_record(record)
            if manifest.to_bytes() != data:
                raise IntegrityError("its content is not what its content id says")  # noqa: TRY301 - as above
        except IntegrityError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise IntegrityError(f"damaged ({type(error).__name__}: {error})") from error
        return manifest

    @classmethod
    def _from_record(cls, record: JsonObject) -> Manifest:
        return cls(
            run_id=_string(record["run_id"]),
            attempt=_integer(record["attempt"]),
            step=_integer(record["step"]),
            samples=_integer(record["samples"]),
            reason=_string(record["reason"]),
            parent=record["parent"],
            created=record["created"],
            world_size=_integer(record["world_size"]),
            shards=tuple(
                ShardRecord(
                    file=_string(shard["file"]),
                    rank=_integer(shard["rank"]),
                    node=_string(shard["node"]),
                    size_bytes=_integer(shard["size_bytes"]),
                    rest=_string(shard["rest"]),
                )
                for shard in record["shards"]
            ),
            tensors={
                name: TensorRecord(
                    shape=_integers(tensor["shape"]),
                    dtype=_string(tensor["dtype"]),
                    boxes=tuple(StoredBox.from_json(box) for box in tensor["boxes"]),
                )
                for name, tensor in record["tensors"].items()
            },
            objects=record["objects"],
            differing_ranks=_integers(record["differing_ranks"]),
            node_type=record["node_type"],
            config=record["config"],
            environment=record["environment"],
            costs=record["costs"],
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a committed checkpoint.

    Parameters
    ----------
    folder
        The checkpoint's folder, under the name that it was committed with.

    Raises
    ------
    IntegrityError
        If there is none, or it is damaged, or belongs to another folder.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.from_bytes(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
    if manifest.name != folder.name:
        raise IntegrityError(f"{path}: is the manifest of {manifest.name}, not of {folder.name}")
    return manifest


def _canonical(record: JsonObject) -> bytes:
    """JSON with one entry a line: the same record always gives the same bytes, and people can read them."""
    lines = []
    for key, value in record.items():
        if key in {"tensors", "environment"} and value:
            rows = ",\n".join(f"  {json.dumps(k)}: {_compact(v)}" for k, v in value.items())
            lines.append(f' "{key}": {{\n{rows}\n }}')
        elif key == "shards":
            rows = ",\n".join(f"  {_compact(v)}" for v in value)
            lines.append(f' "shards": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {_compact(value)}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= 1 << 63:
        raise TypeError(f"{value!r:.40} is no 64-bit integer")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r:.40} is no list")
    return tuple(_integer(value) for value in values)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no string")
    return value
