"""Submission: from a function or command and its settings to a job. Everything is checked before anything is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.check import check_times
from hpc_resume.launch.entry import CommandEntry, Entry, make_entry
from hpc_resume.launch.handle import JobHandle, jobs_folder, live_job
from hpc_resume.launch.onemachine import OneMachineExecutor, clean_environment
from hpc_resume.launch.sourced import Moved, Project, SourcedEntry
from hpc_resume.provenance.running import take_source, what_changed
from hpc_resume.provenance.source import Source
from hpc_resume.provenance.sources import Chosen, Sources
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import EntrySettings
from hpc_resume.sweepdir import SweepDirectory


def submit(
    target: Callable[..., Any] | str | Sequence[str],
    /,
    *,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None = None,
    run_dir: str | Path | None = None,
    **kwargs: Any,
) -> JobHandle:
    """Submit a run.

    Parameters
    ----------
    target
        A function, ``"file.py:function"``, ``"package.module:function"``, or a command as a list of words.
    config
        Settings: a :class:`~hpc_resume.config.Config`, a YAML file or several, or a dict of settings.
    run_dir
        The run's folder, over the one that the settings say.
    **kwargs
        Arguments of the function; one that is called ``config`` or ``run_dir`` needs ``functools.partial``.

    Raises
    ------
    UsageError
        If something is missing or contradicts itself, or a job of this run is still alive; nothing has been
        written then.
    SchedulerError
        If the scheduler refuses, or does not say whether a job of this run is still alive.
    """
    return submit_entry(make_entry(target, kwargs), config, run_dir=run_dir, kwargs=kwargs)


def submit_entry(
    entry: Entry,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None,
    *,
    run_dir: str | Path | None,
    kwargs: Mapping[str, Any],
    same_source: bool = False,
) -> JobHandle:
    """Submit what :func:`~hpc_resume.launch.entry.make_entry` has checked; see :func:`submit`.

    Parameters
    ----------
    entry, config, run_dir, kwargs
        As there.
    same_source
        Run what the run's jobs ran before, though the code is another one now.
    """
    resolved = resolve(entry, config, run_dir=run_dir, kwargs=kwargs)
    run = RunDirectory(Path(resolved.run_dir))
    check_run_directory(run)
    _check_no_live_job(run.root)
    check_scheduler(resolved)
    warn_of_times(resolved)
    before = Sources.of(run).chosen()
    if same_source and before is None:
        raise UsageError(f"{run.root}: no job of this run ran from a snapshot, so there is none to run again")
    project = Project.of(entry, resolved) if not same_source else Project(start=None, source=None)
    run.create(resolved.name)
    jobs_folder(run.root).mkdir(exist_ok=True)
    config_path = resolved.store(run)
    chosen = before if same_source else _choose(run, project, before)
    job_id = _send(project.bind(entry, run, chosen), resolved, run, config_path)
    job = JobHandle(
        job_id=job_id,
        scheduler=resolved.scheduler,
        run_dir=run.root,
        what=entry.name,
        config=resolved.digest(),
        submitted=time.time(),
        returns=not isinstance(entry, CommandEntry),
    )
    job.record()
    return job


def resolve(
    entry: Entry,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None,
    *,
    run_dir: str | Path | None,
    kwargs: Mapping[str, Any],
) -> Config:
    """Settle every setting of a run: its name, its absolute folder, and what it runs."""
    if isinstance(config, Config):
        settled = config
    elif isinstance(config, Mapping):
        settled = Config.load(overrides=config, environ=os.environ)
    else:
        settled = Config.load(config, environ=os.environ)
    settled = settled.named(entry.run_name)
    if run_dir is not None:
        settled = settled.replace(run_dir=str(run_dir))
    data = settled.data.anchored(Path.cwd())
    if data != settled.data:
        settled = settled.replace(data=data)
    return settled.replace(run_dir=str(settled.run_directory()), entry=recorded_entry(entry, kwargs))


def recorded_entry(entry: Entry, kwargs: Mapping[str, Any]) -> EntrySettings:
    """Give what a run runs as the settings that record it."""
    recorded = {key: _plain(value) for key, value in kwargs.items()}
    if isinstance(entry, CommandEntry):
        return EntrySettings(command=entry.command, kwargs=recorded)
    return EntrySettings(target=entry.name, kwargs=recorded)


def check_scheduler(config: Config) -> None:
    """Raise UsageError if there is no such scheduler on this machine."""
    if config.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "scheduler: slurm, but there is no sbatch on PATH; submit from a login node of the cluster, or run on "
            "this machine: -o scheduler=local, in Python config={'scheduler': 'local'}"
        )


def warn_of_times(config: Config) -> None:
    """Tell whoever submits which times can't cover a save, as far as this is known before the run."""
    for warning in check_times(config):
        sys.stderr.write(f"hpc_resume: warning: {warning}\n")


