"""Folders of ``torch.distributed.checkpoint``: its ``.metadata`` is a pickle, and is read without running code.

The unpickler admits the handful of names that PyTorch writes there, and gives for each one an inert record of
our own: nothing of PyTorch is called, and nothing that a hostile file sets on them outlives the reading.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from hpc_resume.checkpoint import dtypes
from hpc_resume.checkpoint.boxes import Box, covers_once
from hpc_resume.checkpoint.leaves import flatten
from hpc_resume.checkpoint.saved import load_saved
from hpc_resume.errors import IntegrityError, StateError
from hpc_resume.exchange.incoming import Incoming, Item
from hpc_resume.exchange.tree import Path as TreePath
from hpc_resume.exchange.tree import nested

METADATA = ".metadata"
_LONGEST_BYTES = 1 << 30
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    _METADATA_MODULE: {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")


class _Record:
    """An instance of an admitted class: what it was built from, and nothing else."""

    kind = ""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __new__(cls, *_: Any, **__: Any) -> _Record:
        made = super().__new__(cls)
        made.args, made.state = (), {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)  # a key of storage_data gets its fields after it became one, or never

    def field(self, name: str) -> Any:
        if not isinstance(self.state, dict) or name not in self.state:
            raise IntegrityError(f"a {self.kind} without {name}")
        return self.state[name]


class _Unpickler(pickle._Unpickler):  # noqa: SLF001 - the one without C
    """Python's own: unlike the one in C it takes no memory by what a file claims."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = module, name
        if key not in self._classes:
            self._classes[key] = _admit(module, name)
        return self._classes[key]


def _admit(module: str, name: str) -> Any:
    if name in _RECORDS.get(module, ()):
        return type(name, (_Record,), {"kind": name})
    if module == "torch":
        if name == "Size":
            return lambda sizes=(): tuple(sizes)
        if isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
    harmless: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch.serialization", "_get_layout"): str,
        ("collections", "OrderedDict"): dict,
        ("pathlib", "PosixPath"): lambda *parts: PurePosixPath(*map(str, parts)),
        ("pathlib._local", "PosixPath"): lambda *parts: PurePosixPath(*map(str, parts)),
    }
    if (module, name) in harmless:
        return harmless[module, name]
    raise IntegrityError(
        f"refused: it names {module!s:.100}.{name!s:.100}, which is nothing that torch.distributed.checkpoint writes "
        "there; loading it could run code"
    )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stored box of a tensor, or a saved object: a file of ``torch.save`` within a file."""

    file: Path
    offset: int
    length: int
    box: Box | None

    def load(self) -> Any:
        """Load it.

        Raises
        ------
        IntegrityError
            If its bytes are not there.
        """
        fd = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if self.offset + self.length > os.fstat(fd).st_size:
                raise IntegrityError(f"{self.file}: ends before byte {self.offset + self.length}")
            data = os.pread(fd, self.length, self.offset)
            while len(data) < self.length and (
                more := os.pread(fd, self.length - len(data), self.offset + len(data))
            ):
                data += more
        finally:
            os.close(fd)
        try:
            return load_saved(data)
        except StateError as error:
            raise StateError(
                f"{self.file}: bytes {self.offset} to {self.offset + self.length}: {error}"
            ) from error


def read(folder: Path) -> tuple[list[tuple[TreePath, Any]], Mapping[int, Item]]:
    """Read what a folder holds.

    Returns
    -------
    list of (path, value)
        For each entry its path in the state, and its value; for a tensor a stand-in.
    dict
        The tensors by ``id`` of their stand-ins.

    Raises
    ------
    IntegrityError
        If it is damaged, or would run code.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_BYTES + 1)
        if len(data) > _LONGEST_BYTES:
            raise IntegrityError(f"longer than {_LONGEST_BYTES} bytes")
        record = _Unpickler(io.BytesIO(data)).load()
        return _entries(folder, record)
    except (IntegrityError, StateError) as error:
        raise type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    except Exception as error:  # a pickle can end in any of them
        raise IntegrityError(f"{path}: damaged ({type(error).__name__}: {error!s:.200})") from error


