"""The demonstration behind ``make demo``: a run that is interrupted twice, and one that is not.

A small GPT is trained on the embedded scheduler: on 2 ranks until the time limit, on 1 rank until it is
preempted, on 3 ranks to the end. Then the same training runs without interruptions, and the two are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import gpt
import torch

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.report.figure import draw_metric
from hpc_resume.report.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RUN, WHOLE = Path("runs/demo"), Path("runs/demo-uninterrupted")
#: The uninterrupted run adds up its losses in the order of 2 ranks, the other in those of 2, 1 and 3.
TOLERANCE = 1e-3
#: So much training on one core that neither the time limit nor the preemption can come too late.
TRAINING_S = 60.0
MARK = "demo.json"


def main() -> None:
    """Run both, compare, and say what happened."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core a rank
    for folder in (RUN, WHOLE):
        clear(folder)
    steps = choose_steps()
    print(f"Training a small GPT on Python's standard library for {steps} steps, interrupted twice.")
    follow(submit(RUN, steps, config=ROOT / "configs/demo.yaml"), steps)
    print("The same again, uninterrupted, on 2 ranks.")
    follow(
        submit(WHOLE, steps, config={"node_types": [{"ranks": 2}], "checkpoint": {"every_s": None}}), steps
    )
    sys.exit(report())


def clear(folder: Path) -> None:
    """Remove what an earlier demonstration has left; anything else is not ours."""
    if (folder / MARK).exists():
        shutil.rmtree(folder)
    elif folder.exists():
        sys.exit(f"{folder}: is there, and no demonstration made it; move it away")


def choose_steps() -> int:
    """Time a few steps on one core: the number of steps fits this machine."""
    torch.set_num_threads(1)
    model = gpt.GPT(width=128, heads=4, layers=3, length=96)
    optimizer = torch.optim.AdamW(model.parameters())
    window = torch.randint(256, (12, 97))
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        model(window).backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return max(100, round(TRAINING_S / min(times) / 50) * 50)


def submit(folder: Path, steps: int, config: object) -> hr.Job:
    """Submit the training to the embedded scheduler."""
    job = hr.submit(f"{ROOT}/examples/gpt.py:train", config=config, run_dir=folder, steps=steps)
    (folder / MARK).write_text(json.dumps({"made by": "examples/demo.py"}))
    return job


def follow(job: hr.Job, steps: int) -> None:
    """Show where a run is until its job is over."""
    begin, line = time.monotonic(), ""
    while not job.over(job.state):
        now = job.status()
        attempt = now.attempts[-1] if now.attempts else None
        known = attempt is not None and attempt.node_type is not None  # its record comes a moment later
        place = f"attempt {attempt.attempt} ({attempt.node_type})" if known else "starting"
        new = f"  {time.monotonic() - begin:4.0f} s  {place}, step {now.step} of {steps}"
        if sys.stdout.isatty():
            print(f"\r{new:70}", end="", flush=True)
        elif new.partition("s  ")[2].partition(",")[0] != line.partition("s  ")[2].partition(",")[0]:
            print(new, flush=True)
        line = new
        time.sleep(0.5)
    print(f"\r  {time.monotonic() - begin:4.0f} s  {job.state}{'':60}")
    if job.state != "COMPLETED":
        print(job.log(), file=sys.stderr)
        sys.exit(f"{job.run_dir}: the job ended as {job.state}; its log is above")


def report() -> int:
    """Say what happened and compare; returns an exit code."""
    print(f"\n{hr.Job.of(RUN)!r}\n")
    now = hr.Job.of(RUN).status()
    one, two = read_metrics(RUN), read_metrics(WHOLE)
    same_steps = [row.step for row in one] == [row.step for row in two]
    apart = max(abs(a.values["loss"] / b.values["loss"] - 1) for a, b in zip(one, two, strict=False))
    damaged = verify_run(RUN)
    checks = {
        f"attempts: {len(now.attempts)}, on {sorted({a.world_size for a in now.attempts})} ranks": (
            [attempt.cause for attempt in now.attempts] == ["time_limit", "preemption", "done"]
        ),
        f"steps lost: {now.steps_lost}": now.steps_lost == 0,
        f"loss: {one[0].values['loss']:.2f} at first, {one[-1].values['loss']:.2f} at last": (
            one[-1].values["loss"] < one[0].values["loss"] / 1.8
        ),
        f"loss of each of {len(one)} steps against the uninterrupted run: {apart:.0e} apart at most, relative "
        f"(tolerance {TOLERANCE:.0e}: sums over other numbers of ranks are rounded in another order)": (
            same_steps and apart <= TOLERANCE
        ),
        f"every byte of {len(now.checkpoints)} checkpoints verified": not damaged,
    }
    for text, good in checks.items():
        print(f"  {'ok ' if good else 'BAD'}  {text}")
    picture = draw_metric(RUN, RUN / "loss.png", reference=WHOLE, smooth=max(len(one) // 150, 1))
    print(f"\npicture:     {picture}\ncheckpoints: {RUN / 'checkpoints'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    main()
