"""A run's records, where they lie and whether they are what was written: identity, configurations, data, attempts.

What source and environment an attempt had is :mod:`hpc_resume.provenance.remembered`'s to read from its record.
Checkpoints are another matter: :mod:`hpc_resume.checkpoint.verify` reads those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.journal import damaged_lines
from hpc_resume.lineage import lineage_path, read_lineage
from hpc_resume.rollbacks import folder, path_of, read_rollbacks
from hpc_resume.rundir import RunDirectory, sealed, unseal_lines
from hpc_resume.untrusted import check_nesting, parse_json, read_regular

#: A longer record is none.
_LONGEST_BYTES = 1 << 24
#: ... but a snapshot of data names each file.
_LONGEST_DATA_BYTES = 1 << 30
_MAX_NESTING = 16
_DIGEST = re.compile(r"[0-9a-f]{1,64}")
_DATA_DIGEST = re.compile(r"[0-9a-f]{32}")
_BATCH_DIGEST = re.compile(r"[0-9a-f]{32}")

#: Records of attempts have a digest, and lines of their journals a checksum, since this schema.
_SEALED_SINCE = 2


def check_records(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    """Find what is wrong with a run's records; it only reads.

    Parameters
    ----------
    run
        The run directory.

    Yields
    ------
    (Path, str)
        A file, and what is wrong with it.
    """
    yield from _check_identity(run)
    yield from _check_configurations(run)
    yield from _check_branching(run)
    yield from _check_data(run)
    numbers = run.attempt_numbers()
    before = 0
    for number in numbers:
        if number - before > 1:
            more = f", and {number - before - 2} more after it" if number - before > 2 else ""
            yield run.attempt(before + 1), f"is gone{more}"
        before = number
        folder = run.attempt(number)
        record, problem = _read_attempt(folder, number)
        if problem is not None:
            yield folder / "attempt.json", problem
        config = record.get("config")
        if problem is None and isinstance(config, str) and not has_configuration(run, config):
            yield configuration_path(run, config), f"is gone; attempt {number} used it"
        yield from _check_lines(folder, sealed_lines=record.get("schema", 0) >= _SEALED_SINCE)


def attempt_record(run: RunDirectory, number: int) -> JsonObject:
    """Read the record of an attempt; empty if there is none, or none that can be read."""
    try:
        record = parse_json(read_regular(run.attempt(number) / "attempt.json", longest_bytes=_LONGEST_BYTES))
        check_nesting(record, _MAX_NESTING)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def configuration_path(run: RunDirectory, digest: str) -> Path:
    """Where the configuration with a digest lies."""
    return run.configs / f"{digest}.yaml"


def has_configuration(run: RunDirectory, digest: str) -> bool:
    """Whether the configuration with a digest, or what somebody wrote in place of one, is there."""
    return _DIGEST.fullmatch(digest) is not None and configuration_path(run, digest).is_file()


def data_path(run: RunDirectory, digest: str) -> Path:
    """Where the snapshot of data with a digest lies."""
    return run.data / f"{digest}.json"


def named_data(run: RunDirectory, environment: JsonObject) -> Iterator[Path]:
    """Give where the snapshots of data lie that a checkpoint's ``environment`` names; they may be gone."""
    named = environment.get("data")
    for key in ("digest", "validation"):
        digest = named.get(key) if isinstance(named, dict) else None
        if isinstance(digest, str) and _DATA_DIGEST.fullmatch(digest):
            yield data_path(run, digest)


def batch_path(run: RunDirectory, digest: str) -> Path:
    """Where the batch with a digest lies that a probe works on."""
    return run.probe / f"{digest}.safetensors"


def has_batch(run: RunDirectory, digest: str) -> bool:
    """Whether the batch with a digest, or what somebody wrote in place of one, is there."""
    return _BATCH_DIGEST.fullmatch(digest) is not None and batch_path(run, digest).is_file()


def _check_identity(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    path = run.identity_path
    try:
        if read_regular(path, longest_bytes=_LONGEST_BYTES) != sealed(run.identity()):
            yield path, "is not what was written"
    except (CheckpointNotFound, FileNotFoundError):
        yield path, "is gone"
    except IntegrityError as error:
        yield path, str(error).removeprefix(f"{path}: ")
    except OSError as error:
        yield path, _unreadable(error)


def _check_configurations(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    for path in sorted(run.configs.glob("*.yaml")):
        try:
            digest = hashlib.sha256(read_regular(path, longest_bytes=_LONGEST_BYTES)).hexdigest()[:16]
        except OSError as error:
            yield path, _unreadable(error)
        else:
            if digest != path.stem:
                yield path, f"is not what was written: its digest is {digest}, not its name"


def _check_branching(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    """Check what says where a run comes from, and what it does not go on from."""
    path = lineage_path(run)
    try:
        lineage = read_lineage(run)
        written = {} if lineage is None else {path: lineage.to_bytes()}
    except CheckpointNotFound:
        return  # told already: the identity is gone
    except IntegrityError as error:
        yield path, str(error).removeprefix(f"{path}: ")
        written = {}
    try:
        written |= {path_of(run, each.number): each.to_bytes() for each in read_rollbacks(run)}
    except IntegrityError as error:
        yield folder(run), str(error).removeprefix(f"{folder(run)}/")
    for path, data in written.items():
        try:
            if read_regular(path, longest_bytes=_LONGEST_BYTES) != data:
                yield path, "is not what was written"
        except OSError as error:
            yield path, _unreadable(error)


def _check_data(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    for path in sorted(run.data.glob("*.json")):
        try:
            _, digest, _ = unseal_lines(read_regular(path, longest_bytes=_LONGEST_DATA_BYTES))
        except OSError as error:
            yield path, _unreadable(error)
        except ValueError as error:
            yield path, f"is not what was written ({error})"
        else:
            if digest != path.stem:
                yield path, f"is not what was written: its digest is {digest}, not its name"


def _read_attempt(folder: Path, number: int) -> tuple[JsonObject, str | None]:
    """Give the record of an attempt, empty if there is none, and what is wrong with it."""
    path = folder / "attempt.json"
    try:
        data = read_regular(path, longest_bytes=_LONGEST_BYTES)
        record = parse_json(data)
        check_nesting(record, _MAX_NESTING)
    except FileNotFoundError:
        # An attempt that died at once has none; whatever else it leaves comes later.
        return {}, "is gone" if any(folder.glob("*.jsonl")) else None
    except OSError as error:
        return {}, _unreadable(error)
    except ValueError as error:
        return {}, f"is not what was written ({error})"
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        return {}, "is not what was written (it holds no record)"
    has_digest = record["schema"] >= _SEALED_SINCE or "digest" in record
    if record.get("attempt") != number or data != (sealed(record) if has_digest else _plain(record)):
        return record, "is not what was written"
    return record, None


def _check_lines(folder: Path, *, sealed_lines: bool) -> Iterator[tuple[Path, str]]:
    metrics = sorted(folder.glob("metrics-rank-*.jsonl"))
    journal = folder / "events.jsonl"
    if metrics and not journal.exists():
        yield journal, "is gone"
        journals = metrics
    else:
        journals = [journal, *metrics] if journal.exists() else metrics
    for path in journals:
        try:
            for line, problem in damaged_lines(path, sealed=sealed_lines):
                yield path, f"line {line} {problem}"
        except OSError as error:
            yield path, _unreadable(error)


def _plain(record: JsonObject) -> bytes:
    return json.dumps(record, indent=1).encode()


def _unreadable(error: OSError) -> str:
    return f"can't be read ({error.strerror})"
