"""The manifest: the one file that says what a checkpoint is.

It names every tensor and how ranks hold it, every shard, and for each shard a digest of the index that lies in
it. Which rank stores which box follows by rule, so a manifest grows with tensors plus ranks, not with tensors
times ranks. A manifest that contradicts itself cannot be constructed, and one that exists cannot be changed:
its first line holds a digest of all the others, so any flipped bit in it shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.collector import paused_collector
from hpc_resume.checkpoint.fields import listed, maybe_string, pair, shown, time_s
from hpc_resume.checkpoint.health import Health
from hpc_resume.checkpoint.index import CHECKSUM_BYTES, SHARD_FILE, shard_file
from hpc_resume.checkpoint.structure import (
    Structure,
    TensorRecord,
    integer,
    integers,
    most_placed,
    string,
)
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import checkpoint_name, checkpoint_step, is_checkpoint_name
from hpc_resume.untrusted import parse_json, read_regular

#: 1 had every box in the manifest; it was never released.
SCHEMA = 2
MANIFEST = "manifest.json"
#: A longer manifest is neither written nor read. 4,096 ranks with 20,000 tensors take 4 MB.
MAX_BYTES = 1 << 28
#: Unix time of the year 10000, in which calendars end.
_END_OF_TIME = 253402300800.0
_FIRST_LINE = re.compile(rb'\{"schema": ([1-9][0-9]{0,8}), "content_id": "([0-9a-f]{32})",\n')
_HEX16 = re.compile(r"[0-9a-f]{16}")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

#: Everything that was tracked.
FULL = "full"
#: The modules alone, because there was no time for more: never resumed from unasked.
MODEL = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One shard file.

    Parameters
    ----------
    file, rank, node
        Its name, whose state it holds, and where that rank ran.
    size_bytes
        Of the file.
    index, table
        Offset and length of its index and of its checksums.
    digest
        xxh3-128 over both.
    rest
        xxh3-64 over every byte of it that belongs to no box.
    """

    file: str
    rank: int
    node: str
    size_bytes: int
    index: tuple[int, int]
    table: tuple[int, int]
    digest: str
    rest: str

    def __post_init__(self) -> None:
        if not SHARD_FILE.fullmatch(self.file):
            raise IntegrityError(f"{self.file!r:.100} is no name of a shard")
        if self.size_bytes < 0 or not _HEX16.fullmatch(self.rest) or not _HEX32.fullmatch(self.digest):
            raise IntegrityError(f"{self.file}: size or checksum is malformed")
        for offset, length in (self.index, self.table):
            if offset < 0 or length < 0 or offset + length > self.size_bytes:
                raise IntegrityError(f"{self.file}: its index or checksums end after it does")
        if self.table[1] % CHECKSUM_BYTES:
            raise IntegrityError(f"{self.file}: its checksums are cut off")

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return {
            "file": self.file,
            "rank": self.rank,
            "node": self.node,
            "size_bytes": self.size_bytes,
            "index": list(self.index),
            "table": list(self.table),
            "digest": self.digest,
            "rest": self.rest,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ShardRecord:
        """From JSON; see :meth:`to_json`."""
        return cls(
            file=string(record["file"]),
            rank=integer(record["rank"]),
            node=string(record["node"]),
            size_bytes=integer(record["size_bytes"]),
            index=pair(record["index"]),
            table=pair(record["table"]),
            digest=string(record["digest"]),
            rest=string(record["rest"]),
        )


@dataclass(frozen=True, kw_only=True)
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
    content
        ``"full"``, or ``"model"`` if only the modules were saved.
    note
        Why it is not full.
    parent
        Name of the checkpoint before it in this run, or None.
    refers
        Names of earlier checkpoints in which bytes of this one lie.
    created
        Unix time in seconds.
    world_size
        Ranks whose state it is.
    shards, structure
        The bytes.
    objects
        The non-tensor state as typed JSON.
    differing_ranks
        Ranks whose non-tensor state was not rank 0's; theirs lies in their shards.
    missing_ranks
        Ranks that died while saving: others wrote what they hold alike, and what was theirs alone is lost.
    node_type, config, environment, costs
        Where it was written, with which resolved configuration, in which environment; measured seconds and
        bytes.
    health
        Whether the state is one to go on from, as far as that was looked at.
    """

    run_id: str
    attempt: int
    step: int
    samples: int
    reason: str
    content: str
    note: str
    parent: str | None
    refers: tuple[str, ...]
    created: float
    world_size: int
    shards: tuple[ShardRecord, ...]
    structure: Structure
    objects: Any
    differing_ranks: tuple[int, ...]
    missing_ranks: tuple[int, ...]
    node_type: str | None
    config: str | None
    environment: JsonObject
    costs: JsonObject
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        if self.step < 0 or self.samples < 0 or self.attempt < 0 or self.world_size < 1:
            raise IntegrityError(f"step {self.step}, samples {self.samples}, world size {self.world_size}")
        if self.content not in {FULL, MODEL}:
            raise IntegrityError(f"a content of {self.content!r:.40}")
        if len(self.shards) != self.world_size:
            raise IntegrityError(f"{len(self.shards)} shards for {self.world_size} ranks")
        for rank, shard in enumerate(self.shards):
            own = shard_file(rank, self.world_size)
            substitute = shard.file.startswith(own.removesuffix(".h5") + ".by-")
            if shard.rank != rank or not (shard.file == own or substitute):
                raise IntegrityError(
                    f"shard {rank} of {self.world_size} is {shard.file} of rank {shard.rank}"
                )
        self._check_others()

    def _check_others(self) -> None:
        """Check what is said of other checkpoints, and of ranks and times."""
        for name in (*self.refers, *([] if self.parent is None else [self.parent])):
            if not is_checkpoint_name(name):
                raise IntegrityError(f"{name!r:.100} is no name of a checkpoint")
        if any(checkpoint_step(name) >= self.step for name in self.refers):
            raise IntegrityError(f"step {self.step} refers to bytes of a later one, or to its own")
        if not 0 <= self.created < _END_OF_TIME:
            raise IntegrityError(f"it was written at {self.created}")
        if not all(0 <= rank < self.world_size for rank in (*self.differing_ranks, *self.missing_ranks)):
            raise IntegrityError("it speaks of ranks that there are not")
        if self.health.probe is not None and len(self.health.probe.values) not in {1, self.world_size}:
            raise IntegrityError("its probe speaks of ranks that there are not")

    @cached_property
    def _bytes(self) -> tuple[bytes, str]:
        """The body, and the content id."""
        parts = [_lines(self._head()), self.structure.to_text(), f' "objects": {_compact(self.objects)}']
        body = (",\n".join(parts) + "\n}\n").encode()
        return body, hashlib.sha256(body).hexdigest()[:32]

    @property
    def content_id(self) -> str:
        """32 hex digits of SHA-256 over everything else."""
        return self._bytes[1]

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return checkpoint_name(self.step, self.content_id)

    @property
    def resumable(self) -> bool:
        """Whether a run is resumed from it unasked: it holds everything, and what it holds is finite."""
        return self.content == FULL and not self.health.poisoned

    @property
    def held_back(self) -> str:
        """Why it is not resumed from unasked; empty if it is."""
        return self.note if self.content != FULL else self.health.told

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """The global tensors by name."""
        return self.structure.tensors

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size_bytes for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        body, content_id = self._bytes
        data = b'{"schema": %d, "content_id": "%s",\n' % (SCHEMA, content_id.encode()) + body
        if len(data) > MAX_BYTES:
            raise IntegrityError(
                f"step {self.step}: a manifest of {len(data)} bytes, more than {MAX_BYTES}, would not be read again: "
                "track large non-tensor state as arrays or tensors"
            )
        return data

    def _head(self) -> JsonObject:
        placed = self.structure.placed
        if placed > most_placed(self.world_size):
            raise IntegrityError(
                f"step {self.step}: layouts of {placed} ranks in all would not be read again"
            )
        return {
            "run_id": self.run_id,
            "attempt": self.attempt,
            "step": self.step,
            "samples": self.samples,
            "reason": self.reason,
            "content": self.content,
            "note": self.note,
            "parent": self.parent,
            "refers": list(self.refers),
            "created": self.created,
            "world_size": self.world_size,
            "differing_ranks": list(self.differing_ranks),
            "missing_ranks": list(self.missing_ranks),
            "node_type": self.node_type,
            "config": self.config,
            "environment": self.environment,
            "costs": self.costs,
            **({"health": health} if (health := self.health.to_json()) else {}),
            "shards": [shard.to_json() for shard in self.shards],
        }

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises
        ------
        IntegrityError
            If it is damaged, contradicts itself, or has another schema.
        """
        first = _FIRST_LINE.match(data)
        if first is None:
            raise IntegrityError("damaged (it does not begin as a manifest does)")
        if int(first[1]) != SCHEMA:
            raise IntegrityError(
                f"schema {int(first[1])}, but this version reads {SCHEMA}: update hpc_resume, or restore with the "
                "version that wrote it"
            )
        body = data[first.end() :]
        content_id = hashlib.sha256(body).hexdigest()[:32]
        if content_id != first[2].decode():
            raise IntegrityError("its content is not what its content id says")
        try:
            record = parse_json(b"{" + body)
            manifest = cls._from_record(record)
        except IntegrityError:
            raise
        except (ValueError, TypeError, LookupError, OverflowError, AttributeError, MemoryError) as error:
            raise IntegrityError(f"damaged ({type(error).__name__}: {error!s:.200})") from error
        manifest.__dict__["_bytes"] = (body, content_id)  # what a cached property keeps
        return manifest

    @classmethod
    def _from_record(cls, record: JsonObject) -> Manifest:
        world_size = integer(record["world_size"])
        shards = tuple([ShardRecord.from_json(shard) for shard in listed(record["shards"])])
        if len(shards) != world_size:
            raise IntegrityError(f"{len(shards)} shards for {world_size} ranks")
        return cls(
            run_id=string(record["run_id"]),
            attempt=integer(record["attempt"]),
            step=integer(record["step"]),
            samples=integer(record["samples"]),
            reason=string(record["reason"]),
            content=string(record["content"]),
            note=string(record["note"]),
            parent=maybe_string(record["parent"]),
            refers=tuple([string(name) for name in listed(record["refers"])]),
            created=time_s(record["created"]),
            world_size=world_size,
            shards=shards,
            structure=Structure.from_json(record, world_size=world_size),
            objects=record["objects"],
            differing_ranks=integers(record["differing_ranks"]),
            missing_ranks=integers(record["missing_ranks"]),
            node_type=maybe_string(record["node_type"]),
            config=maybe_string(record["config"]),
            environment=shown(record["environment"]),
            costs=shown(record["costs"]),
            health=Health.from_json(record.get("health", {})),
        )


@paused_collector()
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
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            raise IntegrityError(
                "its folder is a symbolic link: put the folder itself there, or link checkpoints/ as a whole"
            )
        manifest = Manifest.from_bytes(read_regular(path, longest_bytes=MAX_BYTES, follow=False))
    except OSError as error:
        error.filename = str(path)  # reading does not know it; see files.obstacle
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
    if manifest.name != folder.name:
        raise IntegrityError(f"{path}: is the manifest of {manifest.name}, not of {folder.name}")
    return manifest


def _lines(record: JsonObject) -> str:
    """Members of a JSON object, one entry a line, so that people can read them."""
    lines = []
    for key, value in record.items():
        if key == "environment" and value:
            rows = ",\n".join(f"  {json.dumps(k)}: {_compact(v)}" for k, v in value.items())
            lines.append(f' "{key}": {{\n{rows}\n }}')
        elif key == "shards":
            rows = ",\n".join(f"  {_compact(v)}" for v in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f' "{key}": {_compact(value)}')
    return ",\n".join(lines)
