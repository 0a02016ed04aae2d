"""Verbs about jobs: submit one, look how its run is, end it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_resume.cli.common import (
    COMMAND,
    BeforeCommand,
    as_json_flag,
    files_option,
    load_config,
    main,
    options_option,
    print_json,
    print_part,
    print_table,
    run_argument,
    run_dir_option,
)
from hpc_resume.errors import EXIT_FAILED, HpcResumeError, UsageError

if TYPE_CHECKING:
    from hpc_resume.config import Config
    from hpc_resume.job import Job
    from hpc_resume.launch.resubmit import Answer


@main.command(cls=BeforeCommand)
@click.argument("target", required=False)
@files_option
@options_option
@click.option("--set", "arguments", multiple=True, metavar="KEY=VALUE", help="An argument of the function.")
@click.option(
    "--grid",
    "lists",
    multiple=True,
    metavar="KEY=V1,V2,...",
    help="Values of an argument: one run for each combination, all in one job array.",
)
@run_dir_option
@click.option("--same-source", is_flag=True, help="Run the code that the run's last job ran, not the newest.")
@click.option(
    "--why", metavar="TEXT", help="Why settings or arguments are other ones than before, for the record."
)
@click.option(
    "--wait", is_flag=True, help="Wait for the end, telling what happens; leaves with 1 if it fails."
)
@as_json_flag
@click.pass_context
def submit(
    ctx: click.Context,
    target: str | None,
    files: Sequence[str],
    options: Sequence[str],
    arguments: Sequence[str],
    lists: Sequence[str],
    run_dir: str | None,
    same_source: bool,
    why: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit a run: TARGET is FILE.py:FUNCTION or MODULE:FUNCTION; or give a command after --.

    The job runs the code as it is now, whatever becomes of it meanwhile; -o environment.source=live: as it is then.
    Prints the run's folder. With --grid, an array of runs: of those, only what is neither done nor in the queue.
    """
    from hpc_resume.job import Job
    from hpc_resume.launch.entry import make_entry
    from hpc_resume.launch.submit import submit_entry
    from hpc_resume.values import parse_assignments, parse_list

    command: list[str] | None = ctx.meta.get(COMMAND)
    if (target is None) == (command is None):
        raise UsageError("give either FILE.py:FUNCTION or, after --, a command: hpc-resume submit --help")
    kwargs = parse_assignments(arguments, flag="--set")
    config = load_config(files, options)
    if why is not None:
        config = config.replace(why=why)
    if lists:
        if target is None:
            raise UsageError("--grid: a command takes no arguments from us; give FILE.py:FUNCTION")
        if same_source:
            raise UsageError("--same-source: is for a single run; an array's runs run the code as it is now")
        grid = parse_assignments(lists, flag="--grid", parse=parse_list)
        _submit_grid(ctx, target, grid, kwargs, config, run_dir, wait=wait, as_json=as_json)
        return
    entry = make_entry(target or command or [], kwargs)
    job = Job(submit_entry(entry, config, run_dir=run_dir, kwargs=kwargs, same_source=same_source))
    if not as_json:
        click.echo(str(job.run_dir))
    click.echo(f"submitted job {job.id}; look at it: hpc-resume status {_short(job.run_dir)}", err=True)
    state = _follow(job) if wait else job.state
    if as_json:
        print_json({"job_id": job.id, "run_dir": str(job.run_dir), "state": state})
    if wait and state != "COMPLETED":
        click.echo(f"the end of rank 0's log:\n{_tail(job)}", err=True)
        ctx.exit(EXIT_FAILED)


def _submit_grid(
    ctx: click.Context,
    target: str,
    lists: dict[str, list[Any]],
    kwargs: dict[str, Any],
    config: Config,
    run_dir: str | None,
    *,
    wait: bool,
    as_json: bool,
) -> None:
    from hpc_resume.job import Sweep, submit_grid
    from hpc_resume.launch.grid import grid

    submission = submit_grid(target, grid(**lists), config, run_dir=run_dir, kwargs=kwargs)
    sweep = Sweep.submitted(submission)
    if not as_json:
        click.echo(str(sweep.folder))
    click.echo("\n".join(submission.sentences()), err=True)
    click.echo(f"look at them: hpc-resume status {_short(sweep.folder)}", err=True)
    if wait:
        sweep.wait()
    status = sweep.status()
    if as_json:
        print_json([each.to_json() for each in status])
    elif wait:
        click.echo("\n".join(Sweep(sweep.folder, sweep.names).table().lines()), err=True)
    if submission.left or (wait and any(each.state != "done" for each in status)):
        ctx.exit(EXIT_FAILED)


