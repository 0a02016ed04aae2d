"""The hostile files: each case changes a copy of the small real run into something that must not hurt."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_resume.journal import write_line
from hpc_resume.rundir import sealed
from tests.hostile.base import CHANGED, FULL
from tests.hostile.forge import Forge, Row, index_of, rows_of

#: What is put where there should be something else. JSON text, because not all of it can be made by Python.
LIES = {
    "minus-1": "-1",
    "two-to-62": str(2**62),
    "two-to-63": str(2**63),
    "two-to-64-less-8": str(2**64 - 8),
    "4000-digits": "9" * 4000,
    "10000-digits": "9" * 10000,
    "float": "1.5",
    "whole-float": "8.0",
    "1e308": "1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "true": "true",
    "string": '"7"',
    "null": "null",
    "list": "[]",
    "deep": "[" * 900 + "]" * 900,
    "object": "{}",
    "half-a-character": '"\\ud800"',
    "control": '"\\u0000\\u001b[2J"',
    "long-string": '"' + "x" * 100_000 + '"',
}
#: Where such lies are told in the manifest; a number is a place in a list.
MANIFEST_FIELDS = [
    ("attempt",),
    ("step",),
    ("samples",),
    ("created",),
    ("world_size",),
    ("run_id",),
    ("reason",),
    ("content",),
    ("note",),
    ("parent",),
    ("refers",),
    ("refers", 0),
    ("differing_ranks",),
    ("missing_ranks",),
    ("node_type",),
    ("config",),
    ("environment",),
    ("environment", "python"),
    ("costs",),
    ("costs", "write_s"),
    ("shards",),
    ("shards", 0),
    *(
        (("shards", 0, key))
        for key in ("file", "rank", "node", "size_bytes", "index", "table", "digest", "rest")
    ),
    ("shards", 0, "index", 0),
    ("shards", 0, "index", 1),
    ("shards", 0, "table", 0),
    ("shards", 0, "table", 1),
    ("layouts",),
    ("layouts", 0),
    ("layouts", 1, "mesh"),
    ("layouts", 1, "mesh", 0),
    ("layouts", 1, "ranks"),
    ("layouts", 1, "ranks", 0),
    ("layouts", 1, "ranks", 0, 0),
    ("layouts", 1, "ranks", 0, 1),
    ("layouts", 1, "splits"),
    ("layouts", 1, "splits", 0, 0),
    ("layouts", 1, "splits", 0, 1),
    ("tensors",),
    ("tensors", "model/up.weight"),
    ("kinds",),
    ("kinds", "model/up.weight"),
    ("kinds", "model/up.weight", "shape"),
    ("kinds", "model/up.weight", "shape", 0),
    ("kinds", "model/up.weight", "dtype"),
    ("kinds", "model/up.weight", "layout"),
    ("objects",),
    ("objects", "model"),
    ("objects", "optimizer", "param_groups"),
    ("objects", "extra"),
]
#: ... and in the index of a shard.
INDEX_FIELDS = [
    ("files",),
    ("files", 0),
    ("files", 0, 0),
    ("files", 0, 1),
    ("kinds",),
    ("kinds", 0),
    *((("kinds", 0, part)) for part in range(4)),
    ("kinds", 0, 1, 0),
    ("kinds", 0, 2, 0),
    ("kinds", 0, 3, 0),
    *(
        path
        for column in ("names", "kind_of", "runs_of", "run_files", "run_offsets", "run_lengths")
        for path in ((column,), (column, 0))
    ),
]
#: Typed JSON with the wrong content.
OBJECTS = {
    "numpy-object": {"$numpy": ["|O8", "AAAAAAAAAAA="]},
    "numpy-record": {"$numpy": ["f8,f8", "AAAAAAAAAAAAAAAAAAAAAA=="]},
    "numpy-syntax": {"$numpy": ["(" * 5000 + "f8", ""]},
    "numpy-size": {"$numpy": ["<f8", "AAAA"]},
    "numpy-dict": {"$numpy": {"<f8": 1, "AAAAAAAAAAA=": 2}},
    "device": {"$device": "nowhere:0"},
    "device-index": {"$device": "cuda:99999999999999999999"},
    "device-list": {"$device": [["cpu"]]},
    "dtype": {"$dtype": "load"},
    "dtype-lazy": {"$dtype": "_dynamo"},
    "size": {"$size": [2**70, -1]},
    "size-text": {"$size": "abc"},
    "same-cycle": {"a": {"$same": ["extra/a", "extra/b"]}, "b": {"$same": ["extra/b", "extra/a"]}},
    "same-itself": {"$same": ["extra/a", "extra/a"]},
    "same-short": {"$same": ["extra/a"]},
    "tensors-dangling": {"$tensors": ["extra", ["nowhere"]]},
    "tensors-tied-to-nothing": {"$tensors": ["extra", [["np", "extra/nowhere"]]]},
    "tensors-twice": {"$tensors": ["extra", ["np", "np"]]},
    "tensors-of-a-tag": {"$tensors": ["extra", ["$tensor"]]},
    "tensors-nested": {"$tensors": ["extra", [{"$tensor": "extra/np"}]]},
    "tensors-triple": {"$tensors": ["extra", [["np", "extra/np", 1]]]},
    "tensors-text": {"$tensors": ["extra", "np"]},
    "tensors-no-prefix": {"$tensors": [7, ["np"]]},
    "tensors-list": {"$tensors": []},
    "tensor-dangling": {"$tensor": "extra/nowhere"},
    "tensor-number": {"$tensor": 5},
    "ndarray-of-bf16": {"$ndarray": "model/low"},
    "dict-unhashable": {"$dict": [[{"$dict": []}, 1]]},
    "dict-tensor-key": {"$dict": [[{"$tensor": "extra/np"}, 1]]},
    "dict-triple": {"$dict": [[1, 2, 3]]},
    "dict-text": {"$dict": "ab"},
    "dict-flood": {"$dict": [[k * (2**61 - 1), 0] for k in range(20_000)]},
    "set-unhashable": {"$set": [[1]]},
    "set-flood": {"$set": [k * (2**61 - 1) for k in range(20_000)]},
    "float-text": {"$float": "one"},
    "float-number": {"$float": 10**400},
    "complex": {"$complex": [10**400, 0]},
    "complex-text": {"$complex": ["1", "j"]},
    "bytes": {"$bytes": "é"},
    "bytes-list": {"$bytes": [1]},
    "saved-dangling": {"$saved": "extra/nowhere"},
    "saved-number": {"$saved": 7},
    "saved-of-bf16": {"$saved": "model/low"},
    "saved-of-zeros": {"$saved": "extra/np"},
    "unknown-tag": {"$pickle": "gASVAAAAAAAAAA=="},
}
#: Names that leave the folder.
NAMES = {
    "dots": "../../../outside/secret.h5",
    "absolute": "/etc/passwd",
    "dot": ".",
    "empty": "",
    "nul": "rank-00000-of-00002.h5\0",
    "newline": "rank-00000-of-00002.h5\n",
    "other-digits": "rank-0000\u0660-of-00002.h5",
    "backslash": "..\\..\\secret.h5",
    "manifest": "manifest.json",
}


@dataclass(frozen=True)
class Case:
    """One hostile run.

    Parameters
    ----------
    name
        Of the case.
    change
        Makes a copy of the base hostile; its argument is the folder ``run``, beside which lies ``outside``.
    harmless
        Nothing of it is read: it verifies and restores as if nothing had been done.
    unnoticed
        ``hpc-resume verify`` need not see it: bytes and manifest agree, only the state is nonsense.
    """

    name: str
    change: Callable[[Path], None]
    harmless: bool = False
    unnoticed: bool = False


def put(record: Any, path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        record = record[part]
    record[path[-1]] = value


def lie_text(record: Any, path: tuple[Any, ...], text: str) -> bytes:
    """JSON of a record in which something is replaced by other JSON, word for word."""
    copy = json.loads(json.dumps(record))
    put(copy, path, "\0lie")
    return json.dumps(copy).replace('"\\u0000lie"', text).encode()


def _dots(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)).replace("/", "-")


def manifest_lies(record: Any) -> Iterator[tuple[str, bytes]]:
    """Bodies of manifests, each with one lie in one place."""
    for path in MANIFEST_FIELDS:
        if path == ("refers", 0) and not record["refers"]:
            continue
        place = ("kinds", record["tensors"][path[1]], *path[2:]) if path[0] == "kinds" and path[1:] else path
        for what, text in LIES.items():
            yield f"{_dots(path)}={what}", lie_text(record, place, text)[1:] + b"\n"
    for what, text in LIES.items():
        yield f"unknown={what}", lie_text({**record, "x": 0}, ("x",), text)[1:]
    for key in record:
        yield f"without-{key}", json.dumps({k: v for k, v in record.items() if k != key}).encode()[1:]


def index_lies(index: Any) -> Iterator[tuple[str, bytes]]:
    """Indexes, each with one lie in one place."""
    for path in INDEX_FIELDS:
        if path[0] == "files" and len(path) > 1 and not index["files"]:
            continue
        for what, text in LIES.items():
            yield f"{_dots(path)}={what}", lie_text(index, path, text)


def cases() -> list[Case]:
    """All of them."""
    return [
        *_links(),
        *_counts(),
        *_bombs(),
        *_references(),
        *_forged_shards(),
        *_hdf5(),
        *_typed(),
        *_names(),
        *_truncated(),
        *_texts(),
    ]


def _sealed(step: int, edit: Callable[[Forge], Any]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        forge = Forge(run, step)
        edit(forge)
        forge.seal()

    return change


def _recorded(path: tuple[Any, ...], value: Any, step: int = CHANGED) -> Callable[[Path], None]:
    """Record a value; a kind is given by the name of a tensor that is of it."""

    def edit(forge: Forge) -> None:
        place = forge.kind_path(*path[1:]) if path[0] == "kinds" else path
        put(forge.record, place, value)

    return _sealed(step, edit)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def _links() -> Iterator[Case]:
    def outside(run: Path) -> Path:
        return run.parent / "outside"

    def shard(make: Callable[[Path], Any], step: int = FULL) -> Callable[[Path], None]:
        return lambda run: _replace(Forge(run, step).path(0), make)

    def moved(run: Path, path: Path) -> None:
        target = outside(run) / path.name
        path.rename(target)
        path.symlink_to(target)

    yield Case("shard-is-a-link", lambda run: moved(run, Forge(run, FULL).path(0)))
    yield Case("manifest-is-a-link", lambda run: moved(run, Forge(run, CHANGED).folder / "manifest.json"))
    yield Case("checkpoint-is-a-link", lambda run: moved(run, Forge(run, CHANGED).folder))
    yield Case("referred-checkpoint-is-a-link", lambda run: moved(run, Forge(run, FULL).folder))
    yield Case("shard-is-a-link-to-itself", shard(lambda path: path.symlink_to(path)))
    yield Case("shard-is-a-link-to-zeros", shard(lambda path: path.symlink_to("/dev/zero")))
    yield Case("shard-is-a-fifo", shard(os.mkfifo))
    yield Case("shard-is-a-folder", shard(Path.mkdir))
    yield Case("shard-is-a-socket", shard(_socket))
    yield Case("shard-is-gone", shard(lambda path: None))
    yield Case(
        "manifest-is-a-fifo",
        lambda run: _replace(Forge(run, CHANGED).folder / "manifest.json", os.mkfifo),
    )
    yield Case(
        "manifest-is-a-folder",
        lambda run: _replace(Forge(run, CHANGED).folder / "manifest.json", Path.mkdir),
    )
    yield Case("checkpoint-is-a-file", lambda run: _replace(Forge(run, CHANGED).folder, Path.touch))
    yield Case("checkpoint-is-a-fifo", lambda run: _replace(Forge(run, CHANGED).folder, os.mkfifo))
    yield Case("identity-is-a-fifo", lambda run: _replace(run / "run.json", os.mkfifo))
    yield Case("journal-is-a-fifo", lambda run: _replace(run / "attempts/0001/events.jsonl", os.mkfifo))
    yield Case("attempt-is-a-fifo", lambda run: _replace(run / "attempts/0001/attempt.json", os.mkfifo))
    yield Case("a-stranger-in-the-folder", lambda run: (Forge(run, CHANGED).folder / "x.h5").touch())
    yield Case("a-stranger-beside", lambda run: (run / "checkpoints" / "\x1b[2J").mkdir())


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _counts() -> Iterator[Case]:
    layout, tensor = ("layouts", 1), ("kinds", "model/up.weight")
    for name, path, value in (
        ("a-million-ranks", ("world_size",), 10**6),
        ("ranks-beyond", (*layout, "ranks"), [[0, 3]]),
        ("a-huge-run-of-ranks", (*layout, "ranks"), [[0, 2**62]]),
        ("ranks-twice", (*layout, "ranks"), [[0, 1], [0, 1]]),
        ("a-mesh-that-does-not-multiply", (*layout, "mesh"), [3]),
        ("a-mesh-of-huge-numbers", (*layout, "mesh"), [10**3000] * 500),
        ("a-mesh-of-a-million-ones", (*layout, "mesh"), [1] * 200_000 + [2]),
        ("an-empty-mesh", (*layout, "mesh"), []),
        ("splits-of-no-mesh-dimension", (*layout, "splits"), [[7, 0]]),
        ("splits-of-no-dimension", (*layout, "splits"), [[0, 7]]),
        ("splits-twice", (*layout, "splits"), [[0, 0], [0, 0]]),
        ("no-such-layout", (*tensor, "layout"), 9),
        ("a-shape-that-overflows", (*tensor, "shape"), [2**32, 2**32, 2**32]),
        ("a-shape-that-overflows-beside-nothing", (*tensor, "shape"), [0, 2**62, 2**62]),
        ("a-million-dimensions", (*tensor, "shape"), [1] * 200_000),
        ("65-dimensions", (*tensor, "shape"), [1] * 65),
        ("64-dimensions", (*tensor, "shape"), [1] * 62 + [384, 128]),
        ("a-larger-tensor", (*tensor, "shape"), [384_000, 128]),
        ("another-type", (*tensor, "dtype"), "float16"),
        ("no-type", (*tensor, "dtype"), "object"),
        ("no-rank", ("differing_ranks",), [5]),
        ("a-shard-too-few", ("shards",), []),
        ("a-table-that-is-longer", ("shards", 0, "table"), [0, 2**40]),
        ("an-index-that-overlaps-the-end", ("shards", 0, "index"), [2**40, 100]),
    ):
        yield Case(name, _recorded(path, value))

    def many_layouts(forge: Forge) -> None:
        world_size = 2_000
        shard = forge.record["shards"][0]
        forge.record["world_size"] = world_size
        forge.record["shards"] = [
            {**shard, "rank": rank, "file": f"rank-{rank:05d}-of-{world_size:05d}.h5"}
            for rank in range(world_size)
        ]
        everybody = {"mesh": [world_size], "ranks": [[0, world_size]], "splits": []}
        forge.record["layouts"] = [everybody] * 10_000

    def many_tensors(forge: Forge) -> None:
        one = {"shape": [2**40], "dtype": "uint8", "layout": 0}
        forge.record["kinds"] = [one]
        forge.record["tensors"] = {f"t{n}": 0 for n in range(2_000)}

    def tangled(forge: Forge) -> None:
        n = 5_000
        pieces = [[0, [0, column], [1, 1]] for column in range(n)]
        forge.set_kind("model/up.weight", {"shape": [1, n], "dtype": "uint8", "pieces": pieces})

    def pinwheels(forge: Forge) -> None:
        turns = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])]
        pieces = [
            [0, [start[0] + 3 * row, start[1] + 3 * column], size]
            for row in range(20)
            for column in range(20)
            for start, size in turns
        ]
        shape = [60, 60]
        forge.set_kind("model/up.weight", {"shape": shape, "dtype": "uint8", "pieces": pieces})

    def steps(forge: Forge) -> None:
        n = 1_500  # a row and a column off, n times over
        pieces = [[0, [i, i], [1, n - i]] for i in range(n)]
        pieces += [[0, [i + 1, i], [n - i - 1, 1]] for i in range(n - 1)]
        forge.set_kind("model/up.weight", {"shape": [n, n], "dtype": "uint8", "pieces": pieces})

    def overlapping(forge: Forge) -> None:
        pieces = [[0, [0, 0], [384, 128]], [1, [0, 0], [384, 128]]]
        forge.set_kind("model/up.weight", {"shape": [384, 128], "dtype": "float32", "pieces": pieces})

    def many_kinds(forge: Forge) -> None:
        forge.record["kinds"] += [{"shape": [1] * 60, "dtype": "uint8", "layout": 0}] * 20_000

    yield Case("many-kinds", _sealed(CHANGED, many_kinds), harmless=True)
    for edit in (many_layouts, many_tensors, tangled, pinwheels, steps, overlapping):
        yield Case(edit.__name__.replace("_", "-"), _sealed(CHANGED, edit))


def _bombs() -> Iterator[Case]:
    def body(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            forge = Forge(run, CHANGED)
            forge.seal(data(json.dumps(forge.record).encode()[1:]))

        return change

    nested = {f"{n}-deep": n for n in (90, 400, 5_000, 1_000_000)}
    for name, depth in nested.items():
        text = b"[" * depth + b"]" * depth
        bomb = text if depth < 1000 else b"[" * depth
        yield Case(
            f"objects-{name}",
            body(lambda data, bomb=bomb: data[:-1].replace(b'"seed", 1]', b'"seed", ' + bomb + b"]") + b"}"),
            harmless=depth < 100,
            unnoticed=depth < 1000,
        )
        yield Case(
            f"environment-{name}",
            body(lambda data, bomb=bomb: data.replace(b'{"python": "3"}', b'{"python": ' + bomb + b"}")),
        )
        dicts = b'{"a":' * depth + b"1" + b"}" * depth
        yield Case(
            f"costs-{name}-in-dicts",
            body(lambda data, dicts=dicts: data.replace(b'"write_s": 0.0', b'"write_s": ' + dicts)),
        )
    yield Case("a-key-twice", body(lambda data: data[:-1] + b', "step": 8}'))
    yield Case(
        "a-tensor-twice",
        body(lambda data: data.replace(b'"tensors": {', b'"tensors": {"model/count": 0, ')),
    )
    yield Case("no-end", body(lambda data: data[:-1]))
    yield Case("more-behind-the-end", body(lambda data: data + b"{}"))
    yield Case("no-utf8", body(lambda data: data.replace(b"cadence", b"\xff\xfe")))
    yield Case("long-utf8", body(lambda data: data.replace(b"cadence", b"\xc0\x80")))
    yield Case("utf16", body(lambda data: ("{" + data.decode()).encode("utf-16-le")[1:]))
    yield Case("zeros", body(lambda data: bytes(len(data))))
    yield Case("nothing", body(lambda data: b""))
    yield Case("a-list", body(lambda data: b"]"))
    yield Case("nan", body(lambda data: data.replace(b'"created": 1700000000.0', b'"created": NaN')))
    yield Case("a-comment", body(lambda data: b" /* */ " + data))
    yield Case("megabytes-of-spaces", body(lambda data: data[:-1] + b" " * (8 << 20) + b"}"), harmless=True)
    yield Case(
        "megabytes-of-lists",
        body(lambda data: data[:-1].replace(b'"seed", 1]', b'"seed", [' + b"[]," * 50_000 + b"[]]]") + b"}"),
        harmless=True,
    )

    def sparse(run: Path) -> None:
        with (Forge(run, CHANGED).folder / "manifest.json").open("r+b") as file:
            file.truncate(1 << 40)

    yield Case("a-manifest-of-a-terabyte", sparse)

    def zip_bomb(run: Path) -> None:
        with (run / "run.json").open("r+b") as file:
            file.truncate(1 << 40)

    yield Case("an-identity-of-a-terabyte", zip_bomb)
    yield Case("an-identity-90000-deep", lambda run: (run / "run.json").write_bytes(b"[" * 90_000))
    yield Case(
        "a-journal-90000-deep",
        lambda run: (run / "attempts/0001/events.jsonl").write_bytes(b"[" * 90_000 + b"\n"),
    )
    yield Case(
        "an-attempt-90000-deep", lambda run: (run / "attempts/0001/attempt.json").write_bytes(b"[" * 90_000)
    )
    yield Case(
        "an-attempt-400-deep",
        lambda run: (run / "attempts/0001/attempt.json").write_bytes(
            b'{"schema": 2, "attempt": 1, "x": ' + b"[" * 400 + b"]" * 400 + b"}"
        ),
    )
    yield Case("an-attempt-far-off", lambda run: (run / "attempts" / "999999999999999999").mkdir())
    yield Case("a-configuration-outside", _recorded(("config",), "../../outside/secret"))
    yield Case("a-configuration-of-a-long-name", _recorded(("config",), "0" * 100_000))
    wrong = {"event": "restored", "step": "x", "t": "y", "decision": [], "cause": {}}
    yield Case(
        "a-journal-of-other-types",
        lambda run: (run / "attempts/0001/events.jsonl").write_bytes(write_line(wrong)),
        harmless=True,
    )
    odd = {
        "schema": 2,
        "attempt": 1,
        "nodes": 5,
        "started": "yesterday",
        "world_size": [],
        "job_id": {},
        "node_type": 1,
        "rendezvous": 2,
    }
    yield Case(
        "an-attempt-of-other-types",
        lambda run: (run / "attempts/0001/attempt.json").write_bytes(sealed(odd)),
        harmless=True,
    )


def _references() -> Iterator[Case]:
    def refer(checkpoint: Callable[[Forge], str], *, known: bool = True) -> Callable[[Path], None]:
        def edit(forge: Forge) -> None:
            name = checkpoint(forge)
            if known:
                forge.record["refers"] = [name]
            forge.edit_index(0, lambda index: put(index, ("files", 0, 0), name))

        return _sealed(CHANGED, edit)

    yield Case("refers-to-itself", refer(lambda forge: forge.folder.name))
    yield Case("refers-to-a-later-one", refer(lambda forge: "0000000009-01234567"))
    yield Case("refers-to-a-missing-one", refer(lambda forge: "0000000006-01234567"))
    yield Case("refers-to-one-unknown", refer(lambda forge: "0000000006-01234567", known=False))
    yield Case("refers-outside", refer(lambda forge: "../../outside"))
    yield Case("refers-to-nothing", refer(lambda forge: ""))

    def other_run(run: Path) -> None:
        forge = Forge(run, FULL)
        forge.record["run_id"] = "0" * 32
        old = forge.folder.name
        new = forge.seal().name
        later = Forge(run, CHANGED)
        later.record["refers"] = [new]
        for rank in range(2):
            index = later.index(rank)
            index["files"] = [[new, file] for _, file in index["files"]]
            later.put_index(rank, index)
        assert old != new
        later.seal()

    yield Case("refers-to-one-of-another-run", other_run)

    def back(run: Path) -> None:
        forge = Forge(run, FULL)
        later = Forge(run, CHANGED)
        forge.record["refers"] = [later.folder.name]
        index = forge.index(0)
        index["files"] = [[later.folder.name, later.path(0).name]]
        forge.put_index(0, index)
        forge.seal()

    yield Case("refers-back-to-one-that-refers-to-it", back)

    def own_shard(forge: Forge) -> None:
        forge.edit_index(0, lambda index: put(index, ("files", 0, 1), "rank-00001-of-00002.h5"))

    yield Case("refers-to-another-ranks-shard", _sealed(CHANGED, own_shard))

    def far(forge: Forge) -> None:
        def edit(index: dict) -> None:
            index["run_offsets"][next(n for n, file in enumerate(index["run_files"]) if file)] = 2**61

        forge.edit_index(0, edit)

    yield Case("refers-beyond-the-end", _sealed(CHANGED, far))

    def crowd(forge: Forge) -> None:
        names = [f"{n:010d}-01234567" for n in range(6)]
        forge.record["refers"] += names
        extra = [[name, "rank-00000-of-00002.h5"] for name in names] * 2_000
        forge.edit_index(0, lambda index: index["files"].extend(extra))

    yield Case("refers-to-a-crowd", _sealed(CHANGED, crowd))


def _forged_shards() -> Iterator[Case]:
    def piece(part: int, value: Any, *, number: int = 0) -> Callable[[Path], None]:
        return _sealed(FULL, lambda forge: forge.edit_rows(0, lambda rows: put(rows, (number, part), value)))

    yield Case("a-run-beyond-the-end", piece(5, [[0, 2**62, 8]]))
    yield Case("a-run-of-a-file-that-is-not-listed", piece(5, [[7, 0, 8]]))
    yield Case("many-runs-of-one-byte", piece(5, [[0, 0, 1]] * 20_000))
    yield Case("an-empty-box", piece(4, [0]))
    yield Case("a-box-outside", piece(3, [2**62]))
    yield Case("another-tensor", piece(0, "model/other"))
    yield Case("another-shape", piece(2, [7]))

    def shared(forge: Forge) -> None:
        def edit(rows: list[Row]) -> None:
            big = [row for row in rows if row[4] and sum(run[2] for run in row[5]) > 4096]
            big[1][2:] = big[0][2:]

        forge.edit_rows(0, edit)

    yield Case("two-boxes-in-one-place", _sealed(FULL, shared))

    def twice(forge: Forge) -> None:
        forge.edit_rows(0, lambda rows: rows.append(rows[0]))

    yield Case("a-box-twice", _sealed(FULL, twice))

    def swapped(forge: Forge) -> None:
        forge.edit_rows(0, list.reverse)

    yield Case("checksums-of-others", _sealed(FULL, swapped))

    def claims(forge: Forge) -> None:
        """Pieces that claim many blocks each, more than there are checksums."""
        table = bytes(8 * 4_000)
        size = 4_000 * 131_072
        rows = [[f"t{n}", "uint8", [size + n], [0], [size + n], [[0, 0, size + n]]] for n in range(4_000)]
        with forge.path(0).open("r+b") as file:
            file.truncate(1 << 34)
        forge.put_index(0, index_of(rows), table)

    def wrapping(forge: Forge) -> None:
        """Runs whose lengths add up to the right one in 64 bits."""

        def edit(rows: list[Row]) -> None:
            rows[0][5] = [[0, 0, 2**62 - 1]] * 4 + [[0, 0, rows[0][5][0][2] + 4]]

        forge.edit_rows(0, edit)

    yield Case("runs-that-wrap-around", _sealed(FULL, wrapping))

    def crowded(forge: Forge) -> None:
        """More kinds than boxes."""
        forge.edit_index(
            0, lambda index: index["kinds"].extend([["uint8", [1] * 60, [0] * 60, [1] * 60]] * 50_000)
        )

    yield Case("more-kinds-than-boxes", _sealed(FULL, crowded))
    yield Case("boxes-of-more-blocks-than-checksums", _sealed(FULL, claims))

    def holes(forge: Forge) -> None:
        """An index and a table in the holes of a sparse file."""
        with forge.path(0).open("r+b") as file:
            file.truncate(1 << 40)
        shard = forge.record["shards"][0]
        shard.update(size_bytes=1 << 40, index=[1 << 30, 1 << 30], table=[1 << 31, 1 << 30])

    yield Case("an-index-of-a-gigabyte-of-nothing", _sealed(FULL, holes))

    def big_hole(forge: Forge) -> None:
        """A tensor of a terabyte in a sparse file, each promise kept but the checksums."""
        with forge.path(0).open("r+b") as file:
            file.truncate(1 << 40)
        forge.record["shards"][0]["size_bytes"] = 1 << 40
        shape = [1 << 24, 1 << 14]
        forge.set_kind("extra/np", {"shape": shape, "dtype": "float32", "layout": 0})

    yield Case("a-tensor-of-a-terabyte", _sealed(FULL, big_hole))

    def rest(forge: Forge) -> None:
        with forge.path(0).open("r+b") as file:
            file.write(b"MZ")

    yield Case("another-header", _sealed(FULL, rest))
    yield Case("an-index-that-is-no-json", _sealed(FULL, lambda forge: forge.put_index(0, b"\xff" * 100)))
    yield Case("an-index-90000-deep", _sealed(FULL, lambda forge: forge.put_index(0, b"[" * 90_000)))
    yield Case("an-empty-index", _sealed(FULL, lambda forge: forge.put_index(0, index_of([]), b"")))
    yield Case(
        "a-table-cut-off",
        _sealed(FULL, lambda forge: forge.put_index(0, forge.index(0), forge.table(0)[:-3])),
    )
    yield Case(
        "a-checksum-less",
        _sealed(FULL, lambda forge: forge.put_index(0, forge.index(0), forge.table(0)[:-8])),
    )
    yield Case(
        "wrong-checksums",
        _sealed(FULL, lambda forge: forge.put_index(0, forge.index(0), bytes(len(forge.table(0))))),
    )

    def generators(forge: Forge) -> None:
        def edit(rows: list[Row]) -> None:
            for row in rows:
                if row[0].endswith("rng/torch"):
                    row[0] = row[0].replace("rng/torch", "rng/numpy")
                elif row[0].endswith("rng/numpy"):
                    row[0] = row[0].replace("rng/numpy", "rng/torch")

        forge.edit_rows(0, edit)

    yield Case("generators-exchanged", _sealed(FULL, generators), unnoticed=True)

    def segments(forge: Forge) -> None:
        """A right segment over wrong blocks: whole reads are sound, partial ones would not be."""
        table = bytearray(forge.table(0))
        index = forge.index(0)
        first = next(at for at, row in enumerate(rows_of(index)) if sum(run[2] for run in row[5]) > 65536)
        table[first * 8] ^= 1  # all before it are single blocks
        forge.put_index(0, index, bytes(table))

    yield Case("blocks-that-differ-from-their-segment", _sealed(FULL, segments))


def _hdf5() -> Iterator[Case]:
    """What HDF5 would follow, in the metadata of a shard that is right otherwise; our reader never looks there."""

    def planted(make: Callable[[h5py.File, str], Any]) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            shutil.rmtree(Forge(run, CHANGED).folder)  # refers to bytes that are going to move
            _plant(Forge(run, FULL), str(run.parent / "outside" / "secret.h5"), make)

        return change

    yield Case(
        "external-link",
        planted(lambda file, secret: file.__setitem__("link", h5py.ExternalLink(secret, "/"))),
        harmless=True,
    )
    yield Case(
        "soft-link-to-itself",
        planted(lambda file, secret: file.__setitem__("loop", h5py.SoftLink("/loop"))),
        harmless=True,
    )
    yield Case(
        "external-storage",
        planted(lambda file, secret: file.create_dataset("outside", (8,), "u1", external=[(secret, 0, 8)])),
        harmless=True,
    )
    yield Case(
        "filters",
        planted(
            lambda file, secret: file.create_dataset(
                "packed2", data=np.zeros(9999), compression="gzip", chunks=(999,)
            )
        ),
        harmless=True,
    )
    yield Case(
        "virtual",
        planted(lambda file, secret: file.create_virtual_dataset("virtual", _virtual(secret))),
        harmless=True,
    )


def _virtual(secret: str) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((8,), "u1")
    layout[:] = h5py.VirtualSource(secret, "secret", (8,))
    return layout


def _plant(forge: Forge, secret: str, make: Callable[[h5py.File, str], Any]) -> None:
    """Put a foreign HDF5 file before a shard: what HDF5 then sees is the trap, and everything else moves."""
    path = forge.path(1)
    old, index, table = path.read_bytes(), forge.index(1), forge.table(1)
    with h5py.File(path, "w") as file:
        make(file, secret)
    size_bytes = -(-path.stat().st_size // 4096) * 4096
    with path.open("r+b") as file:
        file.seek(size_bytes)
        file.write(old)
    index["run_offsets"] = [offset + size_bytes for offset in index["run_offsets"]]
    forge.put_index(1, index, table)
    forge.seal()


def _typed() -> Iterator[Case]:
    yield Case("rank-0-differs", _recorded(("differing_ranks",), [0]), unnoticed=True)
    for name, value in OBJECTS.items():
        yield Case(f"typed-{name}", _recorded(("objects", "extra"), {"x": value}), unnoticed=True)
        if name in {"tensor-dangling", "same-cycle", "ndarray-of-bf16", "same-itself"}:
            yield Case(f"typed-model-{name}", _recorded(("objects", "model"), {"x": value}), unnoticed=True)
    yield Case("typed-model-a-list", _recorded(("objects", "model"), []), unnoticed=True)
    for key in ("state", "param_groups"):
        yield Case(
            f"typed-optimizer-no-{key}", _recorded(("objects", "optimizer", key), None), unnoticed=True
        )
    params = ("objects", "optimizer", "param_groups", 0, "params")
    yield Case("typed-optimizer-other-parameters", _recorded(params, ["nowhere"]), unnoticed=True)


def _names() -> Iterator[Case]:
    for what, name in NAMES.items():
        yield Case(f"shard-named-{what}", _recorded(("shards", 0, "file"), name, FULL))

        def edit(forge: Forge, name: str = name) -> None:
            forge.edit_index(0, lambda index: put(index, ("files", 0, 1), name))

        yield Case(f"referred-shard-named-{what}", _sealed(CHANGED, edit))
        yield Case(f"parent-named-{what}", _recorded(("parent",), name))


def _texts() -> Iterator[Case]:
    steer = "\x1b]0;owned\x07\x1b[2J\u202e\n  0  fake  row"

    def name(text: str) -> Callable[[Path], None]:
        def edit(forge: Forge) -> None:
            forge.set_kind(text, {"shape": [], "dtype": "int64", "layout": 0})

        return _sealed(CHANGED, edit)

    yield Case("a-tensor-that-steers-the-terminal", name(steer))
    yield Case("a-tensor-with-nul", name("a\0b"))
    yield Case("a-tensor-of-half-a-character", name("\ud800"))
    yield Case("a-tensor-without-name", name(""))
    yield Case("a-node-that-steers-the-terminal", _recorded(("node_type",), steer), harmless=True)
    yield Case("a-reason-that-steers-the-terminal", _recorded(("reason",), steer), harmless=True)
    yield Case("a-run-that-steers-the-terminal", _recorded(("run_id",), steer))
    yield Case("the-year-10000", _recorded(("created",), 253402300800))
    yield Case("before-1970", _recorded(("created",), -1.0))


#: Of a file's length.
CUTS = [*(n / 16 for n in range(16)), -1]
#: ... of one that is a few lines.
FEW_CUTS = [0, 1 / 2, -1]


def _truncated() -> Iterator[Case]:
    files: dict[str, Callable[[Path], Path]] = {
        "manifest": lambda run: Forge(run, CHANGED).folder / "manifest.json",
        "shard": lambda run: Forge(run, FULL).path(0),
        "changed-shard": lambda run: Forge(run, CHANGED).path(0),
        "identity": lambda run: run / "run.json",
        "attempt": lambda run: run / "attempts/0001/attempt.json",
    }

    def cut(file: Callable[[Path], Path], part: float) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            path = file(run)
            size_bytes = path.stat().st_size
            os.truncate(path, size_bytes - 1 if part == -1 else int(size_bytes * part))

        return change

    for name, file in files.items():
        for part in CUTS if name in {"manifest", "shard", "changed-shard"} else FEW_CUTS:
            yield Case(f"{name}-cut-at-{part}", cut(file, part))

    def longer(run: Path) -> None:
        with Forge(run, FULL).path(1).open("ab") as file:
            file.write(b"\0")

    yield Case("a-byte-more", longer)
