"""What git knows of a project: asked by its command, which need not be there."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import JsonObject

#: A repository on a busy filesystem answers within seconds, or not at all.
_TIMEOUT_S = 10.0
#: A longer patch is of data, not of code.
_LONGEST_PATCH_BYTES = 1 << 20
#: Fields before a path in a line about a changed, a renamed, an unmerged file. Source: git-status(1), porcelain v2.
_FIELDS = {"1": 7, "2": 8, "u": 9}
#: So many changed files are named.
_TOLD = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What is checked out.

    Parameters
    ----------
    commit
        Its full hash; ``None`` before the first one.
    branch
        ``None`` if none is checked out.
    changed
        Tracked files that are not as in the commit.
    patch
        ``git diff HEAD``; ``None`` if it is too long, or git did not give it.
    """

    commit: str | None
    branch: str | None
    changed: tuple[str, ...] = ()
    patch: bytes | None = b""

    def to_json(self) -> JsonObject:
        """JSON form, without the patch."""
        return {"commit": self.commit, "branch": self.branch, "changed": list(self.changed[:_TOLD])}


def repository_of(folder: Path) -> Path | None:
    """Find the work tree that a folder is in.

    A home folder that is one as a whole is passed over: it keeps dotfiles, and is no project.
    """
    root = next((each for each in (folder, *folder.parents) if (each / ".git").exists()), None)
    return None if root == Path.home() else root


def tracked_files(root: Path) -> list[str] | None:
    """List the files that git tracks, those of submodules too, relative to ``root``; ``None``: it can't say."""
    return _names(_git(root, "ls-files", "-z", "--cached", "--recurse-submodules"))


def untracked_files(root: Path) -> list[str] | None:
    """List the files that git neither tracks nor ignores; ``None``: it can't say."""
    return _names(_git(root, "ls-files", "-z", "--others", "--exclude-standard"))


def revision(root: Path) -> Revision | None:
    """Tell what is checked out, and what was changed since; ``None``: git can't say."""
    told = _git(root, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=no")
    if told is None:
        return None
    head: dict[str, str] = {}
    changed = []
    lines = iter(told.decode(errors="surrogateescape").split("\0"))
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "#":
            key, _, value = rest.partition(" ")
            head[key] = value
        elif kind in _FIELDS:
            changed.append(rest.split(" ", _FIELDS[kind])[-1])
            if kind == "2":
                next(lines, None)  # the name that it had before
    commit, branch = head.get("branch.oid"), head.get("branch.head")
    patch: bytes | None = b""
    if changed:
        patch = _git(root, "diff", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD")
        if patch is not None and len(patch) > _LONGEST_PATCH_BYTES:
            patch = None
    return Revision(
        commit=None if commit == "(initial)" else commit,
        branch=None if branch == "(detached)" else branch,
        changed=tuple(sorted(map(_text, changed))),
        patch=patch,
    )


def _git(root: Path, *words: str) -> bytes | None:
    """Ask git; ``None`` where there is none, or it refuses, or does not answer."""
    # What a hook or another tool has set would speak of another repository.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            env=environ,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _names(told: bytes | None) -> list[str] | None:
    if told is None:
        return None
    names = (os.fsdecode(name) for name in told.split(b"\0") if name)
    return sorted(name for name in names if not name.endswith("/"))  # a repository inside this one


def _text(name: str) -> str:
    """Make a file's name one that JSON can hold."""
    return name.encode(errors="surrogateescape").decode(errors="replace")
