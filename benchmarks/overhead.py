"""What the library costs a training loop with everything on, and how fast a run is saved when it must stop.

    $ python -m benchmarks.overhead --json overhead.json

Two real ranks train under DDP, as a job whose end is known: journal, metrics, signals, the clock against the end of
the job, periodic saves, all are on. The work of a step is the time that a GPU would take, and a collective.

The first row compares 10 ms steps in ``run.steps`` with a bare loop, in turn. A save comes once in 60,000 steps, too
seldom to be waited for. So what one adds to the steps around it is measured apart, and its part of the cadence is
added: ``ratio`` is that of steps, plus ``save_adds_s`` divided by ``cadence_s``.

The second row compares the time from a signal to the committed manifest with that of one step and one save. Each
stop is an attempt of its own, which a signal to both ranks ends at some moment of a step; that step and saves that
training waited for are of the same attempt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hpc_resume as hr
from benchmarks.paired import Result, summarise
from hpc_resume.errors import Interrupted
from hpc_resume.journal import read_events

RANKS = 2
#: 4 bytes each; with the moments of AdamW 240 MB, of which each rank saves a half.
PARAMETERS = 20_000_000
#: In each turn, without a save and with one.
STEPS, STEPS_OF_A_SAVE = 60, 300
#: Between the saves of an attempt that is going to be stopped, and how long its steps take.
SAVE_EVERY, STOP_STEP_S = 15, 0.050
OVERHEAD, STOP = 1.01, 1.2
CADENCE_S = hr.Config().checkpoint.every_s or 600.0


class Shifted:
    """Unix time that can be put forward, so that a periodic save is due."""

    by_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.time() + self.by_s


def _begin(rank: int, folder: Path) -> None:
    """Be a rank of a job that ends in a week."""
    state = {"schema": 1, "job_id": "1", "state": "RUNNING", "run_dir": str(folder / "run"), "exit_codes": []}
    if rank == 0:
        (folder / "job.json").write_text(json.dumps({**state, "end_time": time.time() + 7 * 86400}))
    os.environ.update(
        HPC_RESUME_JOB_STATE=str(folder / "job.json"),
        SUBMITIT_LOCAL_JOB_ID="1",
        SUBMITIT_LOCAL_NTASKS=str(RANKS),
        SUBMITIT_LOCAL_GLOBALID=str(rank),
        SUBMITIT_LOCAL_LOCALID=str(rank),
    )
    torch.set_num_threads(1)


def _track(run: hr.Run) -> Callable[[], None]:
    """Give the run a state; returns what changes all of it."""
    net = torch.nn.Linear(1000, PARAMETERS // 1001)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
    net(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    run.track(model=torch.nn.parallel.DistributedDataParallel(net), optimizer=optimizer)
    tensors = [each.detach() for each in net.parameters()]
    tensors += [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    return lambda: torch._foreach_add_(tensors, 1e-3)


def _step(tensor: torch.Tensor, seconds: float) -> None:
    """Work for a fixed time, as a GPU would, then meet the other ranks."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    dist.all_reduce(tensor)


def _some_steps(run: hr.Run, count: int) -> Iterator[int]:
    """Give the next steps of a run that has no end."""
    last = run.step + count
    for step, _ in run.steps(iter(int, None), until=1_000_000_000):
        if step == last:
            return
        yield step


