"""The command line: parse, one library call, print. What a verb needs is imported when it runs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_resume._version import __version__
from hpc_resume.errors import EXIT_CORRUPT, EXIT_FAILED, EXIT_NOTHING, HpcResumeError, UsageError
from hpc_resume.untrusted import printable

if TYPE_CHECKING:
    from hpc_resume.config import Config
    from hpc_resume.job import Job
    from hpc_resume.report.tables import Table

_COMMAND = "hpc_resume.command"


class _Group(click.Group):
    """Says our errors in one message, and leaves with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except HpcResumeError as error:
            click.echo(printable(f"hpc-resume: {error}"), err=True)
            ctx.exit(error.exit_code)


class _BeforeCommand(click.Command):
    """A verb after whose ``--`` comes a command, word for word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the command aside."""
        if "--" in args:
            place = args.index("--")
            ctx.meta[_COMMAND] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show the command in the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


_run = click.argument("run", type=click.Path(path_type=Path))
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_files = click.option(
    "-c", "--config", "files", multiple=True, metavar="FILE", help="YAML file of settings; a later one wins."
)
_options = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting, such as checkpoint.every_s=60.",
)
_run_dir = click.option("--run-dir", metavar="DIR", help="The run's folder; by default runs/NAME.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-resume")
def main() -> None:
    """Training runs that outlive their jobs: submit them, look at them, verify them.

    RUN is a run's folder, such as runs/gpt.

    Exit codes: 0 done, 1 failed, 2 usage, 3 nothing there, 4 corrupt, 75 interrupted and to be continued.
    """


