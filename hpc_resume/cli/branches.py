"""Verbs about the ways that a run takes: its settings, forks, rollbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hpc_resume.cli.common import (
    as_json_flag,
    files_option,
    load_config,
    main,
    options_option,
    print_json,
    print_table,
    run_argument,
)
from hpc_resume.errors import UsageError
from hpc_resume.untrusted import printable


@main.command()
@run_argument
@click.option("--at", type=int, metavar="STEP", help="Step of the checkpoint; by default the newest one.")
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The new run's folder; by default RUN-fork-STEP.",
)
@click.option("--name", help="What it is called; by default as its folder.")
@click.option(
    "--set", "arguments", multiple=True, metavar="KEY=VALUE", help="Another argument of the function."
)
@options_option
@click.option("--why", default="", metavar="TEXT", help="The reason, for the record.")
@click.option("--verify", is_flag=True, help="Read every byte first; else that is done when it is restored.")
@click.option("--copy", is_flag=True, help="Copy files even where they could be linked.")
@click.option("--submit", "do_submit", is_flag=True, help="Submit the new run, too.")
@as_json_flag
def fork(
    run: Path,
    at: int | None,
    to: Path | None,
    name: str | None,
    arguments: Sequence[str],
    options: Sequence[str],
    why: str,
    verify: bool,
    copy: bool,
    do_submit: bool,
    as_json: bool,
) -> None:
    """Make a new run that begins at a checkpoint of RUN and shares its bytes; RUN is left alone.

    Prints the new run's folder, and on stderr how to submit it.
    """
    from hpc_resume.branching import fork as make_fork
    from hpc_resume.report.tables import size_text
    from hpc_resume.values import parse_assignments, parse_setting

    made = make_fork(
        run,
        at=at,
        to=to,
        name=name,
        config=parse_assignments(options, flag="-o", parse=parse_setting),
        why=why,
        verify=verify,
        copy=copy,
        arguments=parse_assignments(arguments, flag="--set"),
    )
    job = made.submit() if do_submit else None
    if as_json:
        print_json(
            {
                "run_dir": str(made.run_dir),
                "checkpoint": made.lineage.parent.checkpoint,
                "how": made.lineage.how,
                "settings": made.lineage.settings,
                "command": made.command,
                "job_id": None if job is None else job.id,
            }
        )
        return
    click.echo(str(made.run_dir))
    shared = f"{len(made.lineage.shared)} checkpoint{'' if len(made.lineage.shared) == 1 else 's'}"
    how = (
        "linked, so they take no space"
        if made.lineage.how == "links"
        else "copied, as they can't all be linked"
    )
    how = "copied" if copy else how
    click.echo(f"{printable(made.lineage.sentence)}; {shared} ({size_text(made.size_bytes)}) {how}", err=True)
    click.echo(f"submitted job {job.id}" if job else f"submit it: {made.command}", err=True)


@main.command()
@run_argument
@click.option("--to", type=int, metavar="STEP", help="Step of the checkpoint to go on from.")
@click.option("--why", required=True, metavar="TEXT", help="The reason, for whoever looks at the run later.")
@click.option("--undo", is_flag=True, help="Take the last rollback back instead, if nothing was saved since.")
@click.option("--fence", is_flag=True, help="Even while an attempt runs: it can save nothing any more.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be set aside.")
@as_json_flag
def rollback(
    run: Path, to: int | None, why: str, undo: bool, fence: bool, dry_run: bool, as_json: bool
) -> None:
    """Have a run go on from an earlier step. What was saved later stays there, and is set aside."""
    from hpc_resume import branching

    if undo == (to is not None):
        raise UsageError("give the step to go on from: --to STEP; or --undo")
    if dry_run:
        if to is None:
            raise UsageError("--dry-run tells what --to STEP would set aside; an --undo sets nothing aside")
        plan = branching.planned(run, to)
        record: dict[str, Any] = {"to": plan.to, "would_set_aside": list(plan.set_aside)}
        if as_json:
            print_json(record)
        else:
            click.echo("\n".join(plan.set_aside))
            click.echo(f"it would go on from {plan.to}; nothing was done", err=True)
        return
    done = (
        branching.undo(run, why=why, fence=fence)
        if to is None
        else branching.rollback(run, to=to, why=why, fence=fence)
    )
    if as_json:
        print_json(
            {"number": done.number, "to": done.to, "set_aside": list(done.set_aside), "undoes": done.undoes}
        )
        return
    click.echo(done.sentence)
    if done.set_aside:
        many = f"{len(done.set_aside)} checkpoint{' is' if len(done.set_aside) == 1 else 's are'}"
        click.echo(f"{many} set aside, and deleted by nobody; start or submit the run again", err=True)


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@files_option
@options_option
@click.option("--log", is_flag=True, help="What was set otherwise from attempt to attempt of RUN, and why.")
@click.option("--origin", is_flag=True, help="Where each setting comes from: flag, variable, file, default.")
@as_json_flag
def config(
    run: Path | None, files: Sequence[str], options: Sequence[str], log: bool, origin: bool, as_json: bool
) -> None:
    """Show the settings of RUN's last attempt; without RUN, those that -c, -o and HPC_RESUME_* give."""
    from hpc_resume.provenance.configuration import flat
    from hpc_resume.report.configlog import config_log_table, last_settings, read_config_log

    if run is None:
        if log:
            raise UsageError("--log tells of a run's attempts: hpc-resume config RUN --log")
        given = load_config(files, options)
        values = flat(given.model_dump(mode="json"))
        origins = {name: given.origin(name) for name in values}
    else:
        if files or options or origin:
            raise UsageError(
                "-c, -o and --origin are for settings of which there is no run yet; leave out RUN"
            )
        if log:
            changed = read_config_log(run)
            print_json([each.to_json() for each in changed]) if as_json else print_table(
                config_log_table(run)
            )
            return
        values, origins = last_settings(run), {}
    if as_json:
        print_json(
            {name: {"value": values[name], "origin": origins[name]} for name in values} if origin else values
        )
        return
    for name in sorted(values):
        text = printable(f"{name}: {values[name]}").replace("\n", "\\n")
        click.echo(f"{text}  # {origins[name]}" if origin else text)
