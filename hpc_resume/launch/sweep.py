"""Submission of an array of runs: which of them have anything left to do, and one job array for those.

Everything is checked before anything is written. What was submitted stays so, whatever comes after it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.launch.chain import OVER
from hpc_resume.launch.controller import Plan
from hpc_resume.launch.entry import CommandEntry, FunctionEntry, make_entry
from hpc_resume.launch.grid import Callee, Element, PlannedRun, elements_of
from hpc_resume.launch.handle import JobHandle, find_jobs, jobs_folder, states_of
from hpc_resume.launch.onemachine import OneMachineExecutor, clean_environment, hold, new_job_id
from hpc_resume.launch.sourced import Project
from hpc_resume.launch.submit import (
    check_run_directory,
    check_scheduler,
    check_writable,
    only,
    recorded_entry,
    resolve,
    tell_source,
    warn_of_times,
)
from hpc_resume.launch.waitlist import start_waitlist
from hpc_resume.provenance.running import take_source
from hpc_resume.provenance.sources import Sources
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.arrays import SlurmArrays, is_submit_limit
from hpc_resume.sweepdir import SweepDirectory

#: Ways to go on in which a job stays the same element of its array.
_CONTINUATIONS = ("requeue", "exit")
#: So many wrong runs are told one by one.
_TOLD = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What became of the runs of a grid when it was submitted; each is under one heading, by name.

    Parameters
    ----------
    folder
        Where they are.
    names
        All of them, in the grid's order.
    jobs
        Those that were submitted now.
    done
        Those that had nothing left to do.
    live
        Those that had a job already.
    left
        Those that the scheduler did not take.
    why_left
        What it said.
    """

    folder: Path
    names: tuple[str, ...]
    jobs: Mapping[str, JobHandle]
    done: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    why_left: str = ""

    def sentences(self) -> list[str]:
        """Tell it in words."""
        arrays = dict.fromkeys(job.job_id.rpartition("_")[0] for job in self.jobs.values())
        said = []
        if self.jobs:
            what = "job" if len(arrays) == 1 else "jobs"
            said.append(f"{_runs(len(self.jobs))} submitted as {what} {', '.join(arrays)}")
        if self.done:
            said.append(f"{_runs(len(self.done))} done already, not submitted again: {_some(self.done)}")
        if self.live:
            said.append(
                f"{_runs(len(self.live))} in the queue or running, not submitted twice: {_some(self.live)}"
            )
        if self.left:
            said.append(
                f"{_runs(len(self.left))} NOT submitted: {_some(self.left)}; {self.why_left}; submit the same again "
                "later: it takes only what is left"
            )
        return said


def submit_sweep(
    target: Callable[..., Any] | str | Sequence[str],
    runs: Iterable[Mapping[str, Any]],
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None,
    *,
    run_dir: str | Path | None,
    kwargs: Mapping[str, Any],
    finished: Callable[[Path], bool],
    slurm: SlurmArrays | None = None,
) -> Submission:
    """Submit those runs of a grid that are neither done nor in a queue.

    Parameters
    ----------
    target, config
        As :func:`hpc_resume.launch.submit.submit` takes them.
    runs
        The grid: arguments for each run.
    run_dir
        The folder that the runs' folders are in, over the one that the settings say.
    kwargs
        Arguments that all runs have in common.
    finished
        Tells from a run's directory whether it is done.
    slurm
        The Slurm cluster; a test gives its own.

    Raises
    ------
    UsageError
        If something is missing or contradicts itself; nothing has been written then.
    SchedulerError
        If the scheduler takes none of them.
    """
    slurm = slurm or SlurmArrays()
    elements = elements_of(runs)
    entries = _entries(target, elements, kwargs)
    resolved = resolve(entries[0], config, run_dir=run_dir, kwargs={})
    sweep = SweepDirectory(Path(resolved.run_dir))
    _check_folder(sweep)
    check_scheduler(resolved)
    warn_of_times(resolved)
    _check_elements_alike(resolved)
    planned = [
        _plan(sweep, resolved, element, entry) for element, entry in zip(elements, entries, strict=True)
    ]
    for each in planned:
        check_run_directory(each.run)
    jobs = {each.element.name: find_jobs(each.run.root) for each in planned}
    live = _live(jobs, slurm)
    done = {each.element.name for each in planned if _is_done(each, jobs[each.element.name], finished)} - live
    to_do = [each for each in planned if each.element.name not in live | done]
    project = Project.of(entries[0], resolved)
    if resolved.scheduler == "slurm" and to_do:
        largest = slurm.largest_array()

    sweep.create(resolved.name)
    jobs_folder(sweep.root).mkdir(exist_ok=True)
    for each in planned:
        each.run.create(f"{resolved.name} {each.element.name}", arguments=each.element.to_json())
        jobs_folder(each.run.root).mkdir(exist_ok=True)
    for each in to_do:
        each.config.store(each.run)
    names = tuple(element.name for element in elements)
    submission = Submission(
        folder=sweep.root,
        names=names,
        jobs={},
        done=tuple(name for name in names if name in done),
        live=tuple(name for name in names if name in live),
    )
    if not to_do:
        return submission
    to_do = _sourced(sweep, to_do, project)
    if resolved.scheduler == "local":
        return dataclasses.replace(submission, jobs=_send_here(sweep, resolved, to_do))
    sent, why_left = _send_to_slurm(sweep, resolved, to_do, largest)
    left = tuple(each.element.name for each in to_do if each.element.name not in sent)
    return dataclasses.replace(submission, jobs=sent, left=left, why_left=why_left)