@main.command(cls=_BeforeCommand)
@click.argument("target", required=False)
@_files
@_options
@click.option("--set", "arguments", multiple=True, metavar="KEY=VALUE", help="An argument of the function.")
@_run_dir
@click.option(
    "--wait", is_flag=True, help="Wait for the end, telling what happens; leaves with 1 if it fails."
)
@_as_json
@click.pass_context
def submit(
    ctx: click.Context,
    target: str | None,
    files: Sequence[str],
    options: Sequence[str],
    arguments: Sequence[str],
    run_dir: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit a run: TARGET is FILE.py:FUNCTION or MODULE:FUNCTION; or give a command after --.

    Prints the run's folder.
    """
    from hpc_resume.job import Job
    from hpc_resume.launch.entry import make_entry
    from hpc_resume.launch.submit import submit_entry
    from hpc_resume.values import parse_assignments

    command: list[str] | None = ctx.meta.get(_COMMAND)
    if (target is None) == (command is None):
        raise UsageError("give either FILE.py:FUNCTION or, after --, a command: hpc-resume submit --help")
    kwargs = parse_assignments(arguments, flag="--set")
    entry = make_entry(target or command or [], kwargs)
    job = Job(submit_entry(entry, _load(files, options), run_dir=run_dir, kwargs=kwargs))
    if not as_json:
        click.echo(str(job.run_dir))
    click.echo(f"submitted job {job.id}; look at it: hpc-resume status {_short(job.run_dir)}", err=True)
    state = _follow(job) if wait else job.state
    if as_json:
        _print_json({"job_id": job.id, "run_dir": str(job.run_dir), "state": state})
    if wait and state != "COMPLETED":
        click.echo(f"the end of rank 0's log:\n{_tail(job)}", err=True)
        ctx.exit(EXIT_FAILED)


@main.command(cls=_BeforeCommand)
@_files
@_options
@_run_dir
@click.pass_context
def script(ctx: click.Context, files: Sequence[str], options: Sequence[str], run_dir: str | None) -> None:
    """Print the sbatch script that runs a command, which comes after --."""
    from hpc_resume.launch.entry import CommandEntry
    from hpc_resume.launch.script import render
    from hpc_resume.launch.submit import resolve

    command = tuple(ctx.meta.get(_COMMAND, ()))
    if not command:
        raise UsageError(
            "no command was given; put it after --, such as: hpc-resume script -- python train.py"
        )
    config = resolve(CommandEntry(command=command), _load(files, options), run_dir=run_dir, kwargs={})
    click.echo(render(config, command=command, run_dir=Path(config.run_dir)), nl=False)


@main.command()
@_run
@_as_json
def status(run: Path, as_json: bool) -> None:
    """Tell how a run is: its attempts, why each ended, what was lost."""
    from hpc_resume.report.status import status as read_status
    from hpc_resume.report.tables import status_table

    found = read_status(run)
    _print_json(found.to_json()) if as_json else _print_table(status_table(found))


@main.command()
@_run
@_as_json
def ls(run: Path, as_json: bool) -> None:
    """List a run's checkpoints."""
    from hpc_resume.report.checkpoints import list_checkpoints
    from hpc_resume.report.tables import checkpoint_table

    found = list_checkpoints(run)
    if as_json:
        _print_json([each.to_json() for each in found])
    else:
        _print_table(checkpoint_table("" if found else f"{run}: no checkpoint yet", found))


@main.command()
@_run
@click.option("--step", type=int, help="The checkpoint of this step; by default the newest.")
@_as_json
def show(run: Path, step: int | None, as_json: bool) -> None:
    """Tell what is in a checkpoint."""
    from hpc_resume.report.checkpoints import describe, find_checkpoint
    from hpc_resume.report.tables import contents_table

    described = describe(*find_checkpoint(run, step))
    _print_json(described) if as_json else _print_table(contents_table(described))


@main.command()
@_run
@click.option(
    "--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Shards read at a time."
)
@_as_json
@click.pass_context
def verify(ctx: click.Context, run: Path, threads: int, as_json: bool) -> None:
    """Read every byte of a run's checkpoints, and compare it with what was committed.

    Writes nothing. How far it is shows on stderr if that is a terminal.
    """
    from hpc_resume.checkpoint.verify import verify_run
    from hpc_resume.rundir import RunDirectory

    with _progress("verifying") as told:
        findings = verify_run(run, threads=threads, progress=told)
    names = RunDirectory(run).checkpoint_names()
    if as_json:
        _print_json([{"path": str(each.path), "problem": each.problem} for each in findings])
    else:
        for each in findings:
            click.echo(printable(f"{each.path}: {each.problem}").replace("\n", "\\n"))
    if findings:
        click.echo(f"{len(findings)} problem{'' if len(findings) == 1 else 's'} in {run}", err=True)
        ctx.exit(EXIT_CORRUPT)
    if not names:
        click.echo(f"{run}: no checkpoint yet, nothing to verify", err=True)
        ctx.exit(EXIT_NOTHING)
    click.echo(f"{len(names)} checkpoint{'' if len(names) == 1 else 's'}: every byte as committed", err=True)


@main.command()
@_run
@click.option(
    "--to", "target", required=True, metavar="TARGET", type=click.Path(path_type=Path), help="See above."
)
@click.option("--step", type=int, help="The checkpoint of this step; by default the newest full one.")
@click.option("--names", metavar="PATTERN", help="Only tensors whose names fit, such as 'model/*'.")
@click.option("--key", help="One tracked item alone, under its own names: model gives a state dict.")
@click.option("--dtype", metavar="TYPE", help="For floating-point tensors, such as bfloat16.")
def export(
    run: Path, target: Path, step: int | None, names: str | None, key: str | None, dtype: str | None
) -> None:
    r"""Write a checkpoint in another format, tensor by tensor, each verified.

    TARGET must not exist. Its name says what it becomes:

    \b
    FILE.safetensors  every tensor once, tied ones under the first of their names;
                      the rest of the state as JSON in the header (not with --key)
    FILE.pt           what torch.load(weights_only=True) reads: the nested state with
                      tied weights and everything else; NumPy's arrays and numbers
                      become tensors and plain numbers (.pth, .bin, .ckpt, too)
    FOLDER            torch.distributed.checkpoint; tied weights under each name
    """
    from hpc_resume.exchange.exporting import export_checkpoint

    count = export_checkpoint(run, target, step=step, names=names, key=key, dtype=dtype)
    click.echo(str(target))
    click.echo(f"{count} tensor{'' if count == 1 else 's'}", err=True)


@main.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--into", required=True, metavar="RUN", type=click.Path(path_type=Path), help="A new run's folder."
)
@click.option("--key", help="Track everything under this name; by default a state dict goes under model.")
@click.option("--step", type=int, default=0, show_default=True, help="Of the checkpoint.")
@click.option("--name", help="Of the run; by default its folder's.")
def import_(source: Path, into: Path, key: str | None, step: int, name: str | None) -> None:
    r"""Make a run's folder with one checkpoint from another format; no code in it is run.

    \b
    SOURCE is one of
    FILE.safetensors, or a folder of them   tensors; with all state if we exported it
    FILE of torch.save                      what weights_only=True loads
    FOLDER of torch.distributed.checkpoint  with a .metadata in it

    Tied weights stay tied where the source says that they are one tensor. A run that tracks the same names goes
    on from it; hr.Checkpoint(RUN).load_into(model) takes the weights alone.
    """
    from hpc_resume.exchange.importing import import_checkpoint

    checkpoint = import_checkpoint(source, into, key=key, step=step, name=name)
    click.echo(str(into / "checkpoints" / checkpoint))


