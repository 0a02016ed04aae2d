"""A receipt: what one rank says of the shard that it has made durable.

Receipts lie beside the shards of a checkpoint that is not committed yet. They are small, whatever the state:
what a shard holds stands in its own index. All of them together are the manifest, so whoever can read them can
finish the commit, without asking any rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.health import Health, Known, Looked
from hpc_resume.checkpoint.manifest import FULL, MAX_BYTES, Manifest, ShardRecord
from hpc_resume.checkpoint.objects import dump
from hpc_resume.checkpoint.structure import Structure, TensorRecord, integer, merge, string
from hpc_resume.checkpoint.witnesses import checked, compare
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.untrusted import parse_json, read_regular

_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, IntegrityError)


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
    content: str = FULL
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one rank wrote.

    Parameters
    ----------
    header
        Of the checkpoint.
    by
        The rank that wrote it: another one than the shard's if that has died.
    created
        Unix time in seconds at which the shard was durable.
    shard
        Sizes and checksums of the file.
    structure_digest, structure
        Of the state; the lowest rank of those that hold it alike carries it whole.
    objects_digest, objects
        Of this rank's non-tensor state; rank 0's receipt alone carries it whole.
    refers
        Names of earlier checkpoints in which bytes of this shard lie.
    state_bytes, written_bytes, write_s
        Bytes of this rank's part and of what was written of it; seconds from the first byte to durable.
    gpu_peak_bytes
        Most that this rank has had allocated on its GPUs; 0 without one.
    witnesses
        Of tensors that are stored once and that each rank has, by name.
    looked
        What was found in this rank's part that is not finite, and its norms.
    known
        What was known of the state before.
    """

    header: Header
    by: int
    created: float
    shard: ShardRecord
    structure_digest: str
    structure: Structure | None
    objects_digest: str
    objects: Any
    refers: tuple[str, ...]
    state_bytes: int
    written_bytes: int
    write_s: float
    gpu_peak_bytes: int = 0
    witnesses: Mapping[str, str] = field(default_factory=dict)
    looked: Looked = field(default_factory=Looked)
    known: Known = field(default_factory=Known)

    @property
    def file(self) -> str:
        """Name of the receipt's file."""
        own = f"{self.shard.rank:05d}"
        return f"{own}.json" if self.by == self.shard.rank else f"{own}.by-{self.by:05d}.json"

    def to_bytes(self) -> bytes:
        """JSON form."""
        record = {
            **asdict(self.header),
            "by": self.by,
            "created": self.created,
            "shard": self.shard.to_json(),
            "structure_digest": self.structure_digest,
            "objects_digest": self.objects_digest,
            "objects": self.objects,
            "refers": list(self.refers),
            "state_bytes": self.state_bytes,
            "written_bytes": self.written_bytes,
            "write_s": self.write_s,
            "gpu_peak_bytes": self.gpu_peak_bytes,
            "witnesses": dict(self.witnesses),
            "looked": self.looked.to_json(),
            "known": self.known.to_json(),
        }
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
        structure = "null" if self.structure is None else f"{{{self.structure.to_text()}}}"
        return f'{text[:-1]},"structure":{structure}}}'.encode()

    @classmethod
    def read(cls, path: Path) -> Receipt:
        """Read a receipt.

        Raises
        ------
        IntegrityError
            If it is damaged.
        """
        try:
            return cls.parse(read_regular(path, longest_bytes=MAX_BYTES, follow=False))
        except FileNotFoundError:
            raise
        except (OSError, IntegrityError) as error:
            raise IntegrityError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, data: bytes) -> Receipt:
        """From JSON; see :meth:`to_bytes`.

        Raises
        ------
        IntegrityError
            If it is damaged.
        """
        try:
            record = parse_json(data)
            header = Header(**{name: record[name] for name in Header.__dataclass_fields__})
            described = record["structure"]
            structure = None
            if described is not None:
                structure = Structure.known(record["structure_digest"]) or Structure.from_json(
                    described, world_size=integer(header.world_size)
                )
            return cls(
                header=header,
                by=integer(record["by"]),
                created=float(record["created"]),
                shard=ShardRecord.from_json(record["shard"]),
                structure_digest=string(record["structure_digest"]),
                structure=structure,
                objects_digest=string(record["objects_digest"]),
                objects=record["objects"],
                refers=tuple(string(name) for name in record["refers"]),
                state_bytes=integer(record["state_bytes"]),
                written_bytes=integer(record["written_bytes"]),
                write_s=float(record["write_s"]),
                gpu_peak_bytes=integer(record.get("gpu_peak_bytes", 0)),
                witnesses={string(n): checked(string(w)) for n, w in record["witnesses"].items()},
                looked=Looked.from_json(record["looked"]) if "looked" in record else Looked(),
                known=Known.from_json(record["known"]) if "known" in record else Known(),
            )
        except _DAMAGED as error:
            raise IntegrityError(f"damaged receipt ({type(error).__name__}: {error!s:.200})") from error