def _loop(rank: int, folder: Path, repeats: int, pipe: Any) -> None:
    """Take turns with a bare loop; then saves with none."""
    _begin(rank, folder)
    clock = Shifted()
    with hr.Run(folder / "run", clock=clock) as run:
        change = _track(run)
        tensor = torch.zeros(1000)

        def bare(count: int) -> float:
            begin = time.perf_counter()
            for _ in range(count):
                _step(tensor, 0.010)
            return time.perf_counter() - begin

        def ours(count: int, *, save: bool = False) -> float:
            if save:
                change()
                clock.by_s += CADENCE_S
            dist.barrier()
            begin = time.perf_counter()
            for _ in _some_steps(run, count):
                _step(tensor, 0.010)
                run.log(loss=0.0)
            return time.perf_counter() - begin

        loops, saves = [], []
        ours(STEPS_OF_A_SAVE, save=True)  # lays everything out
        for turn in range(repeats):
            first = bare(STEPS) if turn % 2 else None
            with_all = ours(STEPS)
            loops.append((with_all, bare(STEPS) if first is None else first))
        for _ in range(max(repeats // 8, 3)):
            without = ours(STEPS_OF_A_SAVE)
            saves.append(ours(STEPS_OF_A_SAVE, save=True) - without)
        dist.barrier()
        if rank == 0:
            events = read_events(run.directory.attempt(run.attempt) / "events.jsonl")
            blocked = [event["blocked_s"] for event in events if event["event"] == "saved"]
            assert len(blocked) > len(saves), "not every save was committed"
            pipe.send((loops, saves, blocked[1:]))


def _stop(rank: int, folder: Path, pipe: Any) -> None:
    """Train until a signal comes."""
    _begin(rank, folder)
    steps = []
    settings = {"every_steps": SAVE_EVERY, "every_s": None, "asynchronous": False}
    try:
        with hr.Run(folder / "run", checkpoint=settings, stop={"agreement_s": 60}) as run:
            change = _track(run)
            tensor = torch.zeros(1000)
            for step in _some_steps(run, 1_000_000):
                begin = time.perf_counter()
                change()
                _step(tensor, STOP_STEP_S)
                run.log(loss=0.0)
                steps.append(time.perf_counter() - begin)
                if rank == 0 and step == 5 * SAVE_EVERY + 3:
                    pipe.send("go")
    except Interrupted:
        if rank == 0:
            events = read_events(folder / "run" / "attempts" / "0001" / "events.jsonl")
            saved = [event for event in events if event["event"] == "saved"]
            (last,) = [event["t"] for event in saved if event["reason"] == "stop"]
            took = [event["took_s"] for event in saved if event["reason"] == "cadence"]
            pipe.send((last, statistics.median(steps), statistics.median(took[1:])))  # the first lays all out


def _ranks(function: Callable[..., None], folder: Path, *args: Any) -> tuple[list[Any], Any]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=function, args=(rank, folder, *args, theirs)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    return processes, ours


def measure_loop(repeats: int) -> Result:
    """Compare loops."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        processes, pipe = _ranks(_loop, Path(folder), repeats)
        loops, saves, blocked = pipe.recv()
        for process in processes:
            process.join()
    result = summarise("10 ms steps with everything on against a bare loop", loops, target=OVERHEAD)
    save_s = statistics.median(saves)
    steps_alone = result.ratio
    result.ratio += max(save_s, 0.0) / CADENCE_S
    result.details.update(
        steps_alone=round(steps_alone, 4),
        save_adds_s=round(save_s, 4),
        save_blocks_s=round(statistics.median(blocked), 4),
        cadence_s=CADENCE_S,
    )
    return result


def measure_stop(count: int) -> Result:
    """Stop attempts."""
    pairs = []
    chance = random.Random(0)  # noqa: S311 - no secret
    for _ in range(count):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            processes, pipe = _ranks(_stop, Path(folder))
            pipe.recv()
            time.sleep(STOP_STEP_S * (1 + chance.random()))
            asked = time.time()
            for process in processes:
                os.kill(process.pid, signal.SIGUSR2)
            committed, step_s, save_s = pipe.recv()
            for process in processes:
                process.join()
            pairs.append((committed - asked, step_s + save_s))
    return summarise("from a signal to the manifest against a step and a save", pairs, target=STOP)


def main() -> None:
    """Run the benchmark and print its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    results = [measure_loop(24 if arguments.quick else 120), measure_stop(3 if arguments.quick else 15)]
    result = {"results": [each.to_json() for each in results]}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
