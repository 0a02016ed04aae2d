"""Lineage: which run a forked one comes from, at which step, and which checkpoints it has from there.

``RUN_DIR/lineage.json`` is written once, with the run. It names all ancestors, so that it can be followed when
their folders are gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import RunDirectory, checkpoint_name, checkpoint_step, digest, sealed
from hpc_resume.untrusted import brief, check_nesting, check_text, parse_json, read_regular

SCHEMA = 1
_LONGEST_BYTES = 1 << 23
_CONTENT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A run that was forked.

    Parameters
    ----------
    run_id, name
        Who it is.
    path
        Where its folder was then.
    checkpoint
        Name of the one at which the other run went its own way.
    """

    run_id: str
    name: str
    path: str
    checkpoint: str

    @property
    def step(self) -> int:
        """Completed steps at which the other run went its own way."""
        return checkpoint_step(self.checkpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a run comes from.

    Parameters
    ----------
    run_id
        Of the run itself.
    ancestors
        The run that it was forked from, the one that this was forked from, and so on; at least one.
    shared
        Content ids of the checkpoints that it began with, by name: of the fork, and of those that it refers to.
    attempt
        Of the ancestor, which wrote the checkpoint.
    config
        Digest of the configuration that it was written with, if that is known.
    settings
        What was set otherwise, by name.
    how
        ``"links"`` or ``"copies"``: whether files are shared on disk.
    why, who, when
        The reason, the person, and Unix time in seconds.
    """

    run_id: str
    ancestors: tuple[Ancestor, ...]
    shared: Mapping[str, str]
    attempt: int
    config: str | None
    settings: JsonObject
    how: str
    why: str
    who: str
    when: float

    @property
    def parent(self) -> Ancestor:
        """The run that it was forked from."""
        return self.ancestors[0]

    @property
    def sentence(self) -> str:
        """Tell of it in one line."""
        parents = [f"step {each.step} of {each.name} ({each.path})" for each in self.ancestors]
        why = f": {self.why}" if self.why else ""
        return f"forked from {', which was forked from '.join(parents)} by {self.who}{why}"

    def to_bytes(self) -> bytes:
        """Content of its file."""
        return sealed({"schema": SCHEMA, **asdict(self), "shared": dict(self.shared)})


def lineage_path(run: RunDirectory) -> Path:
    """Where a run's lineage is."""
    return run.root / "lineage.json"


def read_lineage(run: RunDirectory) -> Lineage | None:
    """Read where a run comes from; ``None`` if it is no fork.

    Raises
    ------
    IntegrityError
        If the record is damaged, or another run's.
    """
    path = lineage_path(run)
    try:
        record = parse_json(read_regular(path, longest_bytes=_LONGEST_BYTES, follow=False))
        check_nesting(record, 32)
        if not isinstance(record, dict) or record.get("digest") != digest(record):
            raise ValueError("its digest differs")
        if record.get("schema") != SCHEMA:
            raise ValueError(f"schema {brief(record.get('schema'))}, but this version reads {SCHEMA}")
        found = _parse(record)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError) as error:
        raise IntegrityError(f"{path}: damaged ({error!s:.200})") from error
    if found.run_id != run.identity()["run_id"]:
        raise IntegrityError(f"{path}: belongs to run {found.run_id:.40}")
    return found


def _parse(record: JsonObject) -> Lineage:
    ancestors = tuple(
        Ancestor(**{key: _text(each[key]) for key in ("run_id", "name", "path", "checkpoint")})
        for each in _of(list, record["ancestors"])
    )
    shared = {_text(name): _text(content_id) for name, content_id in _of(dict, record["shared"]).items()}
    for name, content_id in shared.items():
        if (
            not _CONTENT_ID.fullmatch(content_id)
            or checkpoint_name(checkpoint_step(name), content_id) != name
        ):
            raise ValueError(f"{brief(name)} is no checkpoint of content {brief(content_id)}")
    if not ancestors or ancestors[0].checkpoint not in shared:
        raise ValueError("it does not say which checkpoint was forked")
    for each in ancestors:
        checkpoint_step(each.checkpoint)
    when = record["when"]
    if isinstance(when, bool) or not isinstance(when, int | float) or not 0 <= when < 1e12:
        raise ValueError(f"{brief(when)} is no time")
    attempt = record["attempt"]
    if type(attempt) is not int or attempt < 0:
        raise ValueError(f"{brief(attempt)} is no attempt")
    return Lineage(
        run_id=_text(record["run_id"]),
        ancestors=ancestors,
        shared=shared,
        attempt=attempt,
        config=None if record["config"] is None else _text(record["config"]),
        settings=_of(dict, record["settings"]),
        how=_text(record["how"]),
        why=_text(record["why"]),
        who=_text(record["who"]),
        when=float(when),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return check_text(value)


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{brief(value)} is no {kind.__name__}")
    return value
