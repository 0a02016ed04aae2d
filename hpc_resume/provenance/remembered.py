"""The source and the environment of a run's attempts, by their records; whatever can't be read says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_resume.errors import HpcResumeError
from hpc_resume.files import JsonObject
from hpc_resume.provenance.drift import Drift, changed_packages, environment_drift, in_order, source_drift
from hpc_resume.provenance.listing import FileChanges, Listing
from hpc_resume.provenance.packages import imported_packages
from hpc_resume.provenance.sources import Sources
from hpc_resume.records import attempt_record
from hpc_resume.rundir import RunDirectory


def part(record: JsonObject, name: str) -> JsonObject:
    """Give a part of a record, empty if there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def sources_of(run: RunDirectory, record: JsonObject) -> Sources:
    """Give where the source of an attempt was kept."""
    return Sources.of(run, shared=part(record, "source").get("shared") is True)


def listing_of(run: RunDirectory, record: JsonObject) -> Listing | None:
    """Give the files of an attempt's source; ``None`` if they are not known."""
    digest: Any = part(record, "source").get("digest")
    if not isinstance(digest, str):
        return None
    try:
        return sources_of(run, record).listing(digest)
    except HpcResumeError:
        return None


def check_sources(run: RunDirectory) -> Iterator[tuple[Path, str]]:
    """Find which of a run's sources are not what was kept, or are gone; it only reads.

    Yields
    ------
    (Path, str)
        A file, and what is wrong with it.
    """
    yield from Sources.of(run).check()
    told = set()
    for number in run.attempt_numbers():
        record = attempt_record(run, number)
        digest: Any = part(record, "source").get("digest")
        if not isinstance(digest, str) or digest in told:
            continue
        told.add(digest)
        sources = sources_of(run, record)
        if not sources.has(digest):
            yield sources.folder / f"{digest:.64}.json", f"is gone; attempt {number} ran it"
        elif sources.folder != run.sources:
            yield from sources.check_source(digest)


def drift_between(run: RunDirectory, before: JsonObject, now: JsonObject) -> list[Drift]:
    """Compare where two attempts of a run come from; for the process that runs the later one.

    Parameters
    ----------
    run
        The run directory.
    before, now
        Their records.
    """
    mine, other = part(before, "environment"), part(now, "environment")
    differing = changed_packages(mine, other)
    found = environment_drift(mine, other, imported=imported_packages(differing))
    one, two = listing_of(run, before), listing_of(run, now)
    changes = FileChanges.between(one, two) if one is not None and two is not None else None
    return in_order([*source_drift(part(before, "source"), part(now, "source"), changes), *found])
