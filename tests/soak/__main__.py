"""Interrupts runs on the private cluster, again and again, in every way: ``make soak``, or

    $ python -m tests.soak --interruptions 100 --minutes 30 --json soak.json

Two runs of two ranks and an array of eight are under way together. Each run that has saved something since it
was last interrupted may be hit next. In the end, each must be done, equal an uninterrupted run bit for bit, have every
checkpoint that was ever committed, every byte of it as it was written, and leave no job behind.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.slurm.cluster import PrivateCluster
from tests.soak.check import complaints
from tests.soak.fleet import GROUPS, Fleet, Member
from tests.soak.interruptions import KINDS, Field, draw

ROOT = Path(__file__).parents[2]
#: The filesystem of the runs, which is filled up at times.
DISK_MB = 512
#: Every run is hit about once in so many steps, and by the last steps all have been.
_STEPS_PER_HIT = 8
_LEAST_STEPS = 200
_STEP_S = 0.15
_TIME_LIMIT_S = 150.0
#: Between two interruptions, of which so many are under way together.
_PAUSE_S = 1.0
_AT_ONCE = 3
_OVER = frozenset({"done", "failed", "cancelled"})


class Soak:
    """One soak.

    Parameters
    ----------
    cluster
        The private cluster, started.
    disk
        A filesystem of its own for the runs, or an ordinary folder.
    full
        Whether it may be filled up.
    seed
        Of what happens to whom.
    groups
        Which runs.
    steps
        Of each run.
    """

    def __init__(
        self, cluster: PrivateCluster, disk: Path, *, full: bool, seed: int, groups: Sequence[str], steps: int
    ) -> None:
        self.cluster = cluster
        self.field = Field(cluster=cluster, disk=disk if full else None, rng=random.Random(seed))
        self.fleet = Fleet(
            disk / "runs", steps=steps, step_s=_STEP_S, time_limit_s=_TIME_LIMIT_S, groups=groups
        )
        self.reference = Fleet(
            cluster.work / "reference", steps=steps, step_s=0.0, time_limit_s=3600, groups=groups
        )
        self.done: list[tuple[str, str]] = []
        self.committed: dict[Path, set[str]] = {}
        self._hit_at: dict[Path, int] = {}
        self._being_hit: dict[Path, Future[None]] = {}
        self._over = threading.Event()

    def run(self, interruptions: int, seconds: float) -> list[str]:
        """Interrupt, wait until all is over, and look; returns what is not as it must be."""
        self.reference.submit_all()
        self._wait(self.reference, time.monotonic() + seconds / 3)
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        self.fleet.submit_all()
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while len(self.done) < interruptions and time.monotonic() < deadline:
                ready = [member for member in self.fleet.members() if self._may_hit(member)]
                if ready and sum(not each.done() for each in self._being_hit.values()) < _AT_ONCE:
                    self._interrupt(self.field.rng.choice(ready), pool)
                time.sleep(_PAUSE_S)
        for each in self._being_hit.values():
            each.result()
        self._wait(self.fleet, time.monotonic() + seconds / 2)
        self._over.set()
        watcher.join()
        found = complaints(self.fleet, self.reference, self.committed)
        left = self.cluster.run("squeue", "--noheader", check=False).strip()
        return found + [f"jobs are left behind: {left}"] * bool(left)

    def _may_hit(self, member: Member) -> bool:
        """Whether a run is training and has saved something since it was last interrupted."""
        if member.run_dir in self._being_hit and not self._being_hit[member.run_dir].done():
            return False
        if member.status().state != "running" or self.cluster.state(member.job_id) != "RUNNING":
            return False
        return member.saved_step > self._hit_at.get(member.run_dir, -1)

    def _interrupt(self, member: Member, pool: ThreadPoolExecutor) -> None:
        kind = draw(self.field)
        self._hit_at[member.run_dir] = member.saved_step
        self.done.append((kind, member.name))
        say(f"{len(self.done):3} {kind}: {member.name} at step {member.saved_step}")
        self._being_hit[member.run_dir] = pool.submit(KINDS[kind], self.field, member)

    def _watch(self) -> None:
        """Remember every checkpoint that is ever seen committed."""
        while not self._over.wait(0.5):
            for member in self.fleet.members():
                names = {
                    path.parent.name for path in (member.run_dir / "checkpoints").glob("*/manifest.json")
                }
                self.committed.setdefault(member.run_dir, set()).update(names)

    def _wait(self, fleet: Fleet, deadline: float) -> None:
        """Wait until all runs of a fleet are over."""
        while time.monotonic() < deadline:
            members = list(fleet.members())
            queued = self.cluster.run("squeue", "--noheader", check=False).strip()
            if len(members) == fleet.size and not queued:
                if all(member.status().state in _OVER for member in members):
                    return
                say("nothing is queued, but not all runs are over")
                return
            time.sleep(1)


def say(text: str) -> None:
    """Tell the person who watches."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def mount(folder: Path) -> bool:
    """Mount a small filesystem, in a mount namespace of this process's own; whether it could be done."""
    libc = ctypes.CDLL(None, use_errno=True)  # mount(8) refuses whoever is not called root
    return libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={DISK_MB}m".encode()) == 0


def in_own_namespace(words: Sequence[str]) -> int:
    """Run a command that may mount what only it sees, where that is allowed; returns its exit code."""
    own = ["unshare", "--mount"]
    if os.getuid() != 0:
        own += ["--user", "--map-current-user", "--keep-caps"]
    try:
        allowed = subprocess.run([*own, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    return subprocess.run([*(own if allowed else []), *words], cwd=ROOT, check=False).returncode


def main() -> int:
    """Parse, soak, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--interruptions", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=tuple(GROUPS))
    parser.add_argument(
        "--keep", type=Path, help="where the runs are copied to if something is not as it must be"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        return in_own_namespace([sys.executable, "-m", "tests.soak", *sys.argv[1:], "--inside"])
    cluster = PrivateCluster()
    began = time.monotonic()
    try:
        cluster.start()
        os.environ.update(cluster.env, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        disk = cluster.work / "disk"
        disk.mkdir()
        full = mount(disk)
        if not full:
            say("no mount namespace can be had here, so no full disks")
        steps = max(_LEAST_STEPS, _STEPS_PER_HIT * options.interruptions)
        soak = Soak(cluster, disk, full=full, seed=options.seed, groups=options.groups, steps=steps)
        found = soak.run(options.interruptions, options.minutes * 60)
        if found and options.keep:
            shutil.copytree(cluster.work, options.keep, symlinks=True)
        attempts = [attempt for member in soak.fleet.members() for attempt in member.status().attempts]
    finally:
        cluster.stop()
    figures = {
        "interruptions": dict(Counter(kind for kind, _ in soak.done)),
        "runs": soak.fleet.size,
        "attempts": len(attempts),
        "ended by": dict(Counter(attempt.cause or "no word" for attempt in attempts)),
        "steps lost": sum(attempt.steps_lost for attempt in attempts),
        "seconds": round(time.monotonic() - began),
        "complaints": found,
    }
    text = json.dumps(figures, indent=1)
    if options.json:
        options.json.write_text(text)
    sys.stdout.write(text + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
