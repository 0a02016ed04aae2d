"""What the fuzzer calls: each takes bytes, reads them as a hostile file, and may raise nothing but errors of ours."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import shutil
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from hpc_resume.checkpoint import objects
from hpc_resume.checkpoint.blocks import checks, count_checksums, partitions
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.index import Index, decode_index, index_digest
from hpc_resume.checkpoint.leaves import flatten
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted, tensor_like
from hpc_resume.checkpoint.saved import load_saved
from hpc_resume.checkpoint.structure import Structure, integer
from hpc_resume.checkpoint.verify import verify_checkpoint
from hpc_resume.errors import HpcResumeError, IntegrityError
from hpc_resume.journal import damaged_lines, read_events
from hpc_resume.report.checkpoints import describe
from hpc_resume.report.tables import contents_table
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import parse_json
from tests.hostile.base import CHANGED, FULL
from tests.hostile.cases import OBJECTS, index_lies, manifest_lies
from tests.hostile.forge import Forge, index_of, with_content_id

#: Lengths of the index and of the table, before both and the tensors' bytes.
HEAD = struct.Struct("<HH")
#: The checkpoint that the one under test may refer to.
OLDER = ("0000000001-00000000", "rank-00000-of-00001.h5")
_OLDER_BYTES = bytes(range(256)) * 512


def manifest(data: bytes) -> None:
    """The body of a manifest, under its right content id."""
    found = Manifest.from_bytes(with_content_id(data))
    shown = contents_table(describe(found.name, found))
    assert all(char.isprintable() or char in "\n\t" for line in shown.lines() for char in line)
    assert Manifest.from_bytes(found.to_bytes()) == found
    _structure(found.structure, found.world_size)
    objects.tensor_names(found.objects)
    objects.decode(found.objects, _Tensors())


def index(data: bytes) -> None:
    """An index and its table."""
    head, table, _ = _split(data)
    _index(decode_index(head, table, size_bytes=1 << 20))


def shard(data: bytes) -> None:
    """A whole shard with a right digest, right checksums of the blocks, and a right rest, under a right manifest."""
    head, table, rest = _split(data)
    folder = _folder()
    path = folder / OLDER[1]
    with contextlib.suppress(IntegrityError):
        table = _checksums(decode_index(head, table, size_bytes=len(rest)), rest, table)
    whole = rest + head + table
    path.write_bytes(whole)
    record = json.loads(_template())
    record["shards"][0].update(
        size_bytes=len(whole),
        index=[len(rest), len(head)],
        table=[len(rest) + len(head), len(table)],
        digest=index_digest(head, table),
        rest=_rest(head, table, whole),
    )
    found = Manifest.from_bytes(with_content_id(json.dumps(record).encode()[1:]))
    verify_checkpoint(folder, found, threads=1)
    with CheckpointReader(folder, found, threads=1) as reader:
        for name, each in found.tensors.items():
            with contextlib.suppress(IntegrityError):
                reader.check_size(name)
                out = tensor_like(each, dtype=None, device="cpu")
                reader.read_all([Wanted(name, Box.whole(each.shape), out)])
        reader.private(0, "ranks/")


def typed(data: bytes) -> None:
    """Typed JSON; what it holds can be written again."""
    value = objects.parse(data)
    objects.tensor_names(value)
    decoded = objects.decode(value, _Tensors())
    objects.dump(flatten("x", decoded)[0])


def structure(data: bytes) -> None:
    """Layouts and tensors."""
    try:
        record = parse_json(data)
        world_size = integer(record["world_size"])
        if not 1 <= world_size <= 64:
            return
        found = Structure.from_json(record, world_size=world_size)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # As whoever reads a manifest does.
        raise IntegrityError(str(error)[:200]) from error
    assert Structure.from_json(found.to_json(), world_size=world_size) == found
    _structure(found, world_size)


def records(data: bytes) -> None:
    """A journal, and the identity of a run."""
    run = RunDirectory(_folder().parent.parent)
    path = run.root / "events.jsonl"
    path.write_bytes(data)
    read_events(path)
    list(damaged_lines(path, sealed=True))
    run.identity_path.write_bytes(data)
    run.identity()


def saved(data: bytes) -> None:
    """What ``torch.save`` wrote: an object of another library, in a checkpoint that was imported."""
    load_saved(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (manifest, index, shard, typed, structure, records, saved)
}


def run_target(name: str, data: bytes) -> bool:
    """Call a target; returns whether it took the bytes for good."""
    message = ""
    try:
        TARGETS[name](data)
    except HpcResumeError as error:
        message = str(error)
    assert len(message) < 5000
    return not message


def pack(head: bytes, table: bytes, rest: bytes = b"") -> bytes:
    """What :func:`index` and :func:`shard` take."""
    return HEAD.pack(len(head), len(table)) + head + table + rest


def _split(data: bytes) -> tuple[bytes, bytes, bytes]:
    if len(data) < HEAD.size:
        data = data.ljust(HEAD.size, b"\0")
    head, table = HEAD.unpack_from(data)
    body = data[HEAD.size :]
    return body[:head], body[head : head + table], body[head + table :]


def _structure(found: Structure, world_size: int) -> None:
    """Who stores what: by the rule, all boxes of a tensor are found again by whoever looks for it."""
    stored: dict[str, int] = {}
    for rank in range(min(world_size, 8)):
        for name, box in islice(found.stored_by(rank), 2000):
            stored[name] = stored.get(name, 0) + box.volume
    for name, record in islice(found.tensors.items(), 200):
        parts = list(islice(found.parts(name, Box.whole(record.shape)), 5000))
        if len(parts) < 5000:
            assert sum(box.volume for _, box in parts) == Box.whole(record.shape).volume, name
            if world_size <= 8 and len(found.tensors) <= 50 and len(parts) < 100:
                assert stored.get(name, 0) == Box.whole(record.shape).volume, name


def _index(found: Index) -> None:
    for number, entry in enumerate(found.entries):
        assert found.find(entry.name, entry.box) == number
        position = 0
        for low, high, _ in checks(entry.cut, 0, entry.length):
            assert low == position < high
            position = high
        assert position == entry.length
    list(found.own_extents())


def _checksums(found: Index, rest: bytes, table: bytes) -> bytes:
    """The right checksums of what an index says of a file; only of a few bytes, to stay quick."""
    right = bytearray(table)
    for number, entry in enumerate(found.entries):
        if entry.length > 1 << 20:
            continue
        data = b"".join(
            (rest if run.file == 0 else _OLDER_BYTES)[run.offset : run.offset + run.length]
            for run in entry.runs
        )
        place = found.first_checksum[number]
        for edges in entry.cut:
            for low, high in pairwise(edges):
                struct.pack_into("<Q", right, 8 * place, xxhash.xxh3_64_intdigest(data[low:high]))
                place += 1
    return bytes(right)


def _rest(head: bytes, table: bytes, whole: bytes) -> str:
    digest, position = xxhash.xxh3_64(), 0
    with contextlib.suppress(IntegrityError):
        for offset, length in sorted(decode_index(head, table, size_bytes=len(whole)).own_extents()):
            digest.update(whole[position:offset])
            position = offset + length
    digest.update(whole[position:])
    return digest.hexdigest()


class _Tensors:
    """Gives a tensor for any name."""

    def __call__(self, tag: str, name: str) -> Any:
        return np.zeros(1) if tag == "$ndarray" else torch.zeros(1)


@cache
def _folder() -> Path:
    """A folder of a checkpoint, with an older one beside it; in memory where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="hpc-resume-fuzz-", dir=place))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    older = root / "checkpoints" / OLDER[0]
    older.mkdir(parents=True)
    (older / OLDER[1]).write_bytes(_OLDER_BYTES)
    folder = root / "checkpoints" / "0000000002-00000000"
    folder.mkdir()
    return folder


