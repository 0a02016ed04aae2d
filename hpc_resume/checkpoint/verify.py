"""Verification: every byte of every file of a run's checkpoints. It only reads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.shardfile import ShardFile
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.journal import read_events
from hpc_resume.rundir import RunDirectory

#: Read and hashed at a time.
_READ_BYTES = 1 << 20


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


#: Called with the bytes that have been verified so far, and all there are to verify.
Progress = Callable[[int, int], None]


def verify_run(root: Path, *, threads: int = 2, progress: Progress | None = None) -> list[Finding]:
    """Verify the identity and all committed checkpoints of a run; only reads.

    Parameters
    ----------
    root
        The run directory.
    threads
        That read; each takes a shard.
    progress
        Told how far it is.

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
    whole: list[tuple[Path, Manifest]] = []
    for name in sorted(os.listdir(run.checkpoints)):  # noqa: PTH208 - names are all that is needed
        folder = run.checkpoints / name
        try:
            manifest = read_manifest(folder)
        except IntegrityError as error:
            findings.append(Finding(path=folder / MANIFEST, problem=str(error)))
            continue
        if run_id is not None and manifest.run_id != run_id:
            findings.append(Finding(path=folder / MANIFEST, problem=f"belongs to run {manifest.run_id}"))
        whole.append((folder, manifest))
    return findings + _verify_shards(whole, threads, progress)


def verify_checkpoint(folder: Path, manifest: Manifest, *, threads: int = 2) -> list[Finding]:
    """Verify every byte of a checkpoint's shards, and that nothing else lies among them."""
    return _verify_shards([(folder, manifest)], threads, None)


def _verify_shards(
    checkpoints: Sequence[tuple[Path, Manifest]], threads: int, progress: Progress | None
) -> list[Finding]:
    jobs = [
        (folder, manifest, rank) for folder, manifest in checkpoints for rank in range(len(manifest.shards))
    ]
    total = sum(manifest.size_bytes for _, manifest in checkpoints)
    done = 0
    lock = threading.Lock()

    def count(size_bytes: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done = min(done + size_bytes, total)
                progress(done, total)

    def work(job: tuple[Path, Manifest, int]) -> list[Finding]:
        folder, manifest, rank = job
        return _verify_shard(folder, manifest, rank, count)

    findings = []
    for folder, manifest in checkpoints:
        expected = {MANIFEST, *(shard.file for shard in manifest.shards)}
        findings += [
            Finding(path=folder / name, problem="does not belong to the checkpoint")
            for name in sorted(set(os.listdir(folder)) - expected)  # noqa: PTH208 - as above
        ]
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="hpc-resume-verify") as pool:
        for found in pool.map(work, jobs):
            findings += found
    return findings


def _verify_shard(folder: Path, manifest: Manifest, rank: int, count: Callable[[int], None]) -> list[Finding]:
    """Verify a shard: each of its boxes on its own, so that all damage shows, and everything around them."""
    recorded = manifest.shards[rank]
    path = folder / recorded.file
    findings: list[Finding] = []
    try:
        size_bytes = path.lstat().st_size
        if size_bytes != recorded.size_bytes:
            findings.append(
                Finding(path=path, problem=f"{size_bytes} bytes, but {recorded.size_bytes} were written")
            )
        file = ShardFile.open(folder, manifest, rank)
    except (OSError, IntegrityError) as error:
        return [*findings, Finding(path=path, problem=_bare(error, path))]
    try:
        for number, entry in enumerate(file.index.entries):
            try:
                for first, last, length in _batches(entry.edges):
                    file.read_blocks(number, first, last, memoryview(bytearray(length)))
                    count(length)
            except IntegrityError as error:
                findings.append(Finding(path=path, problem=_bare(error, path)))
        if not findings and file.rest_checksum() != recorded.rest:
            problem = "its header, index or padding is not what was written (xxh3 differs)"
            findings.append(Finding(path=path, problem=problem))
        findings += _promised(file, manifest, rank)
    except (OSError, IntegrityError) as error:
        findings.append(Finding(path=path, problem=_bare(error, path)))
    finally:
        file.close()
    return findings


def _promised(file: ShardFile, manifest: Manifest, rank: int) -> Iterator[Finding]:
    """Find boxes that a shard must hold by the manifest and does not."""
    for name, box in manifest.structure.stored_by(rank):
        try:
            file.index.find(name, box)
        except IntegrityError as error:
            yield Finding(path=file.path, problem=str(error))


def _batches(edges: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Cut the blocks of a box into batches of about :data:`_READ_BYTES`."""
    first = 0
    while first < len(edges) - 1:
        last = first + 1
        while last < len(edges) - 1 and edges[last + 1] - edges[first] <= _READ_BYTES:
            last += 1
        yield first, last, edges[last] - edges[first]
        first = last


def _bare(error: Exception, path: Path) -> str:
    """Take the path off the beginning of a message: a finding has it already."""
    return str(error).removeprefix(f"{path}: ")


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
    """Find checkpoints that the run committed and that are neither there nor put aside on purpose.

    The journal names each one when it is committed; manifests name their parents.
    """
    known = set(run.checkpoint_names())
    aside = (
        {path.name.split(".")[0] for path in run.quarantine.glob("*-*")} if run.quarantine.is_dir() else set()
    )
    if run.pruned.is_dir():
        aside |= {path.stem for path in run.pruned.glob("*.json")}
    for attempt in run.attempt_numbers():
        for event in read_events(run.attempt(attempt) / "events.jsonl"):
            name = event.get("checkpoint")
            if event.get("event") == "saved" and isinstance(name, str) and name not in known | aside:
                yield Finding(path=run.checkpoints / name, problem="was committed, and is gone")
                known.add(name)
