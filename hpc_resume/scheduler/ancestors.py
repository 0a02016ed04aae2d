"""The processes that have started a rank inside a job: Slurm signals them, too, and some die of it.

A shell without ``exec``, or torchrun, stands between ``srun`` and the ranks. Slurm sends a job's signals to all of
its processes; when the one that ``srun`` has started is gone, the step is over, and its ranks lose the
save that the signal was to bring (seen with torchrun, 22.05).
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

#: What starts the tasks of a step; it is not signalled with them.
_TOP = "slurmstepd"
#: torchrun's own settings. It must not die of a warning, and must wait for its ranks while they save.
#: Source: torch/distributed/run.py, ``--signals-to-handle`` and ``--shutdown-timeout`` (PyTorch 2.13).
_TORCHRUN = (
    "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 PET_SHUTDOWN_TIMEOUT={seconds:.0f}"
)
#: Beyond the warning lead: the warning comes up to 30 s early (measured).
_MORE_S = 60


def torchrun_variables(warning_lead_s: float) -> dict[str, str]:
    """Give the variables with which torchrun passes warnings on, and waits while its ranks save.

    Parameters
    ----------
    warning_lead_s
        Seconds from the warning to the end of the job.
    """
    words = _TORCHRUN.format(seconds=warning_lead_s + _MORE_S).split()
    return dict(word.split("=", 1) for word in words)


def deadly_signals(
    pid: int, warning: str, *, warning_lead_s: float, proc: Path = Path("/proc")
) -> Iterator[str]:
    """Tell of each process above a rank that a signal of its job would end, and what to do.

    Parameters
    ----------
    pid
        Of the rank's parent.
    warning
        ``"USR1"`` or ``"USR2"``: what ``--signal`` sends.
    warning_lead_s
        Seconds from there to the end of the job.
    proc
        The kernel's view of processes; where there is none, nothing is told.
    """
    looked_for = signal.Signals[f"SIG{warning}"], signal.SIGTERM
    while pid > 1:
        try:
            fields = dict(
                line.split(":\t", 1)
                for line in (proc / str(pid) / "status").read_text().splitlines()
                if ":\t" in line
            )
            words = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")[:-1]
            blocked, ignored, caught = (int(fields[f"Sig{how}"], 16) for how in ("Blk", "Ign", "Cgt"))
            name, pid_above = fields["Name"], int(fields["PPid"])
        except (OSError, ValueError, KeyError):
            return
        if name == _TOP:
            return
        deadly = [each.name for each in looked_for if not (blocked | ignored | caught) >> (each - 1) & 1]
        if deadly:
            yield _told(os.fsdecode(b" ".join(words))[:80] or name, pid, deadly, warning_lead_s)
        pid = pid_above


def _told(command: str, pid: int, deadly: list[str], warning_lead_s: float) -> str:
    how = "start the ranks by `exec`, or put `trap : USR1 USR2 TERM` above the line that does"
    if re.search(r"\b(torchrun|torch\.distributed|accelerate)\b", command):
        how = f"export {_TORCHRUN.format(seconds=warning_lead_s + _MORE_S)} before it starts"
    return (
        f"{command!r} (process {pid}), which this rank was started by, dies of {' and '.join(deadly)}, and Slurm then "
        f"kills its ranks while they save: {how}"
    )