def _sourced(sweep: SweepDirectory, runs: Sequence[PlannedRun], project: Project) -> list[PlannedRun]:
    """Have the runs run from one snapshot, which lies in the array's folder."""
    chosen = None
    if project.source is not None:
        chosen = take_source(Sources.of(RunDirectory(sweep.root)), project.source, shared=True)
        for each in runs:
            Sources.of(each.run).choose(chosen)
        tell_source(project.source, "")
    return [
        dataclasses.replace(each, entry=project.bind(each.entry, each.run, chosen))  # type: ignore[arg-type]
        for each in runs
    ]


def _entries(
    target: Callable[..., Any] | str | Sequence[str], elements: Sequence[Element], kwargs: Mapping[str, Any]
) -> list[Callee]:
    """Make what each run calls, and check all of them."""
    entries: list[Callee] = []
    wrong: dict[str, list[str]] = {}
    by_names: dict[frozenset[str], Callee] = {}
    for element in elements:
        twice = sorted(kwargs.keys() & element.arguments.keys())
        arguments = {**kwargs, **element.arguments}
        try:
            if twice:
                raise UsageError(f"{', '.join(twice)}: given for all runs and in the grid; leave one out")
            known = by_names.get(frozenset(arguments))
            if known is None:
                made = make_entry(target, arguments)
                if isinstance(made, CommandEntry):
                    raise UsageError("a command takes no arguments from a grid; give file.py:function")
                entry = by_names[frozenset(arguments)] = made
            else:  # a file need not be read again for the same names
                entry = dataclasses.replace(known, kwargs=arguments)
                if isinstance(entry, FunctionEntry):
                    entry.check()
            entries.append(entry)
        except UsageError as error:
            wrong.setdefault(str(error), []).append(element.name)
    if wrong:
        lines = [f"{message} (in {_some(names)})" for message, names in wrong.items()]
        more = f"\n  and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
        raise UsageError("the runs can't be called so:\n  " + "\n  ".join(lines[:_TOLD]) + more)
    return entries


def _check_folder(sweep: SweepDirectory) -> None:
    root = sweep.root
    if "\n" in str(root):
        raise UsageError(f"{str(root)!r}: has a line break; give another run_dir")
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: is a file, and an array of runs needs a folder; give another run_dir")
    if RunDirectory(root).identity_path.exists():
        raise UsageError(f"{root}: holds a single run; give an array of runs another run_dir")
    if root.exists() and any(root.iterdir()):
        if not sweep.identity_path.exists():
            raise UsageError(
                f"{root}: is not empty and holds no array of runs (there is no sweep.json in it); give another run_dir"
            )
        sweep.identity()
    check_writable(root)


def _check_elements_alike(config: Config) -> None:
    """Raise UsageError if settings can't be those of every element of one job array."""
    if config.scheduler != "slurm":
        return
    if "array" in config.slurm.additional_parameters:
        raise UsageError("slurm.additional_parameters.array: the grid says what the array is; leave it out")
    if config.continuation not in _CONTINUATIONS:
        raise UsageError(
            f"continuation: {config.continuation} continues a run in other jobs, but the elements of an array of runs "
            f"go on as themselves; set continuation: {' or '.join(_CONTINUATIONS)}"
        )
    if len(config.node_types) > 1:
        names = ", ".join(node_type.name for node_type in config.node_types)
        raise UsageError(
            f"node_types: the elements of a job array ask for the same, but there are {names}; give one of them"
        )