@cache
def _template() -> str:
    """The manifest of a checkpoint of one rank with two tensors."""
    everybody = {"mesh": [1], "ranks": [[0, 1]], "splits": []}
    shard = {"file": OLDER[1], "rank": 0, "node": "n"}
    return json.dumps(
        {
            "run_id": "r",
            "attempt": 1,
            "step": 2,
            "samples": 2,
            "reason": "cadence",
            "content": "full",
            "note": "",
            "parent": OLDER[0],
            "refers": [OLDER[0]],
            "created": 1.0,
            "world_size": 1,
            "differing_ranks": [],
            "missing_ranks": [],
            "node_type": None,
            "config": None,
            "environment": {},
            "costs": {},
            "shards": [shard],
            "layouts": [everybody],
            "kinds": [
                {"shape": [4, 3], "dtype": "float32", "layout": 0},
                {"shape": [300, 128], "dtype": "bfloat16", "layout": 0},
            ],
            "tensors": {"a": 0, "b": 1},
            "objects": {},
        }
    )


def seeds(name: str, root: Path) -> Iterator[bytes]:
    """Inputs to begin with: what is right, and what the generator of hostile files makes of it.

    Parameters
    ----------
    name
        Of the target.
    root
        The small real run; see :mod:`tests.hostile.base`.
    """
    for step in (CHANGED, FULL):
        forge = Forge(root, step)
        record = forge.record
        if name == "manifest":
            yield json.dumps(record).encode()[1:]
            yield from (body for _, body in manifest_lies(record) if len(body) < 8000)
        elif name == "structure":
            kept = {key: record[key] for key in ("world_size", "layouts", "kinds", "tensors")}
            yield json.dumps(kept).encode()
            pieces = [[0, [0, 0], [2, 3]], [1, [2, 0], [1, 3]]]
            kind = {"shape": [3, 3], "dtype": "int8", "pieces": pieces}
            yield json.dumps({**kept, "kinds": [kind], "tensors": {"p": 0}}).encode()
            mesh = {"mesh": [2, 3], "ranks": [[0, 6]], "splits": [[0, 0], [1, 1]]}
            kinds = [{"shape": [100, 900], "dtype": "float32", "layout": n} for n in range(2)]
            layouts = [mesh, {**mesh, "splits": [[1, 0]]}]
            yield json.dumps(
                {"world_size": 6, "layouts": layouts, "kinds": kinds, "tensors": {"a": 0, "b": 1, "c": 0}}
            ).encode()
        elif name == "typed":
            yield json.dumps(record["objects"]).encode()
            yield from (json.dumps(value).encode() for value in OBJECTS.values() if len(str(value)) < 4000)
        elif name == "index":
            yield pack(json.dumps(forge.index(0)).encode(), forge.table(0))
            yield from (
                pack(data, forge.table(1)) for _, data in index_lies(forge.index(1)) if len(data) < 8000
            )
        elif name == "records":
            yield (root / "run.json").read_bytes()
            yield (root / "attempts/0001/events.jsonl").read_bytes()
            yield (root / "attempts/0001/attempt.json").read_bytes()
    if name == "saved":
        for value in (
            {"a": torch.arange(3), "b": [1, "x", None, 2.5]},
            OrderedDict(x=(1, 2)),
            torch.ones(2).bfloat16(),
        ):
            file = io.BytesIO()
            torch.save(value, file)
            yield file.getvalue()
    if name == "shard":
        a = ["a", "float32", [4, 3], [0, 0], [4, 3], [[0, 64, 48]]]
        b = ["b", "bfloat16", [300, 128], [0, 0], [300, 128], [[1, 0, 76800]]]
        own = ["ranks/00000/rng", "uint8", [5], [0], [5], [[0, 128, 5]]]
        cut = partitions([300, 128], Box.whole((300, 128)), 76800)
        parts = [[1, 0, cut[0][1]], [0, 256, 76800 - cut[0][1]]]
        for second in (b, [*b[:5], parts]):
            index = index_of([a, second, own], [list(OLDER)])
            table = bytes(8 * (2 + count_checksums(cut)))
            yield pack(json.dumps(index).encode(), table, bytes(range(256)) * 302)
