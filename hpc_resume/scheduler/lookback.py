"""What Slurm still knows of an attempt that is over: its last state, and what became of its nodes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from hpc_resume.scheduler.base import PastJob, Whereabouts
from hpc_resume.scheduler.command import Completed

#: Runs a command once; FileNotFoundError if it is not here.
Ask = Callable[[Sequence[str]], Completed]

#: States of a node on which nothing runs any more. NOT_RESPONDING comes first: slurmctld calls a node down
#: after SlurmdTimeout only. Source: scontrol(1), show node; measured.
_FAILED = re.compile(r"\b(DOWN|FAIL|NOT_RESPONDING)\b|\*")


def last_state(found: PastJob, past: Whereabouts, ask: Ask) -> PastJob:
    """Add the state in which accounting has an attempt, where there is accounting.

    ``sacct --duplicates`` has a row for each start of a job; the attempt's is the last that began before it.
    """
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates"]
    try:
        done = ask([*words, f"--jobs={past.job_id}", "--format=Start,State,ExitCode"])
    except FileNotFoundError:
        return found
    rows = [row.split("|") for row in done.out.splitlines()]
    begun = [
        (int(start), state)
        for start, state, _ in (row for row in rows if len(row) == 3)
        if start.isdecimal() and int(start) <= past.began_s
    ]
    if done.code != 0 or not begun:
        return found
    state = max(begun)[1].split()[0]  # "CANCELLED by 1000"
    if state in {"RUNNING", "PENDING", "COMPLETED"}:
        return found
    return dataclasses.replace(found, state=state, evidence=f"sacct: State={max(begun)[1]}")


def failed_nodes(found: PastJob, past: Whereabouts, ask: Ask) -> PastJob:
    """Add which nodes of an attempt are down, do not respond, or have been booted since it was last heard of."""
    if not past.nodes:
        return found
    done = ask(["scontrol", "show", "node", ",".join(past.nodes)])
    failed, told = [], []
    for block in re.split(r"^(?=NodeName=)", done.out, flags=re.MULTILINE):
        name = re.match(r"NodeName=(\S+)", block)
        state = re.search(r"^\s+State=(\S+)", block, re.MULTILINE)
        boot = re.search(r"^\s+BootTime=(\d+) ", block, re.MULTILINE)
        if name is None or name[1] not in past.nodes:
            continue
        if state is not None and _FAILED.search(state[1]):
            told.append(f"node {name[1]}: State={state[1]}")
        elif boot is not None and int(boot[1]) > past.last_sign_s:
            told.append(f"node {name[1]} was booted at {boot[1]}, after the attempt was last heard of")
        else:
            continue
        failed.append(name[1])
    if not failed:
        return found
    evidence = "; ".join(part for part in (found.evidence, *told) if part)
    return dataclasses.replace(found, failed_nodes=tuple(failed), evidence=evidence)