@main.command()
@_run
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest full ones.")
@click.option(
    "--every",
    "every_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="And those of every k-th step.",
)
@click.option("--pin", "pinned", type=int, multiple=True, metavar="STEP", help="And the one of this step.")
@click.option("--apply", "do_it", is_flag=True, help="Delete; without it, what would be is only said.")
@_as_json
def prune(
    run: Path, keep: int, every_steps: int | None, pinned: Sequence[int], do_it: bool, as_json: bool
) -> None:
    """Delete old checkpoints, except what those that are kept refer to."""
    from hpc_resume.checkpoint.prune import apply_pruning, plan_pruning
    from hpc_resume.report.status import status as read_status
    from hpc_resume.report.tables import pruning_table
    from hpc_resume.rundir import RunDirectory

    found = read_status(run)
    if do_it and found.state == "running":
        raise UsageError(
            f"{run}: an attempt is alive ({found.why}), and may need what would be deleted: nothing was; "
            "prune when it has ended"
        )
    directory = RunDirectory(run)
    plan = plan_pruning(directory, keep=keep, every_steps=every_steps, pinned_steps=pinned)
    if do_it:
        apply_pruning(directory, plan)
    if as_json:
        _print_json({"removed" if do_it else "would_remove": list(plan.remove), "keep": dict(plan.keep)})
    else:
        _print_table(pruning_table(plan, done=do_it))
    if plan.remove and not do_it:
        click.echo("nothing was deleted; do it with --apply", err=True)


@main.command()
@_run
def cancel(run: Path) -> None:
    """End a run's job for good; its ranks may save first."""
    from hpc_resume.job import Job

    job = Job.of(run)
    before = job.state
    job.cancel()
    click.echo(
        f"job {job.id} was {before}; cancelled"
        if not job.over(before)
        else f"job {job.id} is {before} already",
        err=True,
    )


def _load(files: Sequence[str], options: Sequence[str]) -> Config:
    import os

    from hpc_resume.config import Config
    from hpc_resume.values import parse_assignments

    return Config.load(list(files), overrides=parse_assignments(options, flag="-o"), environ=os.environ)


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
        time.sleep(0.2)
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


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show on stderr how many bytes are done, if it is a terminal; else do nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


def _print_table(table: Table) -> None:
    """Print a table: with frames on a terminal, as plain lines elsewhere."""
    if not sys.stdout.isatty():
        click.echo("\n".join(table.lines()))
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from hpc_resume.report.tables import cell_text

    console = Console()  # respects NO_COLOR
    if table.title:
        console.print(Text(printable(table.title), style="bold"))
    if table.rows:
        shown = RichTable()
        for column in table.columns:
            shown.add_column(column, justify="right" if column in table.right else "left")
        for row in table.rows:
            shown.add_row(*(Text(cell_text(cell)) for cell in row))
        console.print(shown)
    if table.note:
        console.print(Text(printable(table.note)))
