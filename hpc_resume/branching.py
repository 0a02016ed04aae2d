"""A run branches: a new one begins at a checkpoint of it, or it goes on itself from an earlier one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.checkpoint.fork import ForkPlan, apply_fork, plan_fork
from hpc_resume.checkpoint.rollback import RollbackPlan, apply_rollback, plan_rollback, undo_rollback
from hpc_resume.config import Config
from hpc_resume.errors import ConfigError, UsageError
from hpc_resume.job import Job
from hpc_resume.launch.entry import CommandEntry, Entry, make_entry
from hpc_resume.launch.submit import submit_entry
from hpc_resume.lineage import Lineage
from hpc_resume.provenance.configuration import Change, changes, read_configuration
from hpc_resume.report.status import status
from hpc_resume.rollbacks import Rollback
from hpc_resume.rundir import RunDirectory
from hpc_resume.values import as_meant, lay, spell


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A run that was forked from another one.

    Parameters
    ----------
    run_dir
        Its folder.
    lineage
        Where it comes from.
    config
        Its settings; ``None`` if those of its parent are not known.
    config_path
        The file that holds them.
    entry
        What it runs; ``None`` if it was not submitted by us, or is a function that no file holds.
    size_bytes
        Of the checkpoints that it shares.
    """

    run_dir: Path
    lineage: Lineage
    config: Config | None
    config_path: Path | None
    entry: Entry | None
    size_bytes: int

    @property
    def command(self) -> str:
        """How to submit it, as a command; or what to do instead, in words."""
        if self.config_path is None or self.config is None or self.entry is None:
            return f"start it as its parent was started, with run_dir {self.run_dir}"
        words = ["hpc-resume", "submit"]
        if isinstance(self.entry, CommandEntry):
            return shlex.join([*words, "-c", str(self.config_path), "--", *self.entry.command])
        words += [self.entry.name, "-c", str(self.config_path)]
        for key, value in self.config.entry.kwargs.items():
            words += ["--set", f"{key}={_typed(value)}"]
        return shlex.join(words)

    def submit(self) -> Job:
        """Submit it.

        Raises
        ------
        UsageError
            If it is not known what it runs, or a job of it is alive.
        SchedulerError
            If the scheduler refuses.
        """
        if self.config is None or self.entry is None:
            raise UsageError(f"{self.run_dir}: what it runs is not known here; {self.command}")
        kwargs = {} if isinstance(self.entry, CommandEntry) else self.config.entry.kwargs
        return Job(submit_entry(self.entry, self.config, run_dir=self.run_dir, kwargs=kwargs))


def fork(
    run_dir: str | Path,
    /,
    *,
    at: int | None = None,
    to: str | Path | None = None,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    why: str = "",
    verify: bool = False,
    copy: bool = False,
    **more: Any,
) -> Fork:
    """Make a new run that begins at a checkpoint of another one, and shares its bytes.

    Parameters
    ----------
    run_dir
        The run to fork; it is left alone, and may run on.
    at
        Step of the checkpoint; the newest one by default.
    to
        The new run's folder; by default ``RUN_DIR-fork-STEP`` beside it.
    name
        What it is called; by default its folder's name.
    config
        Settings that are other ones, by dotted name or nested.
    why
        The reason, for the record.
    verify
        Read every byte that is shared; else it is read, and verified, when it is restored.
    copy
        Copy files even where they could be linked: other bytes on disk, which no fault of the disk hits together.
    arguments, **more
        Arguments of the function that are other ones: ``lr=1e-4``; in a dict those that are called as one of these.

    Raises
    ------
    CheckpointNotFound
        If there is no such checkpoint.
    IntegrityError
        If it is damaged.
    UsageError
        If the folder is there already, or something can't be set; nothing has been written then.
    """
    parent = RunDirectory(Path(run_dir).resolve())
    plan = plan_fork(parent, at, verify=verify)
    target = (
        Path(to).absolute()
        if to is not None
        else parent.root.with_name(f"{parent.root.name}-fork-{plan.manifest.step}")
    )
    old = _recorded(plan)
    settled = _settle(
        plan, old, target, name or _plain(target.name), config or {}, {**(arguments or {}), **more}, why
    )
    entry = None if settled is None else _entry(settled)
    different = () if settled is None or old is None else changes(old, settled.model_dump(mode="json"))
    _check(different, settled)
    lineage = apply_fork(
        plan,
        target,
        name=name or target.name,
        settings={each.name: each.new for each in different if each.name != "name"},
        config=settled,
        why=why,
        copy=copy,
    )
    stored = None if settled is None else target / "configs" / f"{settled.digest()}.yaml"
    return Fork(
        run_dir=target,
        lineage=lineage,
        config=settled,
        config_path=stored,
        entry=entry,
        size_bytes=plan.size_bytes,
    )