@main.command(cls=BeforeCommand)
@files_option
@options_option
@run_dir_option
@click.pass_context
def script(ctx: click.Context, files: Sequence[str], options: Sequence[str], run_dir: str | None) -> None:
    """Print the sbatch script that runs a command, which comes after --.

    The command runs the code as it is when an attempt begins; with -o environment.source=snapshot, as it is now:
    that is then kept in the run's folder, and the script names it there.
    """
    from hpc_resume.launch.check import check_times
    from hpc_resume.launch.entry import CommandEntry
    from hpc_resume.launch.script import render
    from hpc_resume.launch.submit import frozen_command, resolve

    command = tuple(ctx.meta.get(COMMAND, ()))
    if not command:
        raise UsageError(
            "no command was given; put it after --, such as: hpc-resume script -- python train.py"
        )
    config = resolve(CommandEntry(command=command), load_config(files, options), run_dir=run_dir, kwargs={})
    for warning in check_times(config.replace(scheduler="slurm")):
        click.echo(f"hpc-resume: warning: {warning}", err=True)
    if config.environment.source == "snapshot" and config.origin("environment.source") != "default":
        command = frozen_command(command, config)
    click.echo(render(config, command=command, run_dir=Path(config.run_dir)), nl=False)


@main.command()
@run_argument
@as_json_flag
def status(run: Path, as_json: bool) -> None:
    """Tell how a run is: its attempts, why each ended, what was lost; or how the runs of an array are."""
    from hpc_resume.sweepdir import SweepDirectory

    if SweepDirectory(run).identity_path.exists():
        from hpc_resume.job import Sweep

        sweep = Sweep(run)
        print_json([each.to_json() for each in sweep.status()]) if as_json else print_table(sweep.table())
        return
    from hpc_resume.report.status import status as read_status
    from hpc_resume.report.tables import status_table

    found = read_status(run)
    print_json(found.to_json()) if as_json else print_table(status_table(found))


@main.command()
@run_argument
@as_json_flag
def explain(run: Path, as_json: bool) -> None:
    """Tell what ended each attempt of a run, what was decided and why, and what comes next."""
    from hpc_resume.report.explain import explain as tell

    found = tell(run)
    if as_json:
        print_json(found.to_json())
        return
    for part in found.parts:
        print_part(part.title, part.lines)


@main.command()
@run_argument
def cancel(run: Path) -> None:
    """End a run's job for good, or those of an array of runs; ranks may save first."""
    from hpc_resume.job import Job, Sweep
    from hpc_resume.sweepdir import SweepDirectory

    if SweepDirectory(run).identity_path.exists():
        sweep = Sweep(run)
        alive = [name for name, state in sweep.states().items() if not Job.over(state)]
        sweep.cancel()
        click.echo(f"{len(alive)} of {len(sweep)} runs had a job; cancelled", err=True)
        return
    job = Job.of(run)
    before = job.state
    job.cancel()
    click.echo(
        f"job {job.id} was {before}; cancelled"
        if not job.over(before)
        else f"job {job.id} is {before} already",
        err=True,
    )


@main.command()
@run_argument
@click.option("--watch", is_flag=True, help="Look again and again until the run is over (in tmux, say).")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="With --watch.",
)
@click.option("--refresh-source", is_flag=True, help="Run the code as it is now, not as it was submitted.")
@as_json_flag
def resubmit(run: Path, watch: bool, every_s: float, refresh_source: bool, as_json: bool) -> None:
    """Submit a run again that was interrupted and that no job goes on from; never twice.

    With --watch, a job that has waited longer than its node type's wait_limit_s asks for the next one.
    """
    from hpc_resume.launch.resubmit import Resubmission

    looking = Resubmission(run)
    if refresh_source:
        click.echo(f"source: {looking.refresh_source()}", err=True)
    if watch:
        answer = looking.watch(every_s=every_s, say=lambda text: click.echo(text, err=True))
    else:
        answer = looking.resubmit()
    _print_answer(answer, as_json=as_json)


@main.command(name="move-on")
@run_argument
@click.option("--to", metavar="NAME", help="Name of a node type; by default the next one.")
@as_json_flag
def move_on(run: Path, to: str | None, as_json: bool) -> None:
    """Have a run's pending job ask for the next of its node types."""
    from hpc_resume.launch.resubmit import Resubmission

    _print_answer(Resubmission(run).move_on(to), as_json=as_json)


def _print_answer(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print_json({"job_id": answer.job_id, "over": answer.over, "why": answer.why})
    else:
        click.echo(answer.why)


def _follow(job: Job) -> str:
    """Wait for a job's end, and say on stderr when an attempt begins and ends."""
    from hpc_resume.report.tables import attempt_sentence, status_table

    said: set[str] = set()
    while True:
        state = job.state
        for attempt in job.status().attempts:
            sentence = attempt_sentence(attempt)
            if sentence not in said:
                said.add(sentence)
                click.echo(sentence, err=True)
        if job.over(state):
            break
        time.sleep(job.poll_s)
    click.echo("\n".join(status_table(job.status()).lines()), err=True)
    return state


def _tail(job: Job, lines: int = 15) -> str:
    try:
        return "\n".join(job.log().splitlines()[-lines:])
    except HpcResumeError as error:
        return str(error)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
