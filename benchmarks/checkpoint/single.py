"""Measurements in one process: saves, async saves, loads, small tensors, incremental saves."""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.checkpoint.dcp import Dcp
from benchmarks.checkpoint.engine import Ours
from benchmarks.checkpoint.limits import Raw
from benchmarks.checkpoint.states import gpt_state, size_of, small_state
from benchmarks.paired import Result, compare, seconds, summarise

THREADS = 2


def saves(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare synchronous and background saves with the raw limits and with DCP."""
    n = 3 if quick else 7
    state = gpt_state(quick=quick)
    ours = Ours(folder / "ours", state, threads=THREADS)
    raw = Raw(folder, size_of(state), threads=THREADS)
    yield compare(
        "synchronous save + fsync, against raw pwrite + fsync",
        ours.timed_save,
        lambda: raw.write(direct=False),
        target=1.20,
        n=n,
    )
    for threads, target in ((1, 0.60), (THREADS, 0.80)):
        peer = Dcp(folder, state, threads=threads)
        which = "its default, 1 thread" if threads == 1 else f"{threads} threads"
        yield compare(
            f"synchronous save + fsync, against DCP ({which})",
            ours.timed_save,
            peer.timed_save,
            target=target,
            n=n,
        )

    def background() -> float:
        snapshot = ours.snapshot(stage=True)
        taken = seconds(lambda: (ours.write(snapshot), ours.commit()))
        ours.clear()
        return taken

    yield compare(
        "background durable write from the staging area, against raw O_DIRECT",
        background,
        lambda: raw.write(direct=True),
        target=1.06,
        n=n,
    )
    snapshot = ours.snapshot(stage=True)
    yield compare(
        "why: the same without hashing and commit",
        lambda: ours.unhashed_write(snapshot),
        lambda: raw.write(direct=True),
        target=None,
        n=n,
    )


def async_saves(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare how long an async save blocks, and how long it takes, with memcpy and with DCP."""
    n = 3 if quick else 7
    state = gpt_state(quick=quick)
    ours = Ours(folder / "ours", state, threads=THREADS)
    raw = Raw(folder, size_of(state), threads=THREADS)
    sources = list(state.values())
    yield compare(
        "time that an async save blocks, against memcpy into kept buffers",
        lambda: seconds(lambda: ours.snapshot(stage=True)),
        lambda: raw.copy(sources),
        target=1.10,
        n=5 * n,
        warm_up=2,
    )
    blocked: dict[str, list[tuple[float, float]]] = {}
    whole: dict[str, list[tuple[float, float]]] = {}
    for mode in ("thread", "process"):
        peer = Dcp(folder, state, threads=THREADS)
        for turn in range(-1, n):
            os.sync()  # neither pays for what the other has left to the disk
            begin = time.perf_counter()
            snapshot = ours.snapshot(stage=True)
            stopped = time.perf_counter() - begin
            ours.write(snapshot)
            ours.commit()
            taken = time.perf_counter() - begin
            ours.clear()
            os.sync()
            their_stopped, their_taken = peer.timed_async_save(mode)
            if turn >= 0:
                blocked.setdefault(mode, []).append((stopped, their_stopped))
                whole.setdefault(mode, []).append((taken, their_taken))
    # Against the better of its two modes in each respect.
    for name, found, target in (
        ("time that an async save blocks, against DCP's best async mode", blocked, 0.70),
        ("whole async save, against DCP's best async mode", whole, 0.40),
    ):
        best = min(found, key=lambda mode: statistics.median(theirs for _, theirs in found[mode]))
        result = summarise(name, found[best], target=target)
        result.details["mode"] = best
        yield result


def slowed_steps(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare steps of matrix products while a save is being written with steps while none is."""
    state = gpt_state(quick=quick)
    ours = Ours(folder / "ours", state, threads=THREADS)
    torch.set_num_threads(1)
    left, right = torch.randn(512, 512), torch.randn(512, 512)

    def step() -> None:
        for _ in range(4):
            torch.mm(left, right)

    def median_step(until: Callable[[], bool]) -> float:
        times = []
        while not until() or len(times) < 5:
            times.append(seconds(step))
        return statistics.median(times)

    pairs = []
    for _ in range(3 if quick else 7):
        snapshot = ours.snapshot(stage=True)
        thread = threading.Thread(target=lambda taken=snapshot: (ours.write(taken), ours.commit()))
        thread.start()
        writing = median_step(lambda running=thread: not running.is_alive())
        thread.join()
        ours.clear()
        end = time.perf_counter() + 0.3
        quiet = median_step(lambda end=end: time.perf_counter() > end)
        pairs.append((writing, quiet))
    yield summarise(
        "steps on one core while a save is written, against steps while none is", pairs, target=1.05
    )


def loads(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare verified loads with raw reads and with DCP, page cache warm."""
    n = 5 if quick else 15
    state = gpt_state(quick=quick)
    ours = Ours(folder / "ours", state, threads=THREADS)
    ours.save()
    shard = next((folder / "ours" / "checkpoints").glob("*/*.h5"))
    into = {name: torch.empty_like(tensor).fill_(0) for name, tensor in state.items()}
    raw = Raw(folder, 4096, threads=THREADS)
    outs = list(into.values())
    yield compare(
        "load, verified, against raw preadv",
        lambda: seconds(lambda: ours.load(into)),
        lambda: raw.read(shard, outs),
        target=1.20,
        n=n,
        warm_up=2,
    )
    snapshot = ours.snapshot(stage=True)
    yield compare(
        "why: hashing all bytes alone, not even hot from being read, against raw preadv",
        lambda: ours.hashing(snapshot, -1),
        lambda: raw.read(shard, outs),
        target=None,
        n=n,
    )
    peer = Dcp(folder, state, threads=THREADS)
    peer.save()
    yield compare(
        "load, verified, against DCP",
        lambda: seconds(lambda: ours.load(into)),
        lambda: peer.load(dict(into)),
        target=0.20,
        n=max(n // 3, 3),
    )
    ours.load(into)
    assert all(torch.equal(tensor, into[name]) for name, tensor in state.items())
    before = _peak_memory(lambda: None)
    extra = max(_peak_memory(lambda: ours.load(into)) - before, 0)
    yield Result(
        name="extra memory of a load, as a part of the state",
        ratio=extra / size_of(state),
        target=0.02,
        n=1,
        details={"extra_bytes": extra},
    )


def _peak_memory(function: Callable[[], object]) -> int:
    """Highest resident size while a function runs, above what it was before. Source: proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def small_tensors(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare saves and loads of very many small tensors with DCP."""
    n = 3
    state = small_state(quick=quick)
    ours, peer = Ours(folder / "ours", state, threads=THREADS), Dcp(folder, state, threads=THREADS)
    count = f"{len(state):,} small tensors"
    yield compare(f"{count}: save, against DCP", ours.timed_save, peer.timed_save, target=0.05, n=n)
    ours.save()
    peer.save()
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    yield compare(
        f"{count}: load, against DCP",
        lambda: seconds(lambda: ours.load(into)),
        lambda: peer.load(dict(into)),
        target=0.05,
        n=n,
    )
    assert all(torch.equal(tensor, into[name]) for name, tensor in state.items())


def incremental(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Compare saves of which little has changed with whole saves."""
    n = 5 if quick else 9
    state = gpt_state(quick=quick)
    chained = Ours(folder / "chained", state, threads=THREADS, longest_chain=1_000_000)
    whole = Ours(folder / "whole", state, threads=THREADS)
    chained.save()
    times, sizes = [], []
    names = list(state)
    for turn in range(-1, n):
        _change(state, names, part=0.02, turn=turn + 1)
        ours = seconds(chained.save)
        theirs = whole.timed_save()
        if turn >= 0:
            times.append((ours, theirs))
            sizes.append((chained.written_bytes, size_of(state)))
    yield summarise("incremental, 2 % changed: time, against a whole save", times, target=0.15)
    yield summarise(
        "incremental, 2 % changed: bytes, against a whole save", sizes, target=0.025, unit="bytes"
    )
    snapshot = whole.snapshot(stage=False)
    yield compare(
        "why: hashing everything alone, against a whole save",
        lambda: whole.hashing(snapshot, -1),
        whole.timed_save,
        target=None,
        n=n,
    )
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    chained.load(into)
    assert all(torch.equal(tensor, into[name]) for name, tensor in state.items())
    yield from _kinds_of_training(folder, quick=quick)


def _change(state: dict[str, torch.Tensor], names: list[str], *, part: float, turn: int) -> None:
    """Change neighbouring tensors that make up a part of the bytes, others each time."""
    room = part * size_of(state)
    for place in range(len(names)):
        tensor = state[names[(turn * 37 + place) % len(names)]]
        take = min(tensor.shape[0], int(room // (tensor[0].numel() * tensor.element_size())))
        if take:
            tensor[:take] += 1
            room -= take * tensor[0].numel() * tensor.element_size()


def _kinds_of_training(folder: Path, *, quick: bool) -> Iterator[Result]:
    """Tell what incremental saves write where much of a state stays the same from save to save."""
    state = gpt_state(quick=quick)
    names = list(state)
    block = {f"{index:03d}" for index in range(12 * (4 if quick else 12))[-12:]}
    kinds: dict[str, Callable[[int], None]] = {
        "frozen backbone (only the last transformer block is trained)": lambda _: _add_to(
            [tensor for name, tensor in state.items() if name[:3] in block]
        ),
        "LoRA-like (adapters of 0.5 % beside a frozen model)": lambda turn: _change(
            state, names[-3:], part=0.005, turn=turn
        ),
        "embedding-heavy (a table of a million rows, looked up by Zipf's law)": lambda turn: _touch_rows(
            state["table"], part=0.1, turn=turn
        ),
    }
    for kind, train in kinds.items():
        if "embedding" in kind:
            state.clear()
            state["table"] = torch.randn(100_000 if quick else 1_000_000, 64)
            state["head"] = torch.randn(64, 64)
        label = kind.split(" ", maxsplit=1)[0]
        ours = Ours(folder / f"kind-{label}", state, threads=THREADS, longest_chain=1_000_000)
        ours.save()
        sizes = []
        for turn in range(3):
            train(turn)
            ours.save()
            sizes.append((float(ours.written_bytes), float(size_of(state))))
        yield summarise(f"bytes of an incremental save, {kind}", sizes, target=None, unit="bytes")


def _add_to(tensors: list[torch.Tensor]) -> None:
    torch._foreach_add_(tensors, 1)


def _touch_rows(table: torch.Tensor, *, part: float, turn: int) -> None:
    """Change rows as a sparse optimizer does; row k, counting from 1, is looked up in proportion to 1/k."""
    generator = torch.Generator().manual_seed(turn)
    uniform = torch.rand(int(part * len(table)), generator=generator)
    table[(torch.exp(uniform * math.log(len(table))) - 1).long()] += 1
