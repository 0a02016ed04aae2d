"""Changing a committed checkpoint as somebody would who can compute every digest in it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from hpc_resume.checkpoint.index import index_digest

BLOCK = struct.Struct("<Q")
#: A piece of an index as a row: name, element type, shape, start, size, and runs of [file, offset, length].
Row = list[Any]


def rows_of(index: dict[str, Any]) -> list[Row]:
    """The pieces of an index, a row each."""
    runs = zip(index["run_files"], index["run_offsets"], index["run_lengths"], strict=True)
    return [
        [name, *map(copy.copy, index["kinds"][kind]), list(map(list, itertools.islice(runs, count)))]
        for name, kind, count in zip(index["names"], index["kind_of"], index["runs_of"], strict=True)
    ]


def index_of(rows: list[Row], files: list[list[str]] | None = None) -> dict[str, Any]:
    """The index of rows; each has a kind of its own, which may be hostile, too."""
    runs = [run for row in rows for run in row[5]]
    return {
        "files": files or [],
        "kinds": [row[1:5] for row in rows],
        "names": [row[0] for row in rows],
        "kind_of": list(range(len(rows))),
        "runs_of": [len(row[5]) for row in rows],
        "run_files": [run[0] for run in runs],
        "run_offsets": [run[1] for run in runs],
        "run_lengths": [run[2] for run in runs],
    }


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:32]


def with_content_id(body: bytes, schema: bytes = b"2") -> bytes:
    """The manifest of a body, whatever that is, under its right content id."""
    return b'{"schema": %b, "content_id": "%b",\n' % (schema, digest_of(body).encode()) + body


class Forge:
    """One checkpoint of a run, taken apart; :meth:`seal` puts it together again under a right content id.

    Parameters
    ----------
    root
        The run.
    step
        Of the checkpoint.
    """

    def __init__(self, root: Path, step: int) -> None:
        self.root = root
        self.step = step
        (self.folder,) = (root / "checkpoints").glob(f"{step:010d}-*")
        data = (self.folder / "manifest.json").read_bytes()
        self.record: dict[str, Any] = json.loads(b"{" + data.partition(b"\n")[2])

    def path(self, rank: int) -> Path:
        return self.folder / self.record["shards"][rank]["file"]

    def index(self, rank: int) -> dict[str, Any]:
        """The index of a shard."""
        at, length = self.record["shards"][rank]["index"]
        return json.loads(self.path(rank).read_bytes()[at : at + length])

    def table(self, rank: int) -> bytes:
        """The checksums of a shard."""
        at, length = self.record["shards"][rank]["table"]
        return self.path(rank).read_bytes()[at : at + length]

    def put_index(self, rank: int, index: Any, table: bytes | None = None) -> None:
        """Append another index, and checksums, to a shard, and record them with right digests."""
        table = self.table(rank) if table is None else table
        data = index if isinstance(index, bytes) else json.dumps(index).encode()
        shard = self.record["shards"][rank]
        size_bytes = self.path(rank).stat().st_size
        with self.path(rank).open("r+b") as file:
            file.seek(size_bytes)
            file.write(data + table)
        shard["index"] = [size_bytes, len(data)]
        shard["table"] = [size_bytes + len(data), len(table)]
        shard["digest"] = index_digest(data, table)
        self.measure(rank)

    def edit_index(self, rank: int, change: Callable[[dict[str, Any]], Any]) -> None:
        index = self.index(rank)
        change(index)
        self.put_index(rank, index)

    def edit_rows(self, rank: int, change: Callable[[list[Row]], Any]) -> None:
        index = self.index(rank)
        rows = rows_of(index)
        change(rows)
        self.put_index(rank, index_of(rows, index["files"]))

    def set_kind(self, name: str, kind: dict[str, Any]) -> None:
        """Say something else of a tensor, or of one more."""
        self.record["kinds"].append(kind)
        self.record["tensors"][name] = len(self.record["kinds"]) - 1

    def kind_path(self, name: str, *rest: Any) -> tuple[Any, ...]:
        """Where the record says of what kind a tensor is."""
        return "kinds", self.record["tensors"][name], *rest

    def measure(self, rank: int) -> None:
        """Record the size of a shard, and the checksum of what belongs to no box as far as there is one."""
        shard = self.record["shards"][rank]
        shard["size_bytes"] = self.path(rank).stat().st_size
        if shard["size_bytes"] > 1 << 24:
            return
        data = self.path(rank).read_bytes()
        digest, position = xxhash.xxh3_64(), 0
        try:
            runs = [run for row in rows_of(self.index(rank)) for run in row[5]]
            for _, offset, length in sorted(run for run in runs if run[0] == 0):
                digest.update(data[position:offset])
                position = offset + length
        except (ValueError, TypeError, LookupError, RecursionError):
            return
        digest.update(data[position:])
        shard["rest"] = digest.hexdigest()

    def seal(self, body: bytes | None = None) -> Path:
        """Write the manifest, and name the folder after it."""
        if body is None:
            body = json.dumps(self.record, indent=1).encode()[2:]
        (self.folder / "manifest.json").write_bytes(with_content_id(body))
        target = self.folder.with_name(f"{self.step:010d}-{digest_of(body)[:8]}")
        self.folder.rename(target)
        self.folder = target
        return target
