"""Verification: every byte of every file of a run's checkpoints. It only reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import BLOCK_BYTES, MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.shard import read_blocks, rest_checksum
from hpc_resume.errors import CheckpointNotFound, HpcResumeError, IntegrityError
from hpc_resume.journal import read_events
from hpc_resume.rundir import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong.

    Parameters
    ----------
    path
        The file or folder.
    problem
        What is wrong with it.
    """

    path: Path
    problem: str


def verify_run(root: Path) -> list[Finding]:
    """Verify the identity and all committed checkpoints of a run.

    Parameters
    ----------
    root
        The run directory.

    Returns
    -------
    list of Finding
        Empty if every byte is as it was committed.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    """
    run = RunDirectory(root)
    findings = []
    run_id = None
    try:
        run_id = run.identity()["run_id"]
    except CheckpointNotFound:
        if not run.checkpoints.is_dir() and not run.attempts.is_dir():
            raise
        findings.append(Finding(path=run.identity_path, problem="is gone"))
    except IntegrityError as error:
        findings.append(Finding(path=run.identity_path, problem=str(error)))
    findings += _journals(run)
    findings += _missing(run)
    if not run.checkpoints.is_dir():
        return [*findings, Finding(path=run.checkpoints, problem="is gone")]
    for name in sorted(os.listdir(run.checkpoints)):  # noqa: PTH208 - names are all that is needed
        folder = run.checkpoints / name
        try:
            manifest = read_manifest(folder)
        except IntegrityError as error:
            findings.append(Finding(path=folder / MANIFEST, problem=str(error)))
            continue
        if run_id is not None and manifest.run_id != run_id:
            findings.append(Finding(path=folder / MANIFEST, problem=f"belongs to run {manifest.run_id}"))
        findings += verify_checkpoint(folder, manifest)
    return findings


def verify_checkpoint(folder: Path, manifest: Manifest) -> list[Finding]:
    """Verify every byte of a checkpoint's shards, and that nothing else lies among them."""
    expected = {MANIFEST, *(shard.file for shard in manifest.shards)}
    findings = [
        Finding(path=folder / name, problem="does not belong to the checkpoint")
        for name in sorted(set(os.listdir(folder)) - expected)  # noqa: PTH208 - as above
    ]
    for index, shard in enumerate(manifest.shards):
        path = folder / shard.file
        try:
            _verify_shard(path, manifest, index)
        except OSError as error:
            findings.append(Finding(path=path, problem=f"can't be read ({error.strerror})"))
        except HpcResumeError as error:
            findings.append(Finding(path=path, problem=str(error)))
    return findings


def _verify_shard(path: Path, manifest: Manifest, index: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        recorded = manifest.shards[index]
        size_bytes = os.fstat(fd).st_size
        if size_bytes != recorded.size_bytes:
            raise IntegrityError(f"{size_bytes} bytes, but {recorded.size_bytes} were written")
        buffer = memoryview(bytearray(BLOCK_BYTES))
        extents = []
        for name, tensor in manifest.tensors.items():
            for stored in tensor.boxes:
                if stored.shard != index:
                    continue
                extents.append((stored.offset, stored.length))
                for block, begin in enumerate(range(0, stored.length, BLOCK_BYTES)):
                    into = buffer[: min(BLOCK_BYTES, stored.length - begin)]
                    try:
                        read_blocks(fd, stored.offset, stored.length, stored.checksums, block, into)
                    except IntegrityError as error:
                        raise IntegrityError(f"{name}: {error}") from error
        if rest_checksum(fd, recorded.size_bytes, extents) != recorded.rest:
            raise IntegrityError("its header, index or padding is not what was written (xxh3 differs)")
    finally:
        os.close(fd)


def _journals(run: RunDirectory) -> Iterator[Finding]:
    """Find attempts whose record or journal can't be read; only a journal's last line may be torn."""
    for attempt in run.attempt_numbers():
        record = run.attempt(attempt) / "attempt.json"
        journal = run.attempt(attempt) / "events.jsonl"
        try:
            if record.exists() and not isinstance(json.loads(record.read_bytes()), dict):
                yield Finding(path=record, problem="damaged (no JSON object)")
        except ValueError as error:
            yield Finding(path=record, problem=f"damaged ({error})")
        whole_lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        for number, line in enumerate(whole_lines, 1):
            try:
                json.loads(line)
            except ValueError as error:
                yield Finding(path=journal, problem=f"line {number} is damaged ({error})")


def _missing(run: RunDirectory) -> Iterator[Finding]:
    """Find checkpoints that the run committed and that are neither there nor in quarantine.

    The journal names each one when it is committed; manifests name their parents.
    """
    known = set(run.checkpoint_names())
    aside = (
        {path.name.split(".")[0] for path in run.quarantine.glob("*-*")} if run.quarantine.is_dir() else set()
    )
    for attempt in run.attempt_numbers():
        for event in read_events(run.attempt(attempt) / "events.jsonl"):
            name = event.get("checkpoint")
            if event.get("event") == "saved" and isinstance(name, str) and name not in known | aside:
                yield Finding(path=run.checkpoints / name, problem="was committed, and is gone")
                known.add(name)
