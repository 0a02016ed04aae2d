"""Verbs about checkpoints: list, look into, verify, hand over to other tools, delete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from hpc_resume.cli.common import as_json_flag, main, print_json, print_table, progress_of, run_argument
from hpc_resume.errors import EXIT_CORRUPT, EXIT_NOTHING, UsageError
from hpc_resume.untrusted import printable


@main.command()
@run_argument
@as_json_flag
def ls(run: Path, as_json: bool) -> None:
    """List a run's checkpoints."""
    from hpc_resume.report.checkpoints import list_checkpoints
    from hpc_resume.report.tables import checkpoint_table

    found = list_checkpoints(run)
    if as_json:
        print_json([each.to_json() for each in found])
    else:
        print_table(checkpoint_table("" if found else f"{run}: no checkpoint yet", found))


@main.command()
@run_argument
@click.option("--step", type=int, help="The checkpoint of this step; by default the newest.")
@as_json_flag
def show(run: Path, step: int | None, as_json: bool) -> None:
    """Tell what is in a checkpoint."""
    from hpc_resume.report.checkpoints import describe, find_checkpoint, shared_with, why_set_aside
    from hpc_resume.report.tables import contents_table
    from hpc_resume.rundir import RunDirectory

    name, manifest = find_checkpoint(run, step)
    aside, shared = why_set_aside(RunDirectory(run)), shared_with(RunDirectory(run))
    described = describe(name, manifest, set_aside=aside.get(name), shared=shared.get(name))
    print_json(described) if as_json else print_table(contents_table(described))


@main.command()
@run_argument
@click.option(
    "--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Shards read at a time."
)
@as_json_flag
@click.pass_context
def verify(ctx: click.Context, run: Path, threads: int, as_json: bool) -> None:
    """Read every byte of a run's checkpoints, and compare it with what was committed.

    Writes nothing. How far it is shows on stderr if that is a terminal.
    """
    from hpc_resume.checkpoint.verify import verify_run
    from hpc_resume.rundir import RunDirectory

    with progress_of("verifying") as told:
        findings = verify_run(run, threads=threads, progress=told)
    names = RunDirectory(run).checkpoint_names()
    if as_json:
        print_json([{"path": str(each.path), "problem": each.problem} for each in findings])
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
@run_argument
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
@run_argument
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest full ones.")
@click.option(
    "--every",
    "every_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="And those of every k-th step.",
)
@click.option("--pin", "pinned", type=int, multiple=True, metavar="STEP", help="And the one of this step.")
@click.option("--set-aside", is_flag=True, help="Also what a rollback has set aside; else that is kept.")
@click.option("--apply", "do_it", is_flag=True, help="Delete; without it, what would be is only said.")
@as_json_flag
def prune(
    run: Path,
    keep: int,
    every_steps: int | None,
    pinned: Sequence[int],
    set_aside: bool,
    do_it: bool,
    as_json: bool,
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
    plan = plan_pruning(
        directory, keep=keep, every_steps=every_steps, pinned_steps=pinned, drop_set_aside=set_aside
    )
    if do_it:
        apply_pruning(directory, plan)
    if as_json:
        print_json({"removed" if do_it else "would_remove": list(plan.remove), "keep": dict(plan.keep)})
    else:
        print_table(pruning_table(plan, done=do_it))
    if plan.remove and not do_it:
        click.echo("nothing was deleted; do it with --apply", err=True)