def check_run_directory(run: RunDirectory) -> None:
    """Raise UsageError if a folder can't be, or become, a run directory."""
    root = run.root
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: is a file, and a run needs a folder; give another run_dir")
    if SweepDirectory(root).identity_path.exists():
        raise UsageError(f"{root}: holds an array of runs; give another run_dir, or submit a grid")
    if (
        root.exists()
        and any(root.iterdir())
        and not run.identity_path.exists()
        and not jobs_folder(root).exists()
    ):
        raise UsageError(
            f"{root}: is not empty and no run directory (there is no run.json in it); give another run_dir"
        )
    check_writable(root)


def check_writable(root: Path) -> None:
    """Raise UsageError if a folder belongs to someone else."""
    parent = next(each for each in (root, *root.parents) if each.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{root}: can't be written, {parent} belongs to someone else; give another run_dir")


def _check_no_live_job(root: Path) -> None:
    if (job := live_job(root)) is not None:
        raise UsageError(
            f"{root}: job {job.job_id} of this run is {job.state()}, and two jobs can't own one run; wait for it, "
            f"end it (hpc-resume cancel {root}), or give another run_dir"
        )


def _choose(run: RunDirectory, project: Project, before: Chosen | None) -> Chosen | None:
    """Have the run's jobs run from the source as it is now, and say what of it is new."""
    if project.source is None:
        return None
    chosen = take_source(Sources.of(run), project.source)
    Sources.of(run).choose(chosen)
    tell_source(project.source, what_changed(run, before, chosen))
    return chosen


def frozen_command(command: Sequence[str], config: Config) -> tuple[str, ...]:
    """Keep the source of a command in its run's directory, and give the command that runs it from there.

    Raises
    ------
    UsageError
        If it has none, or it can't be kept; nothing has been written then.
    """
    entry, run = CommandEntry(command=tuple(command)), RunDirectory(Path(config.run_dir))
    check_run_directory(run)
    project = Project.of(entry, config)
    if project.source is None:
        raise UsageError(
            f"{entry.name}: names no script or module of a project, so there is nothing to take a snapshot of; leave "
            "environment.source=snapshot out"
        )
    before = Sources.of(run).chosen()
    run.create(config.name)
    chosen = _choose(run, project, before)
    assert chosen is not None
    moved = Moved(root=project.source.root, folder=Sources.of(run).check_out(chosen.digest)).entry(entry)
    assert isinstance(moved, CommandEntry)
    return moved.command


def tell_source(source: Source, changes: str) -> None:
    """Tell whoever submits what is not as usual about the source, and what is new."""
    if source.note:
        sys.stderr.write(f"hpc_resume: warning: {source.note}\n")
    if changes:
        sys.stderr.write(f"hpc_resume: the code is not what the run's last job ran: {changes}\n")


def _send(entry: Entry | SourcedEntry, config: Config, run: RunDirectory, config_path: Path) -> str:
    """Hand the job to its scheduler; returns its id."""
    variables = {"HPC_RESUME_RUN_DIR": str(run.root), "HPC_RESUME_CONFIG": str(config_path)}
    if config.scheduler == "local":
        executor = OneMachineExecutor(
            jobs_folder(run.root), config=config, run_dir=run.root, variables=variables
        )
        return str(executor.submit(entry).job_id)
    from hpc_resume.launch.slurm import ResumeSlurmExecutor

    slurm = ResumeSlurmExecutor(
        jobs_folder(run.root), config=config, run_dir=run.root, config_path=config_path
    )
    with only(clean_environment(os.environ)):  # sbatch hands its environment on
        return str(slurm.submit(entry).job_id)


@contextlib.contextmanager
def only(environment: Mapping[str, str]) -> Iterator[None]:
    """Leave only these variables in this process's environment for a while: sbatch hands it on."""
    before = dict(os.environ)
    try:
        for name in before.keys() - environment.keys():
            del os.environ[name]
        yield
    finally:
        os.environ.update(before)


def _plain(value: Any) -> Any:
    """Give what of an argument can be recorded as YAML; anything else as its text."""
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        return repr(value)
    return value
