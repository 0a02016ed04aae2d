"""What an HDF5 file holds, object by object: the same for the same contents, however the file lays them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from blake3 import blake3

from hpc_resume.provenance.datasnapshot import HASH_DIGITS

#: The first bytes of an HDF5 file. Source: HDF5 File Format Specification, II.A.
MAGIC = b"\x89HDF\r\n\x1a\n"
#: Read at once.
_PIECE_BYTES = 8 << 20
#: What stands for the contents of something that has none.
_NONE = "-"


class Halted(Exception):  # noqa: N818 - no error: nobody wants the result any more
    """Nobody wants the result any more."""


def look_inside(
    path: str | Path, *, halted: Callable[[], bool] = lambda: False
) -> dict[str, tuple[str, ...]] | None:
    """Give for each object its element type, its shape, and digests of its attributes and contents.

    Links are told as links, not followed, so what other files hold is theirs.

    Parameters
    ----------
    path
        An HDF5 file.
    halted
        Asked between pieces whether to give up.

    Returns
    -------
    dict or None
        By path in the file; ``None`` if h5py can't read all of it, such as filters that are not installed.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return dict(_walk(h5py, file, halted))
    except Halted:
        return None
    except Exception:  # noqa: BLE001 - HDF5 raises anything; the bytes of the file count then
        return None


def _walk(h5py: Any, file: Any, halted: Callable[[], bool]) -> Iterator[tuple[str, tuple[str, ...]]]:
    root = file["/"]
    groups = {_place(h5py, root): "/"}
    known: dict[int, tuple[str, ...]] = {}
    todo = [("/", root)]
    while todo:
        name, group = todo.pop()
        yield name, ("group", _NONE, _attributes(h5py, group), _NONE)
        for key in sorted(group, reverse=True):
            below = f"{name.rstrip('/')}/{key}"
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                yield below, _link(getattr(link, "filename", ""), link.path)
                continue
            thing = group[key]
            place = _place(h5py, thing)
            if not isinstance(thing, h5py.Group):
                if place not in known:  # else it is there under another name, too
                    known[place] = _describe(h5py, thing, halted)
                yield below, known[place]
            elif place in groups:  # it may well be one above this one
                yield below, _link(groups[place])
            else:
                groups[place] = below
                todo.append((below, thing))


def _describe(h5py: Any, thing: Any, halted: Callable[[], bool]) -> tuple[str, ...]:
    if isinstance(thing, h5py.Dataset):
        contents = _contents(h5py, thing, halted)
        return _type(h5py, thing), _shape(thing), _attributes(h5py, thing), contents
    return "type", _NONE, _attributes(h5py, thing), _digest(repr(thing.dtype).encode())


def _link(*target: str) -> tuple[str, ...]:
    return "link", _NONE, _NONE, _digest(json.dumps(target).encode())


def _place(h5py: Any, thing: Any) -> int:
    return int(h5py.h5o.get_info(thing.id).addr)


def _contents(h5py: Any, dataset: Any, halted: Callable[[], bool]) -> str:
    if dataset.shape is None:
        return _NONE
    hasher = blake3()
    for place in _pieces(dataset.shape, dataset.dtype.itemsize, dataset.chunks):
        if halted():
            raise Halted
        _feed(h5py, hasher, dataset[place])
    return str(hasher.hexdigest()[:HASH_DIGITS])


def _pieces(
    shape: tuple[int, ...], item_bytes: int, chunks: tuple[int, ...] | None
) -> Iterator[tuple[Any, ...]]:
    """Cut a dataset into pieces that follow each other in C order; whole chunks, where that is possible."""
    if 0 in shape:
        return
    axis = 0
    while axis < len(shape) - 1 and prod(shape[axis + 1 :]) * item_bytes > _PIECE_BYTES:
        axis += 1
    if not shape:
        yield ()
        return
    rows = max(_PIECE_BYTES // max(prod(shape[axis + 1 :]) * item_bytes, 1), 1)
    if chunks is not None:
        rows = max(rows // chunks[axis], 1) * chunks[axis]
    for outer in _indices(shape[:axis]):
        for start in range(0, shape[axis], rows):
            yield (*outer, slice(start, start + rows))


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for outer in _indices(shape[:-1]):
        for index in range(shape[-1]):
            yield (*outer, index)


def _attributes(h5py: Any, thing: Any) -> str:
    hasher = blake3()
    empty = True
    for name in sorted(thing.attrs):
        value = thing.attrs.get_id(name)
        empty = False
        hasher.update(json.dumps([name, _kind(h5py, value.dtype), list(value.shape or ())]).encode())
        _feed(h5py, hasher, thing.attrs[name])
    return _NONE if empty else str(hasher.hexdigest()[:HASH_DIGITS])


def _type(h5py: Any, dataset: Any) -> str:
    dtype = dataset.dtype
    return _kind(h5py, dtype) if dtype.kind in "OV" else str(dtype.str)


def _kind(h5py: Any, dtype: Any) -> str:
    text, items = h5py.check_string_dtype(dtype), h5py.check_vlen_dtype(dtype)
    if text is not None:
        return f"string {text.encoding} {text.length}"
    return str(dtype) if items is None else f"list of {items}"


def _shape(dataset: Any) -> str:
    return _NONE if dataset.shape is None else str(tuple(map(int, dataset.shape)))


def _feed(h5py: Any, hasher: Any, value: Any) -> None:
    """Hash what h5py gave, element by element in C order, so that it does not matter how it is cut into pieces."""
    import numpy as np
    from numpy.lib.recfunctions import repack_fields

    if isinstance(value, h5py.Empty):
        return
    if isinstance(value, str | bytes):
        data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        hasher.update(f"{len(data)}:".encode())
        hasher.update(data)
        return
    if isinstance(value, h5py.Reference | h5py.RegionReference):
        hasher.update(b"reference;")  # its bytes are an address, which says nothing of contents
        return
    array = np.asarray(value)
    if array.dtype.hasobject:
        for element in array.ravel():
            if isinstance(element, np.ndarray):
                hasher.update(f"{element.size};".encode())
            for part in [element[name] for name in array.dtype.names or ()] or [element]:
                _feed(h5py, hasher, part)
        return
    if array.dtype.names is not None:  # between fields there may be anything
        array = repack_fields(array, recurse=True)
    hasher.update(np.ascontiguousarray(array).tobytes())


def _digest(data: bytes) -> str:
    return str(blake3(data).hexdigest()[:HASH_DIGITS])
