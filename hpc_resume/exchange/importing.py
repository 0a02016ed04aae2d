"""Import: a foreign checkpoint becomes a run's folder with one committed checkpoint."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.commit import publish
from hpc_resume.checkpoint.image import Piece
from hpc_resume.checkpoint.index import shard_file
from hpc_resume.checkpoint.layout import Layout
from hpc_resume.checkpoint.manifest import ShardRecord
from hpc_resume.checkpoint.receipt import Header, Receipt, objects_digest, to_manifest
from hpc_resume.checkpoint.stream import write_streamed
from hpc_resume.checkpoint.structure import Structure, TensorRecord
from hpc_resume.errors import CheckpointNotFound, UsageError
from hpc_resume.exchange import dcpfolder, safetensors, torchfile
from hpc_resume.exchange.incoming import Incoming
from hpc_resume.files import DISK, Clock, Filesystem
from hpc_resume.provenance.environment import describe_environment, essentials
from hpc_resume.rundir import RunDirectory

REASON = "import"


def import_checkpoint(
    source: Path,
    into: Path,
    *,
    key: str | None = None,
    step: int = 0,
    name: str | None = None,
    threads: int = 2,
    fs: Filesystem = DISK,
    clock: Clock = time.time,
) -> str:
    """Make a run's folder with one checkpoint from another format; no code of it is run.

    Tensors come over one at a time. The folder appears whole, or not at all.

    Parameters
    ----------
    source
        A ``.safetensors`` file or a folder of them, a file of ``torch.save``, or a folder of
        ``torch.distributed.checkpoint``.
    into
        The run's folder; it must not exist, or be empty.
    key
        The tracked key to put everything under. Without it, a state dict goes under ``model``, and a dict of
        states is taken as it is.
    step
        Of the checkpoint.
    name
        Of the run; by default the folder's.
    threads
        That read and write.
    fs, clock
        Filesystem and Unix time in seconds.

    Returns
    -------
    str
        Name of the checkpoint.

    Raises
    ------
    UsageError
        If the folder is there already.
    CheckpointNotFound
        If there is nothing to import.
    IntegrityError
        If it is damaged, or would run code.
    StateError
        If something in it can't be stored.
    """
    into = into.absolute()
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise UsageError(f"{into}: is there already; an import makes a new folder: give another one")
    if step < 0:
        raise UsageError(f"--step {step}: steps are counted from 0")
    incoming = open_source(source, key)
    into.parent.mkdir(parents=True, exist_ok=True)
    draft = into.parent / f".{into.name}.import-{uuid.uuid4().hex[:8]}"
    try:
        run = RunDirectory(draft)
        run_id = run.create(name or into.name, fs=fs, clock=clock)["run_id"]
        header = Header(
            run_id=run_id,
            attempt=0,
            step=step,
            samples=0,
            reason=REASON,
            world_size=1,
            node_type=None,
            config=None,
            environment=essentials(describe_environment()),
        )
        checkpoint = _write(run, header, incoming, threads, fs, clock)
        os.rename(draft, into)  # noqa: PTH104 - fails if something is there by now, which replace() would not
        fs.fsync_dir(into.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return checkpoint


def open_source(source: Path, key: str | None) -> Incoming:
    """Find out what a file or folder is, and open it."""
    if not source.exists():
        raise CheckpointNotFound(f"{source}: no such file or folder")
    if source.is_dir():
        if (source / dcpfolder.METADATA).exists():
            return dcpfolder.incoming(source, key)
        paths = sorted(source.glob("*.safetensors"))
        if not paths:
            raise CheckpointNotFound(
                f"{source}: holds neither .metadata of torch.distributed.checkpoint nor a .safetensors file"
            )
    elif source.suffix == ".safetensors":
        paths = [source]
    else:
        return torchfile.read(source, key)
    return safetensors.read(paths, key)


def _write(
    run: RunDirectory, header: Header, incoming: Incoming, threads: int, fs: Filesystem, clock: Clock
) -> str:
    """Write the one shard and commit."""
    layout = Layout.replicated((0,))
    tensors = incoming.tensors
    structure = Structure({name: TensorRecord(i.shape, i.dtype, layout) for name, i in tensors.items()})
    pieces = [
        Piece(name, record.dtype, record.shape, Box.whole(record.shape))
        for name, record in structure.tensors.items()
        if record.size_bytes
    ]
    folder = run.root / "importing"
    shards = folder / "shards"
    fs.mkdir(folder)
    fs.mkdir(shards)
    begun = clock()
    file = shard_file(0, 1)
    written = write_streamed(
        shards / file, pieces, lambda number: tensors[pieces[number].name].load(), threads=threads, fs=fs
    )
    size_bytes = sum(piece.length for piece in pieces)
    receipt = Receipt(
        header=header,
        by=0,
        created=clock(),
        shard=ShardRecord(
            file=file,
            rank=0,
            node=os.uname().nodename,
            size_bytes=written.size_bytes,
            index=written.index,
            table=written.table,
            digest=written.digest,
            rest=written.rest,
        ),
        structure_digest=structure.digest,
        structure=structure,
        objects_digest=objects_digest(incoming.objects),
        objects=incoming.objects,
        refers=(),
        state_bytes=size_bytes,
        written_bytes=size_bytes,
        write_s=round(clock() - begun, 4),
    )
    return publish(run, folder, to_manifest([receipt], None), fs=fs)
