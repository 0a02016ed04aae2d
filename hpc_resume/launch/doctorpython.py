"""Whether the Python of a run's jobs has what they need."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.files import JsonObject
from hpc_resume.launch.doctorfiles import mount_finding
from hpc_resume.launch.software import software_lines
from hpc_resume.provenance.filesystem import mount_of
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.command import Runner

_TIMEOUT_S = 120.0
#: Says what an interpreter is and has, without importing anything heavy.
FACTS = """
import json, platform, sys
from importlib import metadata
found = {"executable": sys.executable, "version": platform.python_version(), "packages": {}}
for name in ("hpc_resume", "torch", "submitit"):
    try:
        found["packages"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def python_findings(
    config: Config, *, visible: bool | None, one_machine: bool, run: Runner
) -> Iterator[Finding]:
    """Start the interpreter of the jobs on this machine, as a job would, and ask what it has.

    Parameters
    ----------
    config
        Names modules, environment and interpreter.
    visible
        Whether a compute node has started it; ``None``: none was asked.
    one_machine
        There are no compute nodes.
    run
        Runs a command.
    """
    if config.slurm.container.used:
        yield Finding(what="Python", level="note", detail="is in a container, and looked at by --probe only")
        return
    interpreter = config.environment.interpreter or sys.executable
    lines = [*software_lines(config.environment), f"exec {shlex.quote(interpreter)} -c {shlex.quote(FACTS)}"]
    facts, complaint = _ask(run, "\n".join(lines))
    if facts is None:
        yield Finding(
            what="Python", level="bad", detail=f"{interpreter} does not start as in a job: {complaint}"
        )
        return
    path = Path(facts["executable"])
    yield mount_finding(
        "Python", path, mount_of(path.parent.resolve()), visible=visible, one_machine=one_machine
    )
    packages = facts["packages"]
    yield Finding(
        what="packages",
        level="ok" if {"hpc_resume", "torch"} <= packages.keys() else "bad",
        detail=f"Python {facts['version']}; "
        + ", ".join(
            f"{name} {packages.get(name, 'is missing')}" for name in ("hpc_resume", "torch", "submitit")
        ),
    )
    if (found := shutil.which("hpc-resume")) is not None:
        yield Finding(what="hpc-resume", level="ok", detail=found)


def _ask(run: Runner, script: str) -> tuple[JsonObject | None, str]:
    """Run a script whose last line is JSON; else the reason why there is none."""
    try:
        done = run(["bash", "-c", script], _TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_TIMEOUT_S:g} s"
    try:
        return (json.loads(done.out.splitlines()[-1]), "") if done.code == 0 else (None, done.complaint)
    except (ValueError, IndexError):
        return None, f"it says {done.out[-80:]!r}"
