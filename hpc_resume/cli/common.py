"""What all verbs share: the group, its options, and how things are printed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpc_resume._version import __version__
from hpc_resume.errors import EXIT_FAILED, HpcResumeError
from hpc_resume.untrusted import printable

if TYPE_CHECKING:
    from hpc_resume.config import Config
    from hpc_resume.report.tables import Table

COMMAND = "hpc_resume.command"

#: What to do where a filesystem takes no bytes from anybody.
_REFUSED = {
    errno.EROFS: "do this on a machine that may write there",
    errno.ENOSPC: "make room there, and do this again",
    errno.EDQUOT: "make room there (quota -s), and do this again",
}


class Group(click.Group):
    """Says our errors in one message, and leaves with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except HpcResumeError as error:
            click.echo(printable(f"hpc-resume: {error}"), err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            said = _refusal(error)
            if said is None:  # a broken pipe, which click expects, or a mistake of ours
                raise
            click.echo(printable(f"hpc-resume: {said}"), err=True)
            ctx.exit(EXIT_FAILED)


def _refusal(error: OSError) -> str | None:
    """Tell what the filesystem refuses, and what to do; ``None`` if it is something else."""
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    if error.errno in {errno.EACCES, errno.EPERM} and path:
        return (
            f"{path}: {error.strerror}; it, or a folder above it, is someone else's or is locked (namei -l "
            f"{shlex.quote(path)} shows what is whose); ask the owner to do this, or to let you"
        )
    if error.errno in _REFUSED:
        return f"{path or 'a file'}: {error.strerror}; {_REFUSED[error.errno]}"
    return None


class BeforeCommand(click.Command):
    """A verb after whose ``--`` comes a command, word for word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the command aside."""
        if "--" in args:
            place = args.index("--")
            ctx.meta[COMMAND] = args[place + 1 :]
            args = args[:place]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show the command in the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


run_argument = click.argument("run", type=click.Path(path_type=Path))
as_json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
files_option = click.option(
    "-c", "--config", "files", multiple=True, metavar="FILE", help="YAML file of settings; a later one wins."
)
options_option = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting, such as checkpoint.every_s=60.",
)
run_dir_option = click.option("--run-dir", metavar="DIR", help="The run's folder; by default runs/NAME.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-resume")
def main() -> None:
    """Training runs that outlive their jobs: submit them, look at them, verify them.

    RUN is a run's folder, such as runs/gpt.

    Exit codes: 0 done, 1 failed, 2 usage, 3 nothing there, 4 corrupt, 75 interrupted and to be continued.
    """


def load_config(files: Sequence[str], options: Sequence[str]) -> Config:
    """Read the settings that a verb is given: ``-o`` over variables over ``-c``."""
    from hpc_resume.config import Config
    from hpc_resume.values import parse_assignments, parse_setting

    overrides = parse_assignments(options, flag="-o", parse=parse_setting)
    return Config.load(list(files), overrides=overrides, environ=os.environ)


@contextlib.contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None] | None]:
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


def print_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    click.echo(json.dumps(value, indent=1))


def print_table(table: Table) -> None:
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


def print_part(title: str, lines: Sequence[str]) -> None:
    """Print a heading and what is below it: wrapped on a terminal, a line each elsewhere."""
    if not sys.stdout.isatty():
        click.echo("\n".join([title, *(f"    {line}" for line in lines)]))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()  # respects NO_COLOR
    console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 4)))
