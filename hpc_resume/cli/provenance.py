"""Verbs about where a run comes from."""

from __future__ import annotations

import click

from hpc_resume.cli.common import as_json_flag, main, print_json, print_part, progress_of
from hpc_resume.errors import EXIT_FAILED


@main.command()
@click.argument("one")
@click.argument("two")
@click.option("--no-tensors", is_flag=True, help="Leave the state alone: nothing of the checkpoints is read.")
@as_json_flag
@click.pass_context
def diff(ctx: click.Context, one: str, two: str, no_tensors: bool, as_json: bool) -> None:
    r"""Tell how two runs, attempts or checkpoints differ: code, configuration, data, environment, tensors.

    \b
    ONE and TWO are each
    RUN          a run: its newest attempt and its newest full checkpoint
    RUN@STEP     the checkpoint of a step
    RUN#ATTEMPT  an attempt, and the last full checkpoint that it took
    FOLDER       a checkpoint's

    Leaves with 1 if they differ. What is another one at every attempt (the host, the job's id) is no difference.
    """
    from hpc_resume.report.diff import compare
    from hpc_resume.report.difftext import parts
    from hpc_resume.report.sides import find_side

    first, second = find_side(one), find_side(two)
    with progress_of("comparing") as told:
        found = compare(first, second, tensors=not no_tensors, progress=told)
    if as_json:
        print_json(found.to_json())
    else:
        for title, lines in parts(found):
            print_part(title, lines)
    if not found.equal:
        ctx.exit(EXIT_FAILED)
