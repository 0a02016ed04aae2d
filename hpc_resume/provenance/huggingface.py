"""Hugging Face datasets: what they say of themselves, in memory or saved to disk; the package is not needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from hpc_resume.errors import UsageError
from hpc_resume.provenance.datafiles import DataFile
from hpc_resume.untrusted import parse_json, read_regular

#: What ``Dataset.save_to_disk`` leaves beside the tables. Source: datasets.config, DATASET_STATE_JSON_FILENAME
#: and DATASET_INFO_FILENAME.
_STATE, _INFO = "state.json", "dataset_info.json"
_LONGEST_BYTES = 1 << 24


def fingerprint_of(data: Any) -> str | None:
    """Give the fingerprint of a ``datasets.Dataset``, or of anything that has one; None for other objects."""
    found = getattr(data, "_fingerprint", None)
    return found if isinstance(found, str) and found else None


def fingerprints_of(data: Any, name: str) -> dict[str, str] | None:
    """Give the fingerprints of a dataset in memory, or of all splits of a ``DatasetDict``.

    Parameters
    ----------
    data
        Any object.
    name
        What it is called in the snapshot.

    Returns
    -------
    dict or None
        By name; ``None`` if it is no such object.

    Raises
    ------
    UsageError
        If only some of its splits have one.
    """
    if (own := fingerprint_of(data)) is not None:
        return {name: own}
    if not isinstance(data, Mapping) or not data:
        return None
    found = {f"{name}/{split}": fingerprint_of(each) for split, each in data.items()}
    lacking = [each for each, fingerprint in found.items() if fingerprint is None]
    if len(lacking) == len(found):
        return None
    if lacking:
        raise UsageError(f"{lacking[0]}: has no fingerprint; give datasets that have one, or paths")
    return {each: fingerprint for each, fingerprint in found.items() if fingerprint is not None}


def saved_datasets(files: Iterable[DataFile]) -> dict[str, dict[str, str]]:
    """Find datasets that ``save_to_disk`` wrote among files, by folder: fingerprint, split, builder.

    What can't be read is left out: its bytes count anyway.
    """
    found: dict[str, dict[str, str]] = {}
    for file in files:
        name = PurePosixPath(file.name)
        if name.name not in {_STATE, _INFO}:
            continue
        with contextlib.suppress(OSError, ValueError):
            record = parse_json(read_regular(file.path, longest_bytes=_LONGEST_BYTES))
            facts = _facts(record) if isinstance(record, dict) else {}
            if facts:
                found.setdefault(str(name.parent), {}).update(facts)
    return {folder: facts for folder, facts in found.items() if "fingerprint" in facts}


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    fields = {
        "fingerprint": record.get("_fingerprint"),
        "split": record.get("_split"),
        "builder": record.get("builder_name"),
        "configuration": record.get("config_name"),
    }
    return {key: value for key, value in fields.items() if isinstance(value, str)}
