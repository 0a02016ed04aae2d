"""The batch that a probe works on: stored once in the run directory, and the same ever after.

It is a safetensors file under the name of its own digest: any tool reads it, reading it runs no code, and a
changed byte shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.leaves import flatten, leaf
from hpc_resume.checkpoint.snapshot import bytes_of
from hpc_resume.errors import IntegrityError, StateError, UsageError
from hpc_resume.files import DISK, Filesystem
from hpc_resume.records import batch_path
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import parse_json, read_regular

_KEY = "batch"
_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")
#: A longer one is refused: it is read by every rank.
_LONGEST_BYTES = 1 << 30
_STATE = "hpc_resume"
_SPELLED = {name: spelled for spelled, name in dtypes.SAFETENSORS.items()}


def fixed_batch(
    run: RunDirectory,
    batch: Any,
    peers: Peers,
    *,
    rank: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[str, Any]:
    """Give all ranks the run's batch; rank 0's is stored if there is none yet.

    Returns
    -------
    (str, Any)
        Its digest, and the batch on a device.

    Raises
    ------
    UsageError
        On all ranks, if it can't be stored.
    IntegrityError
        If it is not what was stored.
    """
    told: Any = None
    if rank == 0:
        try:
            digest, same = keep_batch(run, batch)
            told = {"digest": digest}
            if not same:
                say(
                    f"run.probe: another batch than the stored one was given; {run.probe} keeps the one that counts"
                )
        except (StateError, UsageError) as error:
            told = {"error": str(error)}
    told = peers.share("probe/batch", told)
    if "error" in told:
        raise UsageError(f"run.probe: {told['error']}")
    return told["digest"], load_batch(run, told["digest"], device)


def keep_batch(run: RunDirectory, batch: Any, *, fs: Filesystem = DISK) -> tuple[str, bool]:
    """Store a batch, unless the run has one; on rank 0.

    Parameters
    ----------
    run
        The run directory.
    batch
        Tensors, arrays and numbers in dicts, lists and tuples.
    fs
        Filesystem.

    Returns
    -------
    (str, bool)
        Digest of the batch that counts, and whether it is this one.

    Raises
    ------
    UsageError
        If it can't be stored.
    """
    data = _encode(batch)
    digest = hashlib.sha256(data).hexdigest()[:32]
    there = stored_batches(run)
    if there:
        return (digest, True) if digest in there else (there[0], False)
    fs.make_dirs(run.probe)
    fs.write_file(batch_path(run, digest), data)
    return digest, True


def stored_batches(run: RunDirectory) -> list[str]:
    """Digests of the batches that a run has."""
    if not run.probe.is_dir():
        return []
    matches = [_FILE.fullmatch(path.name) for path in sorted(run.probe.iterdir())]
    return [match[1] for match in matches if match is not None]


def load_batch(run: RunDirectory, digest: str, device: torch.device) -> Any:
    """Load the stored batch to a device.

    Raises
    ------
    IntegrityError
        If it is not what was stored.
    """
    path = batch_path(run, digest)
    try:
        data = read_regular(path, longest_bytes=_LONGEST_BYTES)
        if hashlib.sha256(data).hexdigest()[:32] != digest:
            raise ValueError("its digest is not its name")
        return _decode(data, device)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError) as error:
        raise IntegrityError(
            f"{path}: is not the batch that was stored ({error}); put back a copy, or move the folder probe/ away: "
            "then the batch that the script gives is stored, and older checkpoints are not compared"
        ) from error


def _encode(batch: Any) -> bytes:
    tree, tensors = flatten(_KEY, batch)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _STATE: json.dumps(tree, allow_nan=False)}}
    parts, offset = [], 0
    for name, tensor in tensors.items():
        kind = dtypes.name_of(tensor.dtype)
        if kind not in _SPELLED:
            raise UsageError(f"{name}: tensors of type {tensor.dtype} can't be stored in a batch")
        part = bytes_of(tensor).tobytes()
        place = [offset, offset + len(part)]
        header[name] = {"dtype": _SPELLED[kind], "shape": list(tensor.shape), "data_offsets": place}
        parts.append(part)
        offset += len(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    if 8 + len(text) + offset > _LONGEST_BYTES:
        raise UsageError(f"a batch of {offset} bytes is too large; give a part of it")
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _decode(data: bytes, device: torch.device) -> Any:
    start = 8 + int.from_bytes(data[:8], "little")
    header = parse_json(data[8:start])
    tensors = {}
    for name, record in header.items():
        if name != "__metadata__":
            first, last = record["data_offsets"]
            kind = dtypes.torch_dtype(dtypes.SAFETENSORS[record["dtype"]])
            flat = torch.from_numpy(np.frombuffer(data[start + first : start + last], np.uint8).copy())
            tensors[name] = flat.view(kind).reshape(record["shape"])
    tree = parse_json(header["__metadata__"][_STATE].encode())

    def get(tag: str, name: str) -> Any:
        found = leaf(tag, tensors[name])
        return found.to(device) if isinstance(found, torch.Tensor) else found

    return objects.decode(tree, get)
