"""Reads hostile runs in every way there is, in processes that may take little memory and time.

    $ python -m tests.hostile.runner FOLDER [NAME…]            those whose names fit a pattern; all by default
    $ python -m tests.hostile.runner FOLDER --share 0/2        every second one

Prints one JSON object a case. The process that forks them has everything loaded, so some cases cost a fork.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import torch
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted, tensor_like
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import CheckpointNotFound, HpcResumeError, IntegrityError, MismatchError, StateError
from hpc_resume.run import generators
from hpc_resume.rundir import RunDirectory
from tests.hostile.base import items, make_run
from tests.hostile.cases import Case, cases

#: Cases that are read one after the other in one process; each alone if that comes to grief.
BATCH = 8
#: Address space that they may take beyond what the process has taken when it is forked.
MEMORY_BYTES = 256 << 20
#: Processor time that they may take.
CPU_S = 30
#: ... and time on the clock, on a machine that has other things to do.
WALL_S = 200
#: Names of the errors that a read may end in.
OURS = {error.__name__ for error in (IntegrityError, CheckpointNotFound, MismatchError, StateError)}


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
    except HpcResumeError as error:
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


def open_it(run: RunDirectory) -> None:
    """Every tensor, and every state as it was saved, through the public reader."""
    with Checkpoint(run.root) as ckpt:
        ckpt.load()
        for key in ckpt.keys:
            ckpt.state(key)


def load_into(run: RunDirectory) -> None:
    """The model, into one that is there."""
    model = items(2)["model"]
    with Checkpoint(run.root) as ckpt:
        ckpt.load_into(model)


def export(run: RunDirectory, suffix: str) -> str:
    """What comes of an export to somewhere else."""
    with tempfile.TemporaryDirectory() as folder:
        return command("export", str(run.root), "--to", f"{folder}/exported{suffix}")


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
    outcome["open"] = attempt(lambda: open_it(run))
    outcome["load_into"] = attempt(lambda: load_into(run))
    for kind in (".safetensors", ".pt"):
        outcome[f"export {kind}"] = export(run, kind)
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
    verb = way.split(maxsplit=1)[0]
    if verb == "export":
        return what in {"0", "2", "3", "4"}  # 2: what does not go into the other format
    if verb in {"verify", "ls", "show", "status"}:
        return what in {"0", "3", "4"}
    return what in {"ok", "findings", *OURS}


def make(case: Case, base: Path, place: Path) -> None:
    """Make a hostile run, and something beside it that it might lead to."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "outside").mkdir(parents=True)
    (place / "outside" / "secret.h5").write_bytes(b"secret" * 1000)
    shutil.copytree(base, place / "run")
    case.change(place / "run")


def run_batch(batch: Sequence[Case], base: Path, folder: Path) -> list[dict[str, Any]]:
    """Make cases, read them in a process of its own, and see that it has written nothing."""
    places = [folder / f"case-{number}" for number in range(len(batch))]
    for case, place in zip(batch, places, strict=True):
        make(case, base, place)
    before = [tree(place) for place in places]
    begun = time.monotonic()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        limit()
        outcomes = []
        for place in places:
            outcomes.append(look(place / "run"))
            gc.collect()
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(json.dumps(outcomes).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        data = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    if status and len(batch) > 1:  # which of them was it?
        return [result for case in batch for result in run_batch([case], base, folder)]
    results = []
    for number, (case, place) in enumerate(zip(batch, places, strict=True)):
        outcome = None if status else json.loads(data)[number]
        wrong = problems(case, outcome) if outcome else [f"ended by status {status}: out of time or memory"]
        if tree(place) != before[number]:
            wrong.append("something was written")
        results.append({"name": case.name, "wrong": wrong, "outcome": outcome})
    results[0]["cpu_s"] = round(usage.ru_utime + usage.ru_stime, 2)
    results[0]["wall_s"] = round(time.monotonic() - begun, 2)
    return results


def main(folder: Path, patterns: list[str]) -> None:
    torch.set_num_threads(1)
    make_run(folder / "base")
    look(folder / "base")  # imports what is imported late, once for all
    share, shares = 0, 1
    if patterns[:1] == ["--share"]:
        share, shares = map(int, patterns[1].split("/"))
        patterns = []
    chosen = [
        case
        for case in cases()[share::shares]
        if not patterns or any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)
    ]
    gc.collect()
    gc.freeze()  # what is there now stays: collecting after each case looks at what is new only
    for first in range(0, len(chosen), BATCH):
        for result in run_batch(chosen[first : first + BATCH], folder / "base", folder):
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    # Each thread's arena reserves 64 MB of addresses otherwise.
    if os.environ.get("MALLOC_ARENA_MAX") != "1":
        os.environ["MALLOC_ARENA_MAX"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.hostile.runner", *sys.argv[1:]])
    main(Path(sys.argv[1]), sys.argv[2:])
