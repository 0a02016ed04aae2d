"""A receipt: what one rank says of the shard that it has made durable.

Receipts lie beside the shards of a checkpoint that is not committed yet. All of them together are the
manifest, so whoever can read them can finish the commit, without asking any rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.manifest import Manifest, ShardRecord, StoredBox, TensorRecord, shard_file
from hpc_resume.checkpoint.objects import dump
from hpc_resume.checkpoint.shard import Piece, WrittenShard
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What every rank knows alike about the checkpoint being taken; the fields are the manifest's."""

    run_id: str
    attempt: int
    step: int
    samples: int
    reason: str
    world_size: int
    node_type: str | None
    config: str | None
    environment: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one rank wrote.

    Parameters
    ----------
    header
        Of the checkpoint.
    rank, node
        Who wrote it, where.
    created
        Unix time in seconds at which the shard was durable.
    shard
        Size and checksum of the file.
    boxes
        Name, element type, global shape and place of every piece.
    objects_digest
        SHA-256 of this rank's non-tensor state.
    objects
        The non-tensor state itself; rank 0's receipt alone carries it.
    write_s
        Seconds from the first byte to durable.
    """

    header: Header
    rank: int
    node: str
    created: float
    shard: ShardRecord
    boxes: tuple[tuple[str, str, tuple[int, ...], StoredBox], ...]
    objects_digest: str
    objects: Any
    write_s: float

    @classmethod
    def of(
        cls,
        *,
        header: Header,
        rank: int,
        node: str,
        created: float,
        pieces: Sequence[Piece],
        written: WrittenShard,
        objects: Any,
        write_s: float,
    ) -> Receipt:
        """Make the receipt of a written shard."""
        stored = zip(pieces, written.offsets, written.checksums, strict=True)
        return cls(
            header=header,
            rank=rank,
            node=node,
            created=created,
            shard=ShardRecord(
                file=shard_file(rank, header.world_size),
                rank=rank,
                node=node,
                size_bytes=written.size_bytes,
                rest=written.rest,
            ),
            boxes=tuple(
                (
                    piece.name,
                    piece.dtype,
                    piece.shape,
                    StoredBox(
                        shard=rank, box=piece.box, offset=offset, length=len(piece.data), checksums=checksums
                    ),
                )
                for piece, offset, checksums in stored
            ),
            objects_digest=hashlib.sha256(dump(objects)).hexdigest(),
            objects=objects if rank == 0 else None,
            write_s=round(write_s, 4),
        )

    def to_bytes(self) -> bytes:
        """JSON form."""
        record = {
            "header": asdict(self.header),
            "rank": self.rank,
            "node": self.node,
            "created": self.created,
            "shard": asdict(self.shard),
            "boxes": [[name, dtype, list(shape), box.to_json()] for name, dtype, shape, box in self.boxes],
            "objects_digest": self.objects_digest,
            "objects": self.objects,
            "write_s": self.write_s,
        }
        return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def read(cls, path: Path) -> Receipt:
        """Read a receipt.

        Raises
        ------
        IntegrityError
            If it is damaged.
        """
        try:
            record = json.loads(path.read_bytes())
            return cls(
                header=Header(**record["header"]),
                rank=record["rank"],
                node=record["node"],
                created=record["created"],
                shard=ShardRecord(**record["shard"]),
                boxes=tuple(
                    (name, dtype, tuple(shape), StoredBox.from_json(box))
                    for name, dtype, shape, box in record["boxes"]
                ),
                objects_digest=record["objects_digest"],
                objects=record["objects"],
                write_s=record["write_s"],
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{path}: damaged receipt ({type(error).__name__}: {error})") from error


def to_manifest(receipts: Sequence[Receipt], parent: str | None) -> Manifest:
    """Put all receipts of one checkpoint together.

    Parameters
    ----------
    receipts
        One of every rank, ascending.
    parent
        Name of the checkpoint before it.

    Raises
    ------
    IntegrityError
        If they do not belong together or do not cover every tensor.
    """
    first = receipts[0]
    header = first.header
    if any(receipt.header != header for receipt in receipts):
        raise IntegrityError(f"step {header.step}: the ranks' receipts speak of different checkpoints")
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, list[StoredBox]] = {}
    for receipt in receipts:
        for name, dtype, shape, stored in receipt.boxes:
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise IntegrityError(
                    f"step {header.step}: {name} is {kinds[name]} on one rank and {(dtype, shape)} on rank "
                    f"{receipt.rank}: the ranks track different models"
                )
            boxes.setdefault(name, []).append(stored)
    try:
        tensors = {
            name: TensorRecord(shape=shape, dtype=dtype, boxes=tuple(boxes[name]))
            for name, (dtype, shape) in kinds.items()
        }
    except IntegrityError as error:
        raise IntegrityError(f"step {header.step}: {error}") from error
    return Manifest(
        **asdict(header),
        parent=parent,
        created=max(receipt.created for receipt in receipts),
        shards=tuple(receipt.shard for receipt in receipts),
        tensors=tensors,
        objects=first.objects,
        differing_ranks=tuple(r.rank for r in receipts if r.objects_digest != first.objects_digest),
        costs={"write_s": max(receipt.write_s for receipt in receipts)},
    )
