"""How two runs, attempts or checkpoints differ: code, configuration, data, environment, state."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_resume.files import JsonObject
from hpc_resume.provenance.configuration import Change as SettingChange
from hpc_resume.provenance.configuration import changes as setting_changes
from hpc_resume.provenance.datachange import compare_data
from hpc_resume.provenance.datarecord import DataRecord
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.provenance.drift import Drift, changed_packages, environment_drift
from hpc_resume.provenance.listing import FileChanges, Listing
from hpc_resume.provenance.remembered import listing_of, part, sources_of
from hpc_resume.records import data_path
from hpc_resume.report.sides import Side

if TYPE_CHECKING:
    from hpc_resume.checkpoint.difference import ValueDifference
    from hpc_resume.checkpoint.norms import TensorChange

#: Of a longer file only that it changed is told.
_LONGEST_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDifference:
    """A file of the source that is not the same.

    Parameters
    ----------
    path
        In the project.
    what
        ``"changed"``, ``"added"`` or ``"removed"``.
    lines
        A unified diff; empty where it is no text.
    """

    path: str
    what: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A named value that is not the same; ``None`` where there is none."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_spelled(self.before)} → {_spelled(self.now)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What of the training's state is not the same.

    Parameters
    ----------
    steps
        Of the checkpoints.
    tensors, values
        What differs.
    count
        Tensors that there are, in the one or the other.
    """

    steps: tuple[int, int]
    tensors: tuple[TensorChange, ...]
    values: tuple[ValueDifference, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two sides differ.

    Parameters
    ----------
    labels
        What they are.
    code, settings, data, environment, state
        What is not the same; ``state`` is ``None`` if it was not compared.
    files
        What differs in the data, a line each, as far as both snapshots are there.
    unknown
        What could not be compared, and why.
    """

    labels: tuple[str, str]
    code: tuple[FileDifference, ...]
    settings: tuple[SettingChange, ...]
    data: tuple[Change, ...]
    files: tuple[str, ...]
    environment: tuple[Drift, ...]
    state: State | None
    unknown: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs, the step and what is another one at every attempt aside."""
        state = self.state is not None and (self.state.tensors or self.state.values)
        serious = [each for each in self.environment if each.grade != "harmless"]
        return not (self.code or self.settings or self.data or serious or state)

    def to_json(self) -> JsonObject:
        """JSON form."""
        state = self.state
        return {
            "one": self.labels[0],
            "two": self.labels[1],
            "equal": self.equal,
            "code": [{"path": each.path, "what": each.what, "diff": list(each.lines)} for each in self.code],
            "configuration": [each.to_json() for each in self.settings],
            "data": {each.name: [each.before, each.now] for each in self.data},
            "files": list(self.files),
            "environment": [each.to_json() for each in self.environment],
            "state": None
            if state is None
            else {
                "steps": list(state.steps),
                "count": state.count,
                "tensors": [each.to_json() for each in state.tensors],
                "values": {each.name: [each.one, each.two] for each in state.values},
            },
            "unknown": list(self.unknown),
        }


def compare(
    one: Side, two: Side, *, tensors: bool = True, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two sides.

    Parameters
    ----------
    one, two
        What :func:`~hpc_resume.report.sides.find_side` has found.
    tensors
        Compare the state, too: that reads both checkpoints whole.
    progress
        Told how many bytes of the first are done, of how many.

    Raises
    ------
    IntegrityError
        If a checkpoint or a source is damaged.
    """
    unknown: list[str] = []
    code = tuple(_code(one, two, unknown))
    settings = _settings(one, two, unknown)
    state = None
    if tensors and one.folder is not None and two.folder is not None:
        state = _state(one, two, progress)
    elif tensors:
        lacking = one if one.folder is None else two
        unknown.append(f"state: {lacking.label} has no checkpoint")
    return Difference(
        labels=(one.label, two.label),
        code=code,
        settings=settings,
        data=_changes(_told(one), _told(two)),
        files=_files_of_data(one, two),
        environment=tuple(
            environment_drift(
                one.environment,
                two.environment,
                imported=changed_packages(one.environment, two.environment),
            )
        ),
        state=state,
        unknown=tuple(unknown),
    )


def _code(one: Side, two: Side, unknown: list[str]) -> Iterator[FileDifference]:
    listings = []
    for side in (one, two):
        found = listing_of(side.run, side.record)
        if found is None:
            source = part(side.record, "source")
            why = source.get("problem") or ("was not kept" if source else "is not known")
            unknown.append(f"code: the source of {side.label} {why!s:.300}")
        else:
            listings.append(found)
    if len(listings) == 2:
        yield from _files(one, two, listings[0], listings[1])
    for side in (one, two):
        for key, what in (("altered", "not what was kept"), ("live", "not from the snapshot")):
            files = part(side.record, "source").get(key)
            for path in files if isinstance(files, list) else ():
                yield FileDifference(path=f"{path}", what=f"{what}, when {side.label} ran it", lines=())


def _files(one: Side, two: Side, mine: Listing, other: Listing) -> Iterator[FileDifference]:
    changes = FileChanges.between(mine, other)
    if not changes:
        return
    old = _contents(one, [*changes.changed, *changes.removed])
    new = _contents(two, [*changes.changed, *changes.added])
    for what, paths in (("changed", changes.changed), ("added", changes.added), ("removed", changes.removed)):
        for path in paths:
            lines = _unified(path, old.get(path), new.get(path))
            yield FileDifference(path=path, what=what, lines=lines)


def _contents(side: Side, paths: list[str]) -> dict[str, bytes]:
    digest = part(side.record, "source")["digest"]
    return sources_of(side.run, side.record).read(digest, paths)


def _unified(path: str, old: bytes | None, new: bytes | None) -> tuple[str, ...]:
    texts = []
    for data in (old, new):
        if data is not None and (len(data) > _LONGEST_TEXT_BYTES or b"\0" in data):
            return ()
        try:
            texts.append(b"" if data is None else data)
            texts[-1].decode()
        except UnicodeDecodeError:
            return ()
    before, now = (text.decode().splitlines() for text in texts)
    names = "/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}"
    return tuple(difflib.unified_diff(before, now, *names, lineterm=""))


def _settings(one: Side, two: Side, unknown: list[str]) -> tuple[SettingChange, ...]:
    found = []
    for side in (one, two):
        settings = side.settings()
        if settings is None:
            unknown.append(f"configuration: that of {side.label} is not known")
        else:
            found.append(settings)
    return setting_changes(*found) if len(found) == 2 else ()


def _told(side: Side) -> JsonObject:
    """Give what a side says of its data; how it was compared, and why it changed, is another matter."""
    record = DataRecord.from_json(side.data)
    told = {
        "data": record.digest,
        "validation data": record.validation,
        "preprocessing": record.preprocessing,
    }
    return {name: value for name, value in told.items() if value is not None}


def _files_of_data(one: Side, two: Side) -> tuple[str, ...]:
    snapshots = []
    for side in (one, two):
        digest = DataRecord.from_json(side.data).digest
        if digest is not None and (path := data_path(side.run, digest)).is_file():
            snapshots.append(DataSnapshot.load(path))
    return tuple(compare_data(*snapshots).lines()) if len(snapshots) == 2 else ()


def _changes(before: JsonObject, now: JsonObject) -> tuple[Change, ...]:
    mine, other = dict(_flat("", before)), dict(_flat("", now))
    return tuple(
        Change(name=name, before=mine.get(name), now=other.get(name))
        for name in sorted(mine.keys() | other.keys())
        if name not in mine or name not in other or repr(mine[name]) != repr(other[name])
    )


def _flat(at: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(f"{at}.{key}" if at else str(key), each)
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for place, each in enumerate(value):
            yield from _flat(f"{at}.{place}", each)
    elif at:
        yield at, value


def _state(one: Side, two: Side, progress: Callable[[int, int], None] | None) -> State:
    from hpc_resume.checkpoint.difference import value_differences
    from hpc_resume.checkpoint.norms import tensor_changes
    from hpc_resume.checkpoint.opened import Checkpoint

    assert one.folder is not None
    assert two.folder is not None
    with Checkpoint(one.folder) as mine, Checkpoint(two.folder) as other:
        return State(
            steps=(mine.step, other.step),
            tensors=tuple(tensor_changes(mine, other, progress=progress)),
            values=tuple(value_differences(mine, other)),
            count=len({*mine.names(), *other.names()}),
        )


def _spelled(value: Any) -> str:
    return "none" if value is None else str(value)
