"""The verb that looks whether a site, or a node, is fit for runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from hpc_resume.cli.common import (
    as_json_flag,
    files_option,
    load_config,
    main,
    options_option,
    print_json,
    print_table,
    run_dir_option,
)
from hpc_resume.errors import EXIT_FAILED, UsageError


@main.command()
@files_option
@options_option
@run_dir_option
@click.option("--node", is_flag=True, help="Look at this node only: GPUs, files, memory, ports. Quick.")
@click.option("--probe", is_flag=True, help="Ask a compute node, too, by a job of a few seconds.")
@click.option(
    "--patience", "patience_s", default=300.0, metavar="SECONDS", help="How long that job may take."
)
@click.option("--partition", metavar="NAME", help="Where runs are to be; by default Slurm's default.")
@click.option(
    "--write", "write_to", type=click.Path(path_type=Path), metavar="FILE", help="Write a site file."
)
@as_json_flag
@click.pass_context
def doctor(
    ctx: click.Context,
    files: Sequence[str],
    options: Sequence[str],
    run_dir: str | None,
    node: bool,
    probe: bool,
    patience_s: float,
    partition: str | None,
    write_to: Path | None,
    as_json: bool,
) -> None:
    """Look whether this site is fit for runs, and how they are continued best.

    Leaves with 1 if something would make a run fail.
    """
    if node and (probe or write_to or partition):
        raise UsageError("--node looks at this node alone; leave out --probe, --partition and --write")
    config = load_config(files, options)
    if run_dir is not None:
        config = config.replace(run_dir=run_dir)
    fit = _node(config.run_directory(), as_json) if node else None
    if fit is None:
        from hpc_resume.launch.doctor import examine
        from hpc_resume.report.tables import findings_table
        from hpc_resume.run.health import check_machine

        found = examine(
            config,
            probe=probe,
            partition=partition,
            patience_s=patience_s,
            machine=partial(check_machine, os.environ),
        )
        fit = found.fit
        print_json(found.to_json()) if as_json else print_table(findings_table(found.findings, found.advice))
        if write_to is not None:
            found.write(write_to, partition)
            click.echo(f"wrote {write_to}", err=True)
    if not fit:
        ctx.exit(EXIT_FAILED)


def _node(run_dir: Path, as_json: bool) -> bool:
    from hpc_resume.report.tables import findings_table
    from hpc_resume.run.health import check_node

    health = check_node(run_dir, os.environ)
    if as_json:
        print_json(health.to_json())
    else:
        print_table(findings_table([(health.node, each) for each in health.findings]))
        click.echo(health.verdict)
    return health.fit
