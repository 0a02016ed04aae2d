"""Reads hostile runs in every way there is, each in a process of its own that may take little memory and time.

    $ python -m tests.hostile.runner FOLDER [NAME…]            those whose names fit a pattern; all by default
    $ python -m tests.hostile.runner FOLDER --share 0/2        every second one

Prints one JSON object a case. The process that forks them has everything loaded, so a case costs a fork.
"""

from __future__ import annotations

import fnmatch
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted, tensor_like
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import CheckpointNotFound, IntegrityError, MismatchError
from hpc_resume.run import generators
from hpc_resume.rundir import RunDirectory
from tests.hostile.base import items, make_run
from tests.hostile.cases import Case, cases

#: Address space that a case may take beyond what the process has taken when it is forked.
MEMORY_BYTES = 256 << 20
#: Processor time that a case may take.
CPU_S = 8
#: ... and time on the clock, on a machine that has other things to do.
WALL_S = 120
OURS = (IntegrityError, CheckpointNotFound, MismatchError)


def tree(root: Path) -> list[tuple[Any, ...]]:
    """Everything under a folder that would change if somebody wrote there."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            seen = (Path(folder) / name).lstat()
            found.append(
                (folder, name, seen.st_mode, seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_nlink)
            )
    return sorted(found)


def attempt(read: Callable[[], Any]) -> str:
    """What comes of a read: ``ok``, the name of an error of ours, or the traceback of any other."""
    try:
        read()
    except OURS as error:
        if len(str(error)) > 4000:
            return f"a message of {len(str(error))} characters"
        return type(error).__name__
    except BaseException:  # noqa: BLE001 - whatever it is, it is a failure
        return traceback.format_exc()
    return "ok"


def read_all(run: RunDirectory) -> None:
    """Every tensor of the newest checkpoint, whole and in part."""
    name, manifest = store.find(run)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        for tensor, record in manifest.tensors.items():
            reader.check_size(tensor)
            out = tensor_like(record, dtype=None, device="cpu")
            reader.read_all([Wanted(tensor, Box.whole(record.shape), out)])
            if record.shape and record.shape[0] > 2:
                part = Box((1, *(0 for _ in record.shape[1:])), (1, *record.shape[1:]))
                reader.read(tensor, part, torch.empty(part.size, dtype=out.dtype))


def restore(run: RunDirectory) -> None:
    """Restore the newest checkpoint into what is tracked."""
    name, manifest = store.find(run)
    objects = items(2)
    state = TrackedState(objects, rank=0, world_size=1)
    with CheckpointReader(run.checkpoints / name, manifest) as reader:
        state.restore(reader)
        for rank in range(min(manifest.world_size, 2)):
            generators.restore(state.private(reader, rank))
    assert torch.isfinite(objects["model"].up.weight).all()


def command(*words: str) -> str:
    """What comes of a verb: its exit code, or a traceback."""
    result = CliRunner().invoke(cli.main, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(*result.exc_info))
    text = result.output
    if "--json" not in words and not all(char.isprintable() or char in "\n\t" for char in text):
        return f"steers the terminal: {text[:300]!r}"
    return str(result.exit_code)


def look(root: Path) -> dict[str, str]:
    """Read a run in every way."""
    run = RunDirectory(root)
    found: list[Any] = []
    outcome = {"verify_run": attempt(lambda: found.extend(verify_run(root)))}
    if found:
        outcome["verify_run"] = "findings"
    for verb in ("verify", "ls", "show", "status"):
        outcome[verb] = command(verb, str(root))
        outcome[f"{verb} --json"] = command(verb, str(root), "--json")
    outcome["find"] = attempt(lambda: store.find(run))
    outcome["read"] = attempt(lambda: read_all(run))
    outcome["restore"] = attempt(lambda: restore(run))
    return outcome


def _no_hdf5(*_: Any, **__: Any) -> None:
    raise AssertionError("a file was opened through HDF5, which follows links and runs filters")


def limit() -> None:
    """Take the means away to do much harm."""
    h5py.File = h5py.h5f.open = _no_hdf5
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    signal.alarm(WALL_S)


def problems(case: Case, outcome: dict[str, str]) -> list[str]:
    """What is wrong with what came of a case."""
    wrong = [f"{way}: {what}" for way, what in outcome.items() if not _fine(way, what)]
    noticed = outcome.get("verify") == "4" and outcome.get("verify_run") != "ok"
    if case.harmless:
        wrong += [
            f"{way}: {what}, though it is harmless"
            for way, what in outcome.items()
            if what not in {"ok", "0"}
        ]
    elif case.unnoticed:
        if outcome.get("restore") == "ok":
            wrong.append("was restored")
    elif not noticed:
        wrong.append(f"was not noticed: verify {outcome.get('verify')}")
    return wrong


def _fine(way: str, what: str) -> bool:
    if way.split(maxsplit=1)[0] in {"verify", "ls", "show", "status"}:
        return what in {"0", "3", "4"}
    return what in {"ok", "findings", *(error.__name__ for error in OURS)}


def run_case(case: Case, base: Path, folder: Path) -> dict[str, Any]:
    """Make a case, read it in a process of its own, and see that it has written nothing."""
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    (place / "outside").mkdir(parents=True)
    (place / "outside" / "secret.h5").write_bytes(b"secret" * 1000)
    shutil.copytree(base, place / "run")
    case.change(place / "run")
    before = tree(place)
    begun = time.monotonic()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        limit()
        data = json.dumps(look(place / "run")).encode()
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(data)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        data = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    if status:
        wrong = [f"ended by status {status}: out of time or memory"]
    else:
        wrong = problems(case, json.loads(data))
    if tree(place) != before:
        wrong.append("something was written")
    return {
        "name": case.name,
        "wrong": wrong,
        "outcome": json.loads(data) if data else None,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_s": round(time.monotonic() - begun, 2),
    }


def main(folder: Path, patterns: list[str]) -> None:
    torch.set_num_threads(1)
    make_run(folder / "base")
    look(folder / "base")  # imports what is imported late, once for all
    share, shares = 0, 1
    if patterns[:1] == ["--share"]:
        share, shares = map(int, patterns[1].split("/"))
        patterns = []
    for case in cases()[share::shares]:
        if not patterns or any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            sys.stdout.write(json.dumps(run_case(case, folder / "base", folder)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    # Each thread's arena reserves 64 MB of addresses otherwise.
    if os.environ.get("MALLOC_ARENA_MAX") != "1":
        os.environ["MALLOC_ARENA_MAX"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.hostile.runner", *sys.argv[1:]])
    main(Path(sys.argv[1]), sys.argv[2:])
