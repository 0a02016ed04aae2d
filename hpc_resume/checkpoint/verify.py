"""Verification: every byte of every file of a run's checkpoints. It only reads."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hpc_resume.checkpoint.blocks import Partitions
from hpc_resume.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.shardfile import Check, ShardFile
from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.journal import read_events
from hpc_resume.lineage import read_lineage
from hpc_resume.provenance.remembered import check_sources
from hpc_resume.records import check_records, configuration_path, has_configuration, named_data
from hpc_resume.rundir import RunDirectory

#: Boxes of a shard that are missing, and that are damaged, are told one by one up to so many ...
_TELL_MISSING = 8
_TELL_DAMAGED = 100
#: ... and shards in which some are missing, of one checkpoint.
_TELL_SHARDS = 8


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
    except IntegrityError:
        pass  # among the records
    findings += [Finding(path=path, problem=problem) for path, problem in check_records(run)]
    findings += [Finding(path=path, problem=problem) for path, problem in check_sources(run)]
    findings += _missing(run)
    if not run.checkpoints.is_dir():
        return [*findings, Finding(path=run.checkpoints, problem="is gone")]
    shared = _shared(run)
    whole: list[tuple[Path, Manifest]] = []
    for name in _names(run.checkpoints, findings):
        folder = run.checkpoints / name
        try:
            manifest = read_manifest(folder)
        except IntegrityError as error:
            findings.append(Finding(path=folder / MANIFEST, problem=_bare(error, folder / MANIFEST)))
            continue
        if run_id is not None and manifest.run_id != run_id and shared.get(name) != manifest.content_id:
            findings.append(Finding(path=folder / MANIFEST, problem=f"belongs to run {manifest.run_id}"))
        if manifest.config is not None and not has_configuration(run, manifest.config):
            gone = configuration_path(run, manifest.config)
            findings.append(Finding(path=gone, problem=f"is gone; {name} was written with it"))
        findings += [
            Finding(path=path, problem=f"is gone; {name} names it")
            for path in named_data(run, manifest.environment)
            if not path.is_file()
        ]
        whole.append((folder, manifest))
    return findings + _verify_shards(whole, threads, progress)


def _shared(run: RunDirectory) -> Mapping[str, str]:
    """Content ids, by name, of what a fork has from the run that it comes from."""
    try:
        lineage = read_lineage(run)
    except (IntegrityError, CheckpointNotFound):
        return {}  # among the records
    return {} if lineage is None else lineage.shared


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

    def work(job: tuple[Path, Manifest, int]) -> tuple[list[Finding], list[Finding]]:
        folder, manifest, rank = job
        return _verify_shard(folder, manifest, rank, count)

    lacking: Counter[Path] = Counter()
    findings: list[Finding] = []
    for folder, manifest in checkpoints:
        expected = {MANIFEST, *(shard.file for shard in manifest.shards)}
        findings += [
            Finding(path=folder / name, problem="does not belong to the checkpoint")
            for name in _names(folder, findings)
            if name not in expected
        ]
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="hpc-resume-verify") as pool:
        for found, missing in pool.map(work, jobs):
            findings += found
            if missing:
                folder = missing[0].path.parent
                lacking[folder] += 1
                findings += missing if lacking[folder] <= _TELL_SHARDS else []
    findings += [
        Finding(path=folder, problem=f"and boxes are missing in {shards - _TELL_SHARDS} more shards")
        for folder, shards in lacking.items()
        if shards > _TELL_SHARDS
    ]
    if progress is not None:
        progress(total, total)
    return findings


def _verify_shard(
    folder: Path, manifest: Manifest, rank: int, count: Callable[[int], None]
) -> tuple[list[Finding], list[Finding]]:
    """Verify a shard: each of its boxes on its own, so that all damage shows, and everything around them.

    Returns
    -------
    (list of Finding, list of Finding)
        What is damaged, and what is missing.
    """
    recorded = manifest.shards[rank]
    path = folder / recorded.file
    findings: list[Finding] = []
    missing: list[Finding] = []
    try:
        file = ShardFile.open(folder, manifest, rank)
    except (OSError, IntegrityError) as error:
        return [Finding(path=path, problem=_bare(error, path))], missing
    try:
        findings += _damaged(file, count)
        if not findings and file.rest_checksum() != recorded.rest:
            problem = "its header, index or padding is not what was written (xxh3 differs)"
            findings.append(Finding(path=path, problem=problem))
        missing += _missing_boxes(file, manifest, rank)
    except (OSError, IntegrityError) as error:
        findings.append(Finding(path=path, problem=_bare(error, path)))
    finally:
        file.close()
    return findings, missing


def _damaged(file: ShardFile, count: Callable[[int], None]) -> list[Finding]:
    """Find boxes that are not what was written."""
    findings: list[Finding] = []
    more = 0
    for number in range(len(file.index)):
        try:
            for checks in _all_checks(file.index.entry(number).cut):
                low, high, _ = checks[0]
                count(file.read_checked(number, [checks], memoryview(bytearray(high - low)), low))
        except IntegrityError as error:
            if len(findings) < _TELL_DAMAGED:
                findings.append(Finding(path=file.path, problem=_bare(error, file.path)))
            else:
                more += 1
    if more:
        findings.append(Finding(path=file.path, problem=f"and {more} more boxes are not what was written"))
    return findings


def _all_checks(cut: Partitions) -> Iterator[list[Check]]:
    """Give every checksum of a box, by segments: each with those of its blocks, which others will read alone."""
    blocks, segments = cut[0], cut[-1]
    for number, (low, high) in enumerate(pairwise(segments)):
        first, last = bisect_left(blocks, low), bisect_left(blocks, high)
        parts = [(blocks[place], blocks[place + 1], place) for place in range(first, last)]
        yield parts if len(cut) == 1 else [(low, high, len(blocks) - 1 + number), *parts]


def _missing_boxes(file: ShardFile, manifest: Manifest, rank: int) -> Iterator[Finding]:
    """Find boxes that a shard must hold by the manifest and does not; after some of them it is bad enough."""
    told = 0
    for name, box in manifest.structure.stored_by(rank):
        record = manifest.structure.tensors[name]
        try:
            entry = file.index.entry(file.index.find(name, box))
            if (entry.dtype, entry.shape) != (record.dtype, record.shape):
                raise IntegrityError(f"{name}: is another tensor in its index")
        except IntegrityError as error:
            told += 1
            if told > _TELL_MISSING:
                yield Finding(path=file.path, problem="and more boxes are not in its index")
                return
            yield Finding(path=file.path, problem=str(error))


def _bare(error: Exception, path: Path) -> str:
    """Take the path off the beginning of a message: a finding has it already."""
    return str(error).removeprefix(f"{path}: ")


def _names(folder: Path, findings: list[Finding]) -> list[str]:
    """Names in a folder, sorted; none, and a finding, if it can't be listed."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names are all that is needed
    except OSError as error:
        findings.append(Finding(path=folder, problem=f"can't be listed ({error.strerror})"))
        return []


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
        try:
            events = read_events(run.attempt(attempt) / "events.jsonl")
        except IntegrityError:
            continue  # told already
        for event in events:
            name = event.get("checkpoint")
            if event.get("event") == "saved" and isinstance(name, str) and name not in known | aside:
                yield Finding(path=run.checkpoints / name, problem="was committed, and is gone")
                known.add(name)
