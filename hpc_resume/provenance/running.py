"""Which source this process runs: found from its script, kept, and compared with what it was to run."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from hpc_resume.errors import HpcResumeError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.provenance.git import Revision, repository_of, revision
from hpc_resume.provenance.listing import FileChanges, enumerated
from hpc_resume.provenance.source import Source, is_installed, read_source
from hpc_resume.provenance.sources import Chosen, Sources
from hpc_resume.rundir import RunDirectory

#: Where a process that a launcher started has its source: a snapshot's folder, or a script or folder of the user's.
VARIABLE = "HPC_RESUME_SOURCE"
_DIGEST = re.compile(r"[0-9a-f]{16}")
#: So many files that are not what they should be are named.
_TOLD = 50


def describe_source(run: RunDirectory, environ: Mapping[str, str], *, main: str | None = None) -> JsonObject:
    """Describe the source that this process runs, and keep it in the run directory.

    Whatever goes wrong with that is said in the record, and ends no training.

    Parameters
    ----------
    run
        The run directory.
    environ
        The process's variables.
    main
        File of its main program; by default what Python says.

    Returns
    -------
    dict
        Empty for what has no file, such as a notebook. Else ``from`` (``"snapshot"`` or ``"live"``), ``digest``,
        ``root``, ``files``, ``size_bytes``, ``git``, and as far as there is something to say: ``altered`` (files of
        a snapshot that are not what was kept), ``live`` (files that were imported from the project's folder, though
        the snapshot has them), ``note``, ``problem``.
    """
    main = main if main is not None else getattr(sys.modules.get("__main__"), "__file__", None)
    place = environ.get(VARIABLE)
    if main and (not place or _is_users(Path(main))):  # a launcher's own program says nothing
        place = main
    if not place:
        return {}
    try:
        # Not resolved: a snapshot's folder may hold links to what is elsewhere.
        if (tree := _snapshot_of(Path(place).absolute())) is not None:
            return _of_snapshot(run, tree)
        source = read_source(Path(place))
        return {} if source is None else {"from": "live", **kept(Sources.of(run), source)}
    except (HpcResumeError, OSError, RuntimeError, ValueError) as error:
        return {"from": "live", "problem": f"{error!s:.500}"}


def remark(source: JsonObject) -> str:
    """Tell what of a process's source is not as it should be; empty if nothing is."""
    altered, live = source.get("altered"), source.get("live")
    told = [f"the snapshot is not what was kept: {enumerated(altered)}"] if altered else []
    told += [f"not from the snapshot, but from {source.get('root')}: {enumerated(live)}"] if live else []
    return "; ".join(told)


def kept(sources: Sources, source: Source) -> JsonObject:
    """Keep a source, and what git says of it; gives the record."""
    digest = sources.keep(source)
    record: JsonObject = {
        "digest": digest,
        "root": str(source.root),
        "files": len(source.listing.files),
        "size_bytes": source.listing.size_bytes,
        "git": git_record(sources, source.root),
    }
    return record | ({"note": source.note} if source.note else {})


def git_record(sources: Sources, root: Path) -> JsonObject | None:
    """Tell what git says of a project, and keep what it shows as changed."""
    found: Revision | None = revision(root) if repository_of(root) is not None else None
    if found is None:
        return None
    record = found.to_json()
    if found.patch:
        record["patch"] = sources.keep_patch(found.patch)
    elif found.patch is None:
        record["patch"] = None
    return record


def take_source(
    sources: Sources, source: Source, *, shared: bool = False, clock: Clock = time.time
) -> Chosen:
    """Keep a source, and make the folder to run it from; gives what a run's directory says of it.

    Parameters
    ----------
    sources
        Where it is kept: a run's own, or those of an array.
    source
        As it was read.
    shared
        They are those of an array.
    clock
        Unix time in seconds.
    """
    digest = sources.keep(source)
    sources.check_out(digest, source)
    git = git_record(sources, source.root)
    return Chosen(digest=digest, root=str(source.root), taken=clock(), git=git, shared=shared)


def what_changed(run: RunDirectory, before: Chosen | None, now: Chosen) -> str:
    """Tell how a source differs from the one that a run's jobs ran from before; empty if it does not."""
    if before is None or before.digest == now.digest:
        return ""
    try:
        old = Sources.of(run, shared=before.shared).listing(before.digest)
        new = Sources.of(run, shared=now.shared).listing(now.digest)
    except HpcResumeError:
        return f"{before.digest} → {now.digest}"
    return FileChanges.between(old, new).text()


def chosen_folder(run: RunDirectory) -> Path:
    """Give the folder of the source that the run's jobs run from; made anew if it is gone.

    Raises
    ------
    HpcResumeError
        If nobody has chosen one, or it was lost.
    """
    chosen = Sources.of(run).chosen()
    if chosen is None:
        raise HpcResumeError(
            f"{run.sources}: says not which source the run's jobs run from (chosen.json is gone); submit the run again"
        )
    return Sources.of(run, shared=chosen.shared).check_out(chosen.digest)


def _snapshot_of(place: Path) -> Path | None:
    """Give the snapshot's folder that a path lies in, if it does."""
    for folder in (place, *place.parents):
        if _DIGEST.fullmatch(folder.name) and (folder.parent / f"{folder.name}.json").is_file():
            return folder
    return None


def _of_snapshot(run: RunDirectory, tree: Path) -> JsonObject:
    sources = Sources(tree.parent)
    listing = sources.listing(tree.name)
    record: JsonObject = {
        "from": "snapshot",
        "digest": tree.name,
        "files": len(listing.files),
        "size_bytes": listing.size_bytes,
    }
    if tree.parent.resolve() != run.sources.resolve():
        record["shared"] = True
    chosen = Sources.of(run).chosen()
    if chosen is not None and chosen.digest == tree.name:
        record |= {"root": chosen.root, "git": chosen.git}
    if altered := sources.altered(tree, tree.name):
        record["altered"] = altered[:_TOLD]
    if "root" in record and (live := sorted(_imported_from(Path(record["root"])) & listing.files.keys())):
        record["live"] = live[:_TOLD]
    return record


def _imported_from(root: Path) -> set[str]:
    """Find the files of a project that this process has imported from the project's own folder."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    found = set()
    for file in files:
        with contextlib.suppress(ValueError, OSError, TypeError):
            found.add(Path(file).resolve().relative_to(root).as_posix())  # type: ignore[arg-type] # suppressed
    return found


def _is_users(path: Path) -> bool:
    return path.is_file() and not is_installed(path.resolve())
