"""Rollbacks: which checkpoints a run does not go on from any more, though they are still there.

``RUN_DIR/rollbacks/0001.json`` and so on are written once each, and only ever added to. One says that the run
goes on from a checkpoint, and which later ones are set aside; or that it undoes the one before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.rundir import RunDirectory, checkpoint_step, digest, is_checkpoint_name, sealed
from hpc_resume.untrusted import brief, check_nesting, check_text, parse_json, read_regular

SCHEMA = 1
#: A longer record is none: this is room for two hundred thousand names.
_LONGEST_BYTES = 1 << 23
_NAME = re.compile(r"([0-9]{4,9})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """One rollback, or the undoing of one.

    Parameters
    ----------
    number
        From 1.
    to
        Name of the checkpoint that the run goes on from.
    set_aside
        Names of those that came after it.
    kept
        Names of the others that there were.
    after
        Number of the last attempt before it; 0 if there was none.
    why, who, when
        The reason, the person, and Unix time in seconds.
    undoes
        Number of the rollback that this one takes back; ``None`` if it is one itself.
    """

    number: int
    to: str
    set_aside: tuple[str, ...]
    kept: tuple[str, ...]
    after: int
    why: str
    who: str
    when: float
    undoes: int | None = None

    @property
    def step(self) -> int:
        """Completed steps that the run goes on from."""
        return checkpoint_step(self.to)

    @property
    def newest_step(self) -> int:
        """Completed steps of the newest checkpoint that there was."""
        return max(map(checkpoint_step, (self.to, *self.set_aside)))

    @property
    def sentence(self) -> str:
        """Tell of it in one line."""
        if self.undoes is not None:
            return f"rollback {self.undoes} was undone by {self.who}: {self.why}"
        return f"rolled back from step {self.newest_step} to step {self.step} by {self.who}: {self.why}"

    def to_bytes(self) -> bytes:
        """Content of its file."""
        return sealed({"schema": SCHEMA, **asdict(self)})


def folder(run: RunDirectory) -> Path:
    """Where a run's rollbacks are."""
    return run.root / "rollbacks"


def path_of(run: RunDirectory, number: int) -> Path:
    """File of one rollback."""
    return folder(run) / f"{number:04d}.json"


def read_rollbacks(run: RunDirectory) -> tuple[Rollback, ...]:
    """Read all rollbacks of a run, ascending.

    Raises
    ------
    IntegrityError
        If one is damaged or gone: then it is not known which checkpoints are set aside.
    """
    try:
        names = os.listdir(folder(run))  # noqa: PTH208 - names are all that is needed
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise IntegrityError(f"{folder(run)}: can't be listed ({error.strerror})") from error
    numbers = sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
    if numbers != list(range(1, len(numbers) + 1)):
        lacking = min(set(range(1, len(numbers) + 1)) - set(numbers), default=1)
        raise IntegrityError(f"{path_of(run, lacking)}: is gone; {_MEND}")
    return tuple(_read(run, number) for number in numbers)


_MEND = (
    "it says which checkpoints are set aside, so nothing is restored before it is put back; without a copy, move "
    "rollbacks/ away, and roll back once more"
)


def _read(run: RunDirectory, number: int) -> Rollback:
    path = path_of(run, number)
    try:
        record = parse_json(read_regular(path, longest_bytes=_LONGEST_BYTES, follow=False))
        check_nesting(record, 4)
        if not isinstance(record, dict) or record.get("digest") != digest(record):
            raise ValueError("its digest differs")
        if record.get("schema") != SCHEMA:
            raise ValueError(f"schema {brief(record.get('schema'))}, but this version reads {SCHEMA}")
        return _parse(record, number)
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read ({error.strerror}); {_MEND}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise IntegrityError(f"{path}: damaged ({error!s:.200}); {_MEND}") from error


def _parse(record: JsonObject, number: int) -> Rollback:
    found = Rollback(
        number=_integer(record["number"]),
        to=_checkpoint(record["to"]),
        set_aside=tuple(map(_checkpoint, _listed(record["set_aside"]))),
        kept=tuple(map(_checkpoint, _listed(record["kept"]))),
        after=_integer(record["after"]),
        why=_text(record["why"]),
        who=_text(record["who"]),
        when=_time(record["when"]),
        undoes=None if record["undoes"] is None else _integer(record["undoes"]),
    )
    if found.number != number:
        raise ValueError(f"it is number {found.number}")
    if found.undoes is not None and not 1 <= found.undoes < number:
        raise ValueError(f"it undoes number {found.undoes}")
    if any(checkpoint_step(name) < found.step for name in found.set_aside):
        raise ValueError("it sets aside what came before")
    return found


def standing(rollbacks: Iterable[Rollback]) -> list[Rollback]:
    """Give the rollbacks that hold: neither undone, nor the undoing of one."""
    known = list(rollbacks)
    undone = {each.undoes for each in known if each.undoes is not None}
    return [each for each in known if each.undoes is None and each.number not in undone]


def set_aside(run: RunDirectory) -> dict[str, Rollback]:
    """Give the checkpoints that a run does not go on from, by name, with the rollback that says so.

    Raises
    ------
    IntegrityError
        As :func:`read_rollbacks`.
    """
    return {name: each for each in standing(read_rollbacks(run)) for name in each.set_aside}


def active_names(run: RunDirectory) -> list[str]:
    """Names of the checkpoints that a run may go on from, by ascending step.

    Raises
    ------
    IntegrityError
        As :func:`read_rollbacks`.
    """
    aside = set_aside(run)
    return [name for name in run.checkpoint_names() if name not in aside]


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{brief(value)} is no number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return check_text(value)


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ValueError(f"{brief(value)} is no time")
    return float(value)


def _listed(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{brief(value)} is no list")
    return value


def _checkpoint(value: object) -> str:
    if not isinstance(value, str) or not is_checkpoint_name(value):
        raise ValueError(f"{brief(value)} is no name of a checkpoint")
    return value
