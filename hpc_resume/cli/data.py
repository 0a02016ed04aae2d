"""Verbs about data: what a dataset consists of, and what has changed in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpc_resume.cli.common import as_json_flag, main, print_json, progress_of
from hpc_resume.errors import EXIT_FAILED
from hpc_resume.untrusted import printable

if TYPE_CHECKING:
    from hpc_resume.provenance.datahash import Reading, Taking

_ignore = click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Names of files and folders that do not count, in place of data.ignore's default.",
)
_threads = click.option(
    "--threads", type=click.IntRange(1, 256), default=8, show_default=True, help="Files read at a time."
)
_fresh = click.option("--fresh", is_flag=True, help="Read everything, whatever is known from before.")


@main.group()
def data() -> None:
    """Tell what a dataset consists of, and what has changed in it."""


@data.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--save", "target", type=click.Path(path_type=Path), metavar="FILE", help="Keep it in a file.")
@_ignore
@_threads
@_fresh
@as_json_flag
def snapshot(
    paths: Sequence[Path],
    target: Path | None,
    ignore: Sequence[str],
    threads: int,
    fresh: bool,
    as_json: bool,
) -> None:
    """Print the digest of folders and files: over names, sizes and contents, wherever they lie.

    Files that were read before and have not changed are not read again. A run that is submitted later uses that,
    too. How far it is shows on stderr if that is a terminal.
    """
    from hpc_resume.files import DISK
    from hpc_resume.report.datasets import snapshot_of

    with _telling("reading") as tell:
        taken = snapshot_of(list(paths), _reading(ignore, threads, fresh=fresh), tell)
    found = taken.snapshot
    if target is not None:
        DISK.write_file(target.absolute(), found.to_bytes())
    if as_json:
        print_json(
            {
                "digest": found.digest,
                "files": len(found.files),
                "size_bytes": found.size_bytes,
                "read_files": taken.read_files,
                "read_bytes": taken.read_bytes,
                "huggingface": {name: dict(facts) for name, facts in found.saved.items()},
            }
        )
    else:
        click.echo(found.digest)
    click.echo(
        f"{len(found.files):,} files, {found.size_bytes:,} bytes; {taken.read_files:,} of them were read, "
        "the others known from before",
        err=True,
    )
    for name, facts in found.saved.items():
        shown = ", ".join(f"{key} {value}" for key, value in facts.items())
        click.echo(printable(f"Hugging Face dataset {name}: {shown}"), err=True)


@data.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Name all that differs, not only the first.")
@_ignore
@_threads
@_fresh
@as_json_flag
@click.pass_context
def diff(
    ctx: click.Context,
    a: Path,
    b: Path,
    everything: bool,
    ignore: Sequence[str],
    threads: int,
    fresh: bool,
    as_json: bool,
) -> None:
    """Name what differs between two datasets; leaves with 1 if something does.

    Each is a folder or file of data, a file that snapshot --save wrote, or a run's folder: the data of its newest
    checkpoint.
    """
    from hpc_resume.provenance.datachange import TOLD, compare_data
    from hpc_resume.report.datasets import open_snapshot

    reading = _reading(ignore, threads, fresh=fresh)
    with _telling("reading") as tell:
        change = compare_data(open_snapshot(a, reading, tell), open_snapshot(b, reading, tell))
    if as_json:
        print_json(change.to_json())
    else:
        for line in change.lines(None if everything else TOLD):
            click.echo(line)
    unread = f"; {change.unread:,} files were compared by size alone" if change.unread else ""
    click.echo(f"{change.counts()}{unread}", err=True)
    if change:
        ctx.exit(EXIT_FAILED)


def _reading(ignore: Sequence[str], threads: int, *, fresh: bool) -> Reading:
    from hpc_resume.provenance.datafiles import IGNORED
    from hpc_resume.provenance.datahash import Reading
    from hpc_resume.provenance.hashcache import HashCache, user_cache

    folder = None if fresh else user_cache(os.environ)
    return Reading(
        ignore=tuple(ignore) or IGNORED,
        threads=threads,
        cache=None if folder is None else HashCache([folder]),
    )


@contextlib.contextmanager
def _telling(what: str) -> Iterator[Callable[[Taking], None]]:
    with progress_of(what) as shown:

        def tell(taking: Taking) -> None:
            if shown is not None and taking.files:
                shown(taking.done_bytes, taking.total_bytes)

        yield tell