def objects_digest(objects: Any) -> str:
    """64 hex digits of SHA-256 over a non-tensor state."""
    return hashlib.sha256(dump(objects)).hexdigest()


def carries_structure(structure: Structure, rank: int) -> bool:
    """Whether a rank's receipt holds the structure: it is the lowest that stores anything of it by rule."""
    ranks = {min(layout.ranks) for layout in structure.layouts if len(layout.ranks) > 1}
    return rank in (ranks | {0})


def to_manifest(receipts: Sequence[Receipt], parent: str | None) -> Manifest:
    """Put all receipts of one checkpoint together.

    Parameters
    ----------
    receipts
        One for each rank's shard, ascending.
    parent
        Name of the checkpoint before it.

    Raises
    ------
    IntegrityError
        If they do not belong together.
    """
    first = receipts[0]
    header = first.header
    if any(receipt.header != header for receipt in receipts):
        raise IntegrityError(f"step {header.step}: the ranks' receipts speak of different checkpoints")
    costs = {
        "write_s": max(receipt.write_s for receipt in receipts),
        "state_bytes": sum(receipt.state_bytes for receipt in receipts),
        "written_bytes": sum(receipt.written_bytes for receipt in receipts),
    }
    if peak := max(receipt.gpu_peak_bytes for receipt in receipts):
        costs["gpu_peak_bytes"] = peak
    return Manifest(
        **asdict(header),
        parent=parent,
        refers=tuple(sorted({name for receipt in receipts for name in receipt.refers})),
        created=max(receipt.created for receipt in receipts),
        shards=tuple(receipt.shard for receipt in receipts),
        structure=_structure(receipts),
        objects=first.objects,
        differing_ranks=tuple(
            r.shard.rank
            for r in receipts
            if r.objects_digest != first.objects_digest and r.by == r.shard.rank
        ),
        missing_ranks=tuple(r.shard.rank for r in receipts if r.by != r.shard.rank),
        costs=costs,
        health=Health.together([each.looked for each in receipts], [each.known for each in receipts]),
    )


def _structure(receipts: Sequence[Receipt]) -> Structure:
    """Put the ranks' structures together, and check that whoever stores a tensor knows of it."""
    step = receipts[0].header.step
    whole = {r.structure_digest: r.structure for r in receipts if r.structure is not None}
    lacking = sorted({r.shard.rank for r in receipts if r.structure_digest not in whole})
    if lacking:
        raise IntegrityError(
            f"step {step}: the state of rank {lacking[0]} is described by nobody: the ranks track different models"
        )
    try:
        merged = merge(list(whole.values()))
    except IntegrityError as error:
        raise IntegrityError(f"step {step}: {error}") from error
    if len(whole) > 1:
        for name, record in merged.tensors.items():
            for rank in record.layout.ranks if record.layout is not None else ():
                if name not in whole[receipts[rank].structure_digest].tensors:
                    raise IntegrityError(
                        f"step {step}: {name} is to be stored by rank {rank}, which does not track it: plain "
                        "tensors must be the same on all ranks; make it a DTensor, or track it under DDP"
                    )
    if found := compare([(r.shard.rank, r.witnesses) for r in receipts if r.by == r.shard.rank]):
        name, (first, others) = next(iter(found.items()))
        ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others[:8]))}{', …' * (len(others) > 8)}"
        raise IntegrityError(
            f"step {step}: {name} of {ranks} is not the same as rank {first}'s"
            f"{f' (one of {len(found)} such tensors)' * (len(found) > 1)}, "
            f"{_what_to_do(name, receipts[first].witnesses[name], merged.tensors.get(name))}"
        )
    return merged


def _what_to_do(name: str, witness: str, record: TensorRecord | None) -> str:
    """Say what would be lost of a tensor that ranks do not have alike, and what helps."""
    if record is not None and record.layout is not None and len(record.layout.ranks) > 1:
        return (
            "though it is under DistributedDataParallel: each rank stores a part of it, and together they would be what no "
            "rank ever had. DDP keeps equal what all ranks change by the gradients that it has averaged: not with local "
            "SGD, steps inside no_sync(), writes by one rank, or parameters that were frozen when it was wrapped"
        )
    if witness.startswith("=") or "/param_groups/" in name:
        return (
            "and of a tensor only rank 0's would be stored: reduce it over the ranks before the step ends, or store it "
            "as a Python number (.item(), .tolist()), which each rank keeps"
        )
    return (
        "and only rank 0's would be stored: put it under DDP, or make it a DTensor; experts of one rank can be parts of one "
        "tensor that is split over ranks, stages of a pipeline have names of their own, under DDP or in a mesh of the "
        "ranks that share them"
    )
