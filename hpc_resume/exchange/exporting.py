"""Export: a checkpoint as one safetensors file, one file of ``torch.save``, or a folder of DCP."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from hpc_resume.checkpoint import objects
from hpc_resume.checkpoint.names import escape, unescape
from hpc_resume.checkpoint.opened import Checkpoint, target_dtype
from hpc_resume.checkpoint.saved import any_leaf
from hpc_resume.checkpoint.structure import TensorRecord
from hpc_resume.errors import UsageError
from hpc_resume.exchange import safetensors, torchfile
from hpc_resume.exchange.standins import StandIns
from hpc_resume.exchange.tree import select
from hpc_resume.files import DISK

_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}


def export_checkpoint(
    run: Path,
    to: Path,
    *,
    step: int | None = None,
    names: str | None = None,
    key: str | None = None,
    dtype: str | None = None,
) -> int:
    """Write a checkpoint in another format, tensor by tensor.

    The file or folder appears whole, or not at all.

    Parameters
    ----------
    run
        A run's folder, or a checkpoint's.
    to
        ``FILE.safetensors``, ``FILE.pt`` (``.pth``, ``.bin``, ``.ckpt``), or a folder for DCP; it must not exist.
    step
        Which checkpoint; by default the newest full one.
    names
        Pattern of the names of tensors (``model/*``). Tracked items without a tensor that fits are left out.
    key
        One tracked item alone, under its own names: ``model`` gives a state dict.
    dtype
        For floating-point tensors.

    Returns
    -------
    int
        Number of tensors.

    Raises
    ------
    UsageError
        If the target exists, or the format is unknown, or nothing fits.
    StateError
        If the format can't hold something.
    """
    write = _format(to)
    if to.exists() or to.is_symlink():
        raise UsageError(f"{to}: is there already; give another name, or move it away")
    if not to.absolute().parent.is_dir():
        raise UsageError(f"{to}: its folder does not exist; make it first: mkdir -p {to.parent}")
    with Checkpoint(run, step=step) as ckpt:
        outgoing = _Outgoing(ckpt, names, key, dtype)
        draft = to.with_name(f".{to.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            write(outgoing, draft)
            _make_durable(draft)
            if to.exists():
                raise UsageError(f"{to}: has come into being meanwhile; it was left as it is")
            draft.rename(to)
            DISK.fsync_dir(to.absolute().parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)
            raise
        return len(outgoing.own)


class _Outgoing:
    """What of a checkpoint goes out.

    Parameters
    ----------
    ckpt
        The checkpoint.
    names, key, dtype
        As given by the user.
    """

    def __init__(self, ckpt: Checkpoint, names: str | None, key: str | None, dtype: str | None) -> None:
        self.ckpt = ckpt
        self.key = key
        self._dtype = dtype
        chosen = set(ckpt.names("*" if names is None else names))
        if key is not None:
            if key not in ckpt.keys:
                raise UsageError(
                    f"{ckpt.path}: nothing was tracked under {key!r}; there are: {', '.join(ckpt.keys)}"
                )
            chosen = {name for name in chosen if name.startswith(f"{escape(key)}/")}
        tree = {k: node for k, node in ckpt.manifest.objects.items() if key in {None, k}}
        if names is not None:
            tree = {k: node for k, node in tree.items() if chosen & objects.tensor_names(node).keys()}
        #: Typed JSON of what goes out, and its tensors by their own names, with the names of their bytes.
        self.tree: dict[str, Any] = {k: select(node, chosen.__contains__) for k, node in tree.items()}
        self.own = {
            name: stored for name, stored in objects.tensor_names(self.tree).items() if name in chosen
        }
        if not self.own:
            what = f"under {key!r}" if names is None else f"that fits {names!r}"
            raise UsageError(f"{ckpt.path}: no tensor {what}; hpc-resume show lists all")
        if dtype is not None:
            target_dtype(TensorRecord((), "float32", None, ((0, torchfile.POINT),)), dtype)

    def record(self, name: str) -> TensorRecord:
        """Shape and element type that a tensor goes out with."""
        record = self.ckpt.record(name)
        spelled = str(target_dtype(record, self._dtype)).removeprefix("torch.")
        return TensorRecord(record.shape, spelled, record.layout, record.pieces)

    def load(self, name: str) -> torch.Tensor:
        """Load a tensor."""
        return self.ckpt.load_names([name], dtype=self._dtype)[name]

    def state(self, get: Callable[[str, str], Any]) -> Any:
        """Decode the state, with what stands for its tensors."""
        decoded = objects.decode(self.tree, get)
        return decoded if self.key is None else decoded[self.key]


def _format(to: Path) -> Callable[[_Outgoing, Path], None]:
    if to.suffix == ".safetensors":
        return _to_safetensors
    if to.suffix in _TORCH_SUFFIXES:
        return _to_torch
    if not to.suffix or to.suffix == ".dcp":
        return _to_dcp
    raise UsageError(
        f"{to}: what shall that be? FILE.safetensors, FILE.pt, or a folder's name (no suffix) for "
        "torch.distributed.checkpoint"
    )


def _to_safetensors(out: _Outgoing, path: Path) -> None:
    """Write each stored tensor once; for a whole state, everything else goes into the header as typed JSON."""
    first: dict[str, str] = {}
    for name, stored in sorted(out.own.items(), key=lambda pair: (pair[0] != pair[1], pair[0])):
        first.setdefault(stored, name)
    if out.key is None:
        named = {name: name for name in first.values()}
        state = _renamed(out.tree, first)
    else:
        prefix = f"{escape(out.key)}/"
        named = {_plain(name.removeprefix(prefix)): name for name in first.values()}
        state = None
    records = {name: out.record(own) for name, own in named.items()}
    safetensors.check(records)
    safetensors.write(path, records, lambda name: out.load(named[name]), state=state)


def _plain(name: str) -> str:
    """Give a name back as it stood in a state dict, unless it is a path in a deeper one."""
    return name if "/" in name else unescape(name)


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """Let typed JSON name tensors by the names that they have in the file."""
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        (tag, content), *_ = node.items()
        if tag in objects.TENSOR_TAGS:
            return {tag: names[content]}
        if tag == objects.SAME_TAG:
            own, stored = content[0], names[content[1]]
            return {"$tensor": own} if own == stored else {tag: [own, stored]}
        if tag == objects.TENSORS_TAG:
            return _renamed(objects.unfolded(content), names)
    return {key: _renamed(item, names) for key, item in node.items()}


def _to_torch(out: _Outgoing, path: Path) -> None:
    made: dict[str, torchfile.Later] = {}

    def get(tag: str, name: str) -> Any:
        if tag == "$saved":
            return any_leaf(tag, out.load(name))
        stored = out.ckpt.stored_as(name)
        if stored not in made:
            made[stored] = torchfile.Later(out.record(name), lambda: out.load(name))
        return made[stored]

    torchfile.write(path, out.state(get))


def _to_dcp(out: _Outgoing, path: Path) -> None:
    stand_ins = StandIns(out.record)
    # As bytes of an array, which is what DCP would save, nobody could load it without running code.
    state = out.state(lambda tag, name: stand_ins.get("$tensor" if tag == "$ndarray" else tag, name))
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, storage_writer=writer, planner=_Planner(stand_ins, out.load), no_dist=True)


class _Planner(dcp.DefaultSavePlanner):
    """Loads a tensor when it is about to be written."""

    def __init__(self, stand_ins: StandIns, load: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins
        self._load = load

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Give what stands in the state, with its values."""
        return self._stand_ins.resolve(self.state_dict[index.fqn], self._load)


def _make_durable(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on disk."""
    for each in [*path.iterdir(), path] if path.is_dir() else [path]:
        fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