def _plan(sweep: SweepDirectory, shared: Config, element: Element, entry: Callee) -> PlannedRun:
    run = sweep.run(element.name)
    config = shared.replace(run_dir=str(run.root), entry=recorded_entry(entry, entry.kwargs))
    path = run.configs / f"{config.digest()}.yaml"
    return PlannedRun(element=element, run=run, entry=entry, config=config, config_path=path)


def _is_done(planned: PlannedRun, jobs: Sequence[JobHandle], finished: Callable[[Path], bool]) -> bool:
    """Whether a run has nothing left to do: it is done, with the arguments that it is given now."""
    run = planned.run
    if not run.identity_path.exists() or not finished(run.root):
        return False
    if not jobs:
        return True
    try:
        last = yaml.safe_load((run.configs / f"{jobs[-1].config}.yaml").read_text())["entry"]["kwargs"]
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        return True
    return bool(last == planned.config.model_dump(mode="json")["entry"]["kwargs"])


def _live(jobs: Mapping[str, Sequence[JobHandle]], slurm: SlurmArrays) -> set[str]:
    """Names of the runs that have a job which is not over."""
    named = [(name, job) for name, each in jobs.items() for job in each]
    states = states_of([job for _, job in named], slurm=slurm)
    return {
        name
        for (name, _), state in zip(named, states, strict=True)
        if state not in OVER and state != "UNKNOWN"
    }


def _send_here(sweep: SweepDirectory, shared: Config, runs: Sequence[PlannedRun]) -> dict[str, JobHandle]:
    """Hand the runs to the embedded scheduler."""
    array, plans = new_job_id(), []

    def wait(plan: Plan) -> None:
        hold(plan)
        plans.append(plan)

    handles = {}
    for place, each in enumerate(runs):
        root = each.run.root
        executor = OneMachineExecutor(
            jobs_folder(root),
            config=each.config,
            run_dir=root,
            variables={"HPC_RESUME_RUN_DIR": str(root), "HPC_RESUME_CONFIG": str(each.config_path)},
            job_id=f"{array}_{place}",
            start=wait,
        )
        handles[each.element.name] = _record(each, executor.submit(each.entry).job_id, shared)
    start_waitlist(
        plans, jobs_folder(sweep.root) / f"{array}_waitlist.json", at_once=shared.array.at_once or 1
    )
    return handles


def _send_to_slurm(
    sweep: SweepDirectory, shared: Config, runs: Sequence[PlannedRun], largest: int
) -> tuple[dict[str, JobHandle], str]:
    """Hand the runs to Slurm in as few arrays as it takes; also tells why it did not take the rest."""
    from hpc_resume.launch.slurm import ArrayExecutor

    handles: dict[str, JobHandle] = {}
    waiting, size, before = list(runs), largest, None
    while waiting:
        part = waiting[:size]
        executor = ArrayExecutor(
            jobs_folder(sweep.root),
            config=shared,
            run_dir=sweep.root,
            runs=part,
            at_once=shared.array.at_once,
            after=before,
        )
        try:
            with only(clean_environment(os.environ)):  # sbatch hands its environment on
                ids = executor.submit_runs()
        except SchedulerError as error:
            if is_submit_limit(str(error)) and len(part) > 1:
                size = len(part) // 2  # fewer may be within the limit
                continue
            if not handles:
                raise
            return handles, " ".join(str(error).split())
        for each, job_id in zip(part, ids, strict=True):
            handles[each.element.name] = _record(each, job_id, shared)
        waiting = waiting[len(part) :]
        if shared.array.at_once is not None:  # each array has a limit of its own, so they run one by one
            before = ids[0].partition("_")[0]
    return handles, ""


def _record(planned: PlannedRun, job_id: str, shared: Config) -> JobHandle:
    handle = JobHandle(
        job_id=job_id,
        scheduler=shared.scheduler,
        run_dir=planned.run.root,
        what=planned.entry.name,
        config=planned.config_path.stem,
        submitted=time.time(),
        returns=True,
    )
    handle.record()
    return handle


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
