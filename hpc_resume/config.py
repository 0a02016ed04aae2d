"""Settings: from YAML files, ``HPC_RESUME_*`` variables and flags to one frozen record.

A flag beats an environment variable, which beats a file (a later file beats an earlier one), which beats the
default. What can't be is refused here, before anything is written or submitted.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from hpc_resume.errors import ConfigError
from hpc_resume.files import DISK, Filesystem
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import (
    ArraySettings,
    BudgetSettings,
    CheckpointSettings,
    DataSettings,
    EntrySettings,
    EnvironmentSettings,
    Lead,
    NodeType,
    Reason,
    Seconds,
    Settings,
    SiteSettings,
    SlurmSettings,
    StopSettings,
    ValidationSettings,
)
from hpc_resume.values import as_meant, lay, merge, parse_setting, put, read_yaml, spell

PREFIX = "HPC_RESUME_"
#: Variables with our prefix that launchers set and that are no settings.
WORDS = frozenset({"CONFIG", "NODE_TYPE", "JOB_STATE", "BATCH", "CHAIN", "REHEARSAL", "STEP", "SOURCE"})


class Config(Settings):
    """All settings of a run; ``Config()`` is complete and valid.

    Raises
    ------
    ConfigError
        Naming every setting that is wrong, with the nearest right name for an unknown one.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    run_dir: str = "runs/{name}"
    """The run's folder; ``{name}`` is filled in, a relative path starts at the submitting folder."""
    seed: int = 0
    scheduler: Literal["local", "slurm"] = "local"
    time_limit_s: Seconds | None = None
    """Length of an allocation: seconds, or as Slurm writes it, ``"1-12:00:00"``."""
    warning_lead_s: Lead = 120.0
    """How long before the time limit the warning signal comes."""
    warning_signal: Literal["USR1", "USR2"] = "USR2"
    node_types: Annotated[tuple[NodeType, ...], Field(min_length=1)] = (NodeType(),)
    """Embedded scheduler: given in turn, the last one again and again. Slurm: in the order of preference."""
    continuation: Literal["requeue", "chain", "array", "exit", "login"] = "requeue"
    """How a run goes on in the next job; docs/continuing.md compares the ways."""
    allow_precision_change: bool = False
    """A checkpoint may be continued with another ``precision``, or other rules for float32, than it was taken with."""
    why: Reason | None = None
    """Why settings are other ones than before; kept with each change in the journal."""
    allow_config_change: Reason | None = None
    """The reason why a run goes on with another ``seed``, global batch or order than before, which is refused else."""
    allow_data_change: Reason | None = None
    """Why the run goes on though its data has changed: a reason for one change, which is recorded."""
    allow_drift: Reason | None = None
    """Why the run may go on on software on which it would not (docs/provenance.md): ``"torch 3 gives the same loss"``."""
    slurm: SlurmSettings = SlurmSettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    stop: StopSettings = StopSettings()
    budget: BudgetSettings = BudgetSettings()
    array: ArraySettings = ArraySettings()
    data: DataSettings = DataSettings()
    site: SiteSettings = SiteSettings()
    entry: EntrySettings = EntrySettings()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, {})) from None
        self._origins = dict.fromkeys(_names_set(self), "call")

    def __eq__(self, other: object) -> bool:
        """Compare settings, not where they come from."""
        return self.model_dump() == other.model_dump() if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())

    @field_validator("run_dir")
    @classmethod
    def _check_run_dir(cls, value: str) -> str:
        try:
            value.format(name="run")
        except (LookupError, ValueError):
            raise ValueError("only {name} can be filled in") from None
        return value

    @model_validator(mode="after")
    def _check_times(self) -> Config:
        for place, node_type in enumerate(self.node_types):
            limit_s = node_type.time_limit_s or self.time_limit_s
            if limit_s is not None and self.warning_lead_s >= limit_s:
                whose = f"node_types.{place} ({node_type.name})" if node_type.time_limit_s else "the run"
                raise ValueError(
                    f"warning_lead_s is {self.warning_lead_s:g}, but the time limit of {whose} is {limit_s:g} s: "
                    "the warning would come before the start; set warning_lead_s to what a save takes, "
                    f"say {limit_s / 4:g}, or a longer time_limit_s"
                )
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> Config:
        if self.continuation == "array" and len(self.node_types) > 1:
            raise ValueError(
                f"continuation is array, whose elements are alike, but there are {len(self.node_types)} "
                "node_types; set continuation: chain, or give one node type"
            )
        names = [node_type.name for node_type in self.node_types]
        if self.scheduler == "slurm" and len(set(names)) < len(names):
            raise ValueError(f"node_types have the names {', '.join(names)}; give each its own")
        return self

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path] | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        given: str = "flag",
    ) -> Config:
        """Read files, environment and flags, in ascending order of precedence.

        Parameters
        ----------
        path
            A YAML file, or several, a later one over an earlier one; none for defaults.
        overrides
            Flags: settings by dotted name (``"checkpoint.every_steps"``, ``"node_types.0.ranks"``) or nested.
        environ
            Where ``HPC_RESUME_*`` variables are looked up, ``__`` between levels; none are without it.
        given
            What the overrides are, for messages.

        Raises
        ------
        ConfigError
            If a file can't be read, or a setting is unknown or out of range.
        """
        paths = [] if path is None else [path] if isinstance(path, (str, Path)) else list(path)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for each in paths:
            merge(values, read_yaml(Path(each)), str(each), origins)
        for key, text in _variables(environ or {}):
            put(
                values,
                key.lower().replace("__", "."),
                parse_setting(text),
                f"variable {PREFIX}{key}",
                origins,
            )
        lay(values, overrides or {}, given, origins)
        config = cls.__new__(cls)
        try:
            BaseModel.__init__(config, **as_meant(values, cls))  # keeps pydantic's error, to add the origins
        except ValidationError as error:
            raise ConfigError(_explain(error, origins)) from None
        config._origins.update(origins)  # noqa: SLF001 - our own
        return config

    def replace(self, **changes: Any) -> Config:
        """Make a copy with other settings, checked again; origins are kept.

        They are laid over these as flags over a file: of a group that is given as a dict, what it leaves out stays;
        one that is given as an object (``budget=BudgetSettings(…)``) takes the place of the old one.
        """
        values, origins = self.model_dump(exclude_unset=True), dict(self._origins)
        lay(values, changes, "call", origins)
        changed = Config(**values)
        changed._origins = origins
        return changed

    def named(self, name: str) -> Config:
        """Make a copy of that name, unless the settings give the run one."""
        return self.replace(name=name) if self.origin("name") == "default" else self

    def origin(self, key: str) -> str:
        """Where a setting (dotted name) comes from.

        ``"flag"``, ``"variable X"``, a file, ``"call"`` (``Config(…)`` or :meth:`replace`), or ``"default"``.
        """
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            if (origin := self._origins.get(".".join(parts[:length]))) is not None:
                return origin
        return "default"

    def run_directory(self, base: Path | None = None) -> Path:
        """Absolute path of the run's folder, with ``{name}`` filled in; need not exist."""
        return ((base or Path.cwd()) / Path(self.run_dir.format(name=self.name)).expanduser()).resolve()

    def to_yaml(self) -> str:
        """Write all settings as YAML, keys sorted: the same settings give the same text."""
        return spell(self.model_dump(mode="json"), sort_keys=True)

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of :meth:`to_yaml`."""
        return _digest(self.to_yaml())

    def store(self, run: RunDirectory | Path, *, fs: Filesystem = DISK) -> Path:
        """Write ``configs/DIGEST.yaml`` unless it is there, and return its path."""
        folder = (run if isinstance(run, RunDirectory) else RunDirectory(run)).configs
        text = self.to_yaml()
        path = folder / f"{_digest(text)}.yaml"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fs.write_file(path, text.encode())
        return path


def _names_set(settings: BaseModel, at: str = "") -> Iterator[str]:
    """Give the dotted names of what was given, not left to its default; a list or dict counts as one setting."""
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _names_set(value, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give the variables that are settings; one that is nearly a setting is an error, others are not ours."""
    for variable in sorted(environ):
        key = variable.removeprefix(PREFIX)
        if key == variable or key in WORDS:
            continue
        first = key.lower().split("__")[0]
        if first in Config.model_fields:
            yield key, environ[variable]
        elif inside := _inside_group(key.lower(), cutoff=0.9):
            right = PREFIX + inside.upper().replace(".", "__")
            raise ConfigError(f"variable {variable}: no such setting; did you mean {right}?")
        elif near := difflib.get_close_matches(first, Config.model_fields, n=1, cutoff=0.75):
            right = PREFIX + near[0].upper() + key[len(first) :]
            raise ConfigError(f"variable {variable}: no such setting; did you mean {right}?")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Say for each wrong setting where it comes from, what is wrong, and what would be right."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        location = problem["loc"]
        if any(
            len(other["loc"]) > len(location) > 0 and other["loc"][: len(location)] == location
            for other in problems
        ):
            continue  # a list "has no items" where its only item is wrong
        name = ".".join(str(part) for part in location)
        origin = _origin_of(name, origins)
        if problem["type"] == "extra_forbidden":
            known = _names_at(location[:-1])
            inside = _inside_group(str(location[-1]), cutoff=0.6) if len(location) == 1 else None
            near = [inside] if inside else difflib.get_close_matches(str(location[-1]), known, n=1)
            what = f"no such setting; did you mean {near[0]}?" if near else "no such setting"
            what += f" Here are: {', '.join(known)}" if not near else ""
        else:
            what = (
                problem["msg"]
                .removeprefix("Value error, ")
                .replace("valid tuple", "list")
                .replace("Tuple", "List")
            )
            if not isinstance(problem["input"], (dict, list, BaseModel)):
                what += f", but is {problem['input']!r}"
        lines.append(": ".join(part for part in (origin, name, what) if part))
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} settings are wrong:\n  " + "\n  ".join(lines)


def _origin_of(name: str, origins: Mapping[str, str]) -> str | None:
    """Where a wrong setting comes from; of a group that is wrong as a whole, where anything in it does."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (origin := origins.get(".".join(parts[:end]))) is not None:
            return origin
    return next((origin for key, origin in origins.items() if key.startswith(f"{name}.")), None)


def _inside_group(name: str, *, cutoff: float) -> str | None:
    """Give the dotted name of a setting that was written with ``_`` after its group's: ``checkpoint_every_s``."""
    for group, field in Config.model_fields.items():
        kind = field.annotation
        if name.startswith(f"{group}_") and isinstance(kind, type) and issubclass(kind, BaseModel):
            inner = name.removeprefix(f"{group}_").lstrip("_")
            near = difflib.get_close_matches(inner, kind.model_fields, n=1, cutoff=cutoff)
            return f"{group}.{near[0]}" if near else None
    return None


def _names_at(location: Sequence[str | int]) -> list[str]:
    """Names of the settings at a place of :class:`Config`."""
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)
