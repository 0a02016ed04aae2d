"""The verb that tries a script out: interrupt it here, before a cluster does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

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
    print_table,
)
from hpc_resume.errors import EXIT_FAILED, UsageError


@main.command(cls=BeforeCommand)
@click.argument("target", required=False)
@files_option
@options_option
@click.option("--set", "arguments", multiple=True, metavar="KEY=VALUE", help="An argument of the function.")
@click.option("--times", default=5, show_default=True, help="How many interruptions.")
@click.option("--seed", default=0, show_default=True, help="Which ones.")
@click.option("--ranks", metavar="N,…", help="Of one attempt after the other, such as 2,1,3.")
@click.option(
    "--time-limit", "time_limit_s", default=600.0, show_default=True, metavar="SECONDS", help="For all of it."
)
@click.option(
    "--tolerance",
    default=1e-3,
    show_default=True,
    help="Relative, where changing numbers of ranks round differently.",
)
@click.option("--keep", is_flag=True, help="Keep both runs though they are equal.")
@as_json_flag
@click.pass_context
def rehearse(
    ctx: click.Context,
    target: str | None,
    files: Sequence[str],
    options: Sequence[str],
    arguments: Sequence[str],
    times: int,
    seed: int,
    ranks: str | None,
    time_limit_s: float,
    tolerance: float,
    keep: bool,
    as_json: bool,
) -> None:
    """Interrupt a script at random moments on this machine, and prove that it resumes equal.

    TARGET is FILE.py:FUNCTION or MODULE:FUNCTION; or give a command after --. It is run in folders of its own below
    TMPDIR; the real run is left alone. Have it train for some seconds. Leaves with 0 if the interrupted run ends as
    the uninterrupted one, else with 1.
    """
    from hpc_resume.launch.entry import make_entry
    from hpc_resume.rehearsal import rehearse_entry
    from hpc_resume.values import parse_assignments

    command: list[str] | None = ctx.meta.get(COMMAND)
    if (target is None) == (command is None):
        raise UsageError("give either FILE.py:FUNCTION or, after --, a command: hpc-resume rehearse --help")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up on its way
    kwargs = parse_assignments(arguments, flag="--set")
    found = rehearse_entry(
        make_entry(target or command or [], kwargs),
        load_config(files, options),
        kwargs=kwargs,
        times=times,
        seed=seed,
        ranks=_numbers(ranks),
        time_limit_s=time_limit_s,
        tolerance=tolerance,
        keep=keep,
        say=lambda text: click.echo(text, err=True),
    )
    print_json(found.to_json()) if as_json else print_table(found.table())
    if found.verdict != "equal":
        ctx.exit(EXIT_FAILED)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise UsageError(f"--ranks {text}: give numbers, such as 2,1,3") from None
