"""Whether a run directory's filesystem is fit for a run, seen from a login node."""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.files import Clock
from hpc_resume.provenance.filesystem import (
    Mount,
    check_calls,
    check_space,
    check_writing,
    existing,
    mount_of,
)
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.command import Runner

#: A model with its optimizer that is worth an allocation has at least so many bytes.
_LEAST_SPACE_BYTES = 10 << 30
_QUOTA_TIMEOUT_S = 20.0
#: Part of the site's limit at which untouched files are told of.
_SOON = 0.8


def file_findings(
    config: Config, *, visible: bool | None, one_machine: bool, run: Runner, clock: Clock = time.time
) -> Iterator[Finding]:
    """Look at the filesystem of the run directory.

    Parameters
    ----------
    config
        Says where it is, and what the site deletes.
    visible
        Whether a compute node has seen it; ``None``: none was asked.
    one_machine
        There are no compute nodes.
    run
        Runs a command, for the quota.
    clock
        Unix time in seconds.
    """
    root = config.run_directory()
    folder = existing(root)
    mount = mount_of(folder.resolve())
    yield mount_finding("run directory", root, mount, visible=visible, one_machine=one_machine)
    written = check_writing(folder, clock=clock)
    yield from written
    if all(each.level != "bad" for each in written):
        yield from check_calls(folder)
    yield from check_space(folder, need_bytes=_LEAST_SPACE_BYTES)
    yield from quota_findings(mount, run)
    if config.site.purge_after_days is not None:
        yield purge_finding(root, config.site.purge_after_days, now_s=clock())


def mount_finding(
    what: str, path: Path, mount: Mount, *, visible: bool | None, one_machine: bool = False
) -> Finding:
    """Say whether compute nodes can see a path: by what one saw, else by the filesystem's type.

    ``one_machine`` means that there are none.
    """
    where = f"{path}: {mount.kind} at {mount.point}"
    if one_machine:
        return Finding(what=what, level="ok", detail=where)
    if visible is not None:
        seen = "a compute node sees it" if visible else "compute nodes don't see it; choose another place"
        return Finding(what=what, level="ok" if visible else "bad", detail=f"{where}; {seen}")
    if mount.shared:
        return Finding(what=what, level="ok", detail=f"{where}, which many machines can share")
    doubt = "is usually one machine's own" if mount.shared is False else "is not known here"
    return Finding(
        what=what,
        level="note",
        detail=f"{where}, a type that {doubt}; whether compute nodes see it: hpc-resume doctor --probe",
    )


def quota_findings(mount: Mount, run: Runner) -> Iterator[Finding]:
    """Ask for the user's quota where there is a command for it."""
    lustre = mount.kind == "lustre"
    words = ["lfs", "quota", "-hu", getpass.getuser(), mount.point] if lustre else ["quota", "-sw"]
    try:
        done = run(words, _QUOTA_TIMEOUT_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return
    lines = [line for line in done.out.splitlines() if any(letter.isdigit() for letter in line)]
    mine = [line for line in lines if lustre or line.split()[0] == mount.point] or lines[1:]
    if done.code == 0 and mine:
        yield Finding(what="quota", level="ok", detail=" ".join(mine[-1].split()))


def purge_finding(root: Path, after_days: float, *, now_s: float) -> Finding:
    """Look for files that the site will soon delete because nobody touches them."""
    old = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                facts = (Path(folder) / name).lstat()
            except OSError:
                continue  # gone meanwhile
            old += now_s - max(facts.st_mtime, facts.st_atime) > _SOON * after_days * 86400
    if not old:
        return Finding(what="purge", level="ok", detail=f"after {after_days:g} days; no file is near that")
    return Finding(
        what="purge",
        level="note",
        detail=f"{old} files are not far from the {after_days:g} days after which they are deleted; a checkpoint "
        "may need bytes of older ones: copy the run directory away, or read it: hpc-resume verify",
    )
