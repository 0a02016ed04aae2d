"""What was set otherwise from attempt to attempt, and why. Read from the journals."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_resume.errors import CheckpointNotFound
from hpc_resume.files import JsonObject
from hpc_resume.journal import read_events
from hpc_resume.provenance.configuration import Change, flat, read_configuration
from hpc_resume.report.status import status
from hpc_resume.report.tables import Table
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import brief, parse_json, read_regular

_KINDS = frozenset({"config_changed", "config_unknown", "config_change_allowed", "restored", "fresh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """One setting that an attempt has changed.

    Parameters
    ----------
    attempt, since
        Which one, and the one before it that trained; 0: the run that was forked.
    t
        Unix time in seconds.
    name, old, new, grade
        See :class:`~hpc_resume.provenance.configuration.Change`.
    why
        The reason that was given; empty if none was.
    trained
        Whether the attempt came to train.
    """

    attempt: int
    since: int
    t: float
    name: str
    old: Any
    new: Any
    grade: str
    why: str
    trained: bool

    def to_json(self) -> JsonObject:
        """JSON form, with the fields' names."""
        return asdict(self)


def read_config_log(root: Path) -> list[ConfigChange]:
    """Read what was set otherwise over a run's attempts, ascending.

    Raises
    ------
    CheckpointNotFound
        If it is no run directory.
    """
    run = RunDirectory(root)
    run.identity()
    found = []
    for number in run.attempt_numbers():
        events = read_events(run.attempt(number) / "events.jsonl", _KINDS)
        trained = any(event["event"] in {"restored", "fresh"} for event in events)
        for event in events:
            changed = event.get("changes")
            if event["event"] != "config_changed" or not isinstance(changed, list):
                continue
            since, t, why = event.get("since"), event.get("t"), event.get("why")
            found += [
                ConfigChange(
                    attempt=number,
                    since=since if isinstance(since, int) else 0,
                    t=float(t) if isinstance(t, int | float) else 0.0,
                    name=str(each.get("name")),
                    old=each.get("old"),
                    new=each.get("new"),
                    grade=str(each.get("grade")),
                    why=why if isinstance(why, str) else "",
                    trained=trained,
                )
                for each in changed
                if isinstance(each, dict)
            ]
    return found


def config_log_table(root: Path) -> Table:
    """Show what was set otherwise over a run's attempts; below it, forks and rollbacks."""
    found = read_config_log(root)
    title = (
        f"{len(found)} setting{'' if len(found) == 1 else 's'} changed" if found else "no setting was changed"
    )
    return Table(
        title=title,
        columns=("attempt", "when", "setting", "was", "is", "", "why"),
        right=("attempt",),
        rows=tuple(
            (
                str(each.attempt),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.t)),
                Change(name=each.name, old=None, new=None, grade="look").short,
                _cell(each.old),
                _cell(each.new),
                each.grade if each.trained else f"{each.grade}, did not train",
                each.why,
            )
            for each in found
        ),
        note="\n".join(status(root).branching),
    )


def last_settings(root: Path) -> dict[str, Any]:
    """Give the settings of a run's last attempt, by dotted name.

    Raises
    ------
    CheckpointNotFound
        If no attempt has recorded any.
    IntegrityError
        If they are not what was written.
    """
    run = RunDirectory(root)
    run.identity()
    for number in reversed(run.attempt_numbers()):
        digest = _config_of(run, number)
        values = None if digest is None else read_configuration(run, digest)
        if values is not None:
            return flat(values)
    raise CheckpointNotFound(f"{root}: no attempt has begun, so no settings are recorded")


def _config_of(run: RunDirectory, number: int) -> str | None:
    try:
        record = parse_json(read_regular(run.attempt(number) / "attempt.json", longest_bytes=1 << 24))
    except (OSError, ValueError):
        return None
    digest = record.get("config") if isinstance(record, dict) else None
    return digest if isinstance(digest, str) else None


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else brief(value)