def _entries(folder: Path, record: Any) -> tuple[list[tuple[TreePath, Any]], Mapping[int, Item]]:
    metadata = _kind(record, "Metadata")
    paths = metadata.field("planner_data")
    stored: dict[str, dict[tuple[int, ...] | None, _Chunk]] = {}
    for index, info in metadata.field("storage_data").items():
        name, offset, chunk = _chunk(folder, index, info)
        stored.setdefault(name, {})[offset] = chunk
    found: list[tuple[TreePath, Any]] = []
    items: dict[int, Item] = {}
    for name, entry in metadata.field("state_dict_metadata").items():
        place = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        if not place or not all(type(part) in {str, int} for part in place):
            raise IntegrityError(f"{name}: a path of {place!r:.100}")
        chunks = stored.get(name, {})
        if isinstance(entry, _Record) and entry.kind == "BytesStorageMetadata":
            if None not in chunks:
                raise IntegrityError(f"{name}: its bytes are stored nowhere")
            try:
                found.append((tuple(place), chunks[None].load()))
            except StateError as error:
                raise StateError(f"{name}: {error}") from error
            continue
        stand_in = torch.empty(0)
        items[id(stand_in)] = _tensor(name, _kind(entry, "TensorStorageMetadata"), chunks)
        found.append((tuple(place), stand_in))
    return found, items


def _chunk(folder: Path, index: Any, info: Any) -> tuple[str, tuple[int, ...] | None, _Chunk]:
    name, offset = _kind(index, "MetadataIndex").field("fqn"), index.state.get("offset")
    place = _kind(info, "_StorageInfo")
    file, begin, length = (place.field(each) for each in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise IntegrityError(f"{name}: stored in {file!r:.100}, which is no file of the folder")
    if not isinstance(begin, int) or not isinstance(length, int) or begin < 0 or length < 0:
        raise IntegrityError(f"{name}: stored at byte {begin!r:.40} of length {length!r:.40}")
    if place.state.get("transform_descriptors"):
        raise StateError(
            f"{name}: was transformed by an extension when it was written; load it with DCP itself"
        )
    return name, None if offset is None else tuple(offset), _Chunk(folder / file, begin, length, None)


def _tensor(name: str, entry: _Record, stored: Mapping[tuple[int, ...] | None, _Chunk]) -> Item:
    shape = tuple(entry.field("size"))
    properties = _kind(entry.field("properties"), "TensorProperties").state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(f"{name}: an element type of {dtype!r:.40}")
    spelled = dtypes.name_of(dtype)
    chunks = []
    for record in entry.field("chunks"):
        chunk = _kind(record, "ChunkStorageMetadata")
        box = Box(tuple(chunk.field("offsets")), tuple(chunk.field("sizes")))
        if not box.volume:
            continue
        if box.start not in stored:
            raise IntegrityError(f"{name}: the chunk at {list(box.start)} is stored nowhere")
        where = stored[box.start]
        chunks.append(_Chunk(where.file, where.offset, where.length, box))
    if not covers_once(shape, [chunk.box for chunk in chunks if chunk.box is not None]):
        raise IntegrityError(f"{name}: its chunks do not tile {list(shape)} exactly once")

    def load() -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype)
        for chunk in chunks:
            assert chunk.box is not None
            values = chunk.load()
            if not isinstance(values, torch.Tensor) or tuple(values.shape) != chunk.box.size:
                raise IntegrityError(f"{chunk.file}: {name}: another tensor is stored there")
            if values.dtype != dtype:
                raise IntegrityError(f"{chunk.file}: {name}: {values.dtype}, but {dtype} was announced")
            out[chunk.box.slices_in(Box.whole(shape))].copy_(values)
        return out

    return Item(shape, spelled, load)


def _kind(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or value.kind != kind:
        raise IntegrityError(f"a {type(value).__name__:.40} in place of a {kind}")
    return value


def incoming(folder: Path, key: str | None) -> Incoming:
    """Open a folder for an import; the tensors are read when they are asked for.

    Parameters
    ----------
    folder
        It holds ``.metadata``.
    key
        The tracked key to put everything under; see :func:`hpc_resume.exchange.torchfile.read`.
    """
    from hpc_resume.exchange.torchfile import by_key

    entries, items = read(folder)
    state = by_key(folder, nested(entries), key)
    tree: dict[str, Any] = {}
    tensors: dict[str, Item] = {}
    for name, value in state.items():
        tree[name], leaves = flatten(name, value)
        tensors.update({stored: _item(leaf, items) for stored, leaf in leaves.items()})
    return Incoming(tree, tensors)


def _item(leaf: torch.Tensor, items: Mapping[int, Item]) -> Item:
    """Give the tensor behind a stand-in; one that was stored within an object is there already."""
    if id(leaf) in items:
        return items[id(leaf)]
    return Item(tuple(leaf.shape), dtypes.name_of(leaf.dtype), lambda: leaf)