def _recorded(plan: ForkPlan) -> dict[str, Any] | None:
    digest = plan.manifest.config
    return None if digest is None else read_configuration(plan.parent, digest)


def _settle(
    plan: ForkPlan,
    old: Mapping[str, Any] | None,
    target: Path,
    name: str,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    why: str,
) -> Config | None:
    """Settle the new run's settings: those with which the checkpoint was written, and what is set otherwise."""
    if old is None:
        if settings or arguments:
            raise UsageError(
                f"{plan.parent.root}: the settings of {plan.checkpoint} are not known, so none can be set otherwise; "
                "fork without, and give them when you start the new run"
            )
        return None
    known = {key: value for key, value in old.items() if key in Config.model_fields}
    values: dict[str, Any] = deepcopy(known)
    entry = values.get("entry")
    recorded = entry if isinstance(entry, dict) else {}
    if arguments and recorded.get("target") is None:
        raise UsageError(
            f"{plan.parent.root}: its script was not given arguments by us, so {', '.join(arguments)} can't be set; "
            "change the command, or the script; settings are set by -o, in Python config={…}"
        )
    values["entry"] = {**recorded, "kwargs": {**dict(recorded.get("kwargs") or {}), **arguments}}
    values |= {"name": name, "run_dir": str(target), "why": why or None}
    values |= {"allow_config_change": None, "allow_data_change": None}  # reasons for changes of the parent
    lay(values, settings, "fork", {})
    try:
        return Config(**as_meant(values, Config))
    except ConfigError as error:
        raise ConfigError(f"{plan.parent.root}: {error}") from error


def _entry(config: Config) -> Entry | None:
    """Find what a run runs again, and check that it takes its arguments."""
    recorded = config.entry
    if recorded.command:
        return make_entry(list(recorded.command), {})
    if recorded.target is None or ":" not in recorded.target:
        return None  # a function object, which no file holds
    return make_entry(recorded.target, recorded.kwargs)


def _check(different: tuple[Change, ...], config: Config | None) -> None:
    """Refuse what the new run's first attempt would."""
    refused = [each for each in different if each.grade == "stop"]
    if refused and config is not None and config.allow_config_change is None:
        raise UsageError(
            f"{'; '.join(each.sentence for each in refused)}: the new run would go on with another order of samples than "
            'the checkpoint\'s; if that is meant, say why: -o allow_config_change="…"'
        )


def rollback(
    run_dir: str | Path,
    /,
    *,
    to: int,
    why: str,
    fence: bool = False,
) -> Rollback:
    """Have a run go on from an earlier step; what was saved later stays, and is set aside.

    Parameters
    ----------
    run_dir
        The run.
    to
        Step of the checkpoint to go on from; every byte of it is verified first.
    why
        The reason, for the record.
    fence
        Also while an attempt runs: it can save nothing any more, and ends at its next checkpoint.

    Raises
    ------
    UsageError
        If an attempt runs.
    CheckpointNotFound
        If there is no full checkpoint of this step.
    IntegrityError
        If it is damaged.
    FencedError
        If an attempt began meanwhile; nothing has changed then.
    """
    run = RunDirectory(Path(run_dir).resolve())
    plan = plan_rollback(run, to)
    check_nobody_trains(run, fence=fence)
    return apply_rollback(run, plan, why=why)


def undo(run_dir: str | Path, /, *, why: str, fence: bool = False) -> Rollback:
    """Take the last rollback of a run back, as long as nothing has been saved since; see :func:`rollback`."""
    run = RunDirectory(Path(run_dir).resolve())
    check_nobody_trains(run, fence=fence)
    return undo_rollback(run, why=why)


def planned(run_dir: str | Path, to: int) -> RollbackPlan:
    """Tell what :func:`rollback` would do."""
    return plan_rollback(RunDirectory(Path(run_dir).resolve()), to)


def check_nobody_trains(run: RunDirectory, *, fence: bool) -> None:
    """Raise UsageError if an attempt of a run seems to be alive, unless it may be fenced off."""
    found = status(run.root)
    if found.state == "running" and not fence:
        raise UsageError(
            f"{run.root}: an attempt is alive ({found.why}), and would save what comes after; end it first: hpc-resume "
            f"cancel {run.root}. If it is dead, or may lose what it has not saved: --fence"
        )


def _typed(value: Any) -> str:
    """Spell a value such that ``--set`` reads it as it is."""
    return spell(value, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("\n...")


def _plain(name: str) -> str:
    """Make a name that a run may have."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)
    return kept.lstrip("._-") or "fork"
