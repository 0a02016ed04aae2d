import os
import signal
import subprocess
import sys

import pytest

from hpc_resume.scheduler.ancestors import deadly_signals, torchrun_variables

#: Prints what is told of its parent, as a rank would.
RANK = """
import os, sys
from hpc_resume.scheduler.ancestors import deadly_signals
for told in deadly_signals(os.getppid(), "USR2", warning_lead_s=120):
    print(told)
"""


def told(*words):
    """What a rank that these words start is told of the first of the processes above it."""
    done = subprocess.run([*words, sys.executable, "-c", RANK], capture_output=True, text=True, check=True)
    return next((line for line in done.stdout.splitlines() if "test-shell" in line), None)


@pytest.mark.parametrize(
    ("above", "deadly"),
    [
        pytest.param("", "SIGUSR2 and SIGTERM", id="a shell"),
        pytest.param("trap : USR2;", "SIGTERM", id="hears the warning"),
        pytest.param("trap '' USR2; trap : TERM;", None, id="hears all"),
        pytest.param("trap : USR1;", "SIGUSR2 and SIGTERM", id="hears another"),
    ],
)
def test_a_shell_above_a_rank(above, deadly):
    found = told("bash", "-c", f'{above} "$@"; exit $?', "test-shell")
    if deadly is None:
        assert found is None
    else:
        assert f"which this rank was started by, dies of {deadly}, and Slurm then kills its ranks" in found
        assert "start the ranks by `exec`, or put `trap : USR1 USR2 TERM` above" in found


def test_a_shell_that_execs_is_not_there():
    assert told("bash", "-c", 'exec "$@"', "test-shell") is None


def test_blocked_signals_are_no_danger(tmp_path):
    write(tmp_path, 7, "starter", 1, SigBlk=1 << (signal.SIGUSR2 - 1) | 1 << (signal.SIGTERM - 1))
    assert list(deadly_signals(7, "USR2", warning_lead_s=120, proc=tmp_path)) == []


def write(proc, pid, name, above, **masks):
    folder = proc / str(pid)
    folder.mkdir()
    lines = {"Name": name, "PPid": str(above), **dict.fromkeys(("SigBlk", "SigIgn", "SigCgt"), "0" * 16)}
    lines.update({key: f"{mask:016x}" for key, mask in masks.items()})
    (folder / "status").write_text("".join(f"{key}:\t{value}\n" for key, value in lines.items()))
    (folder / "cmdline").write_bytes(name.encode() + b"\0train.py\0")


def test_what_slurm_starts_tasks_with_ends_the_look(tmp_path):
    write(tmp_path, 9, "torchrun", 7)
    write(tmp_path, 7, "slurmstepd", 5)
    write(tmp_path, 5, "bash", 1)
    (one,) = deadly_signals(9, "USR1", warning_lead_s=300, proc=tmp_path)
    assert one.startswith("'torchrun train.py' (process 9)")
    assert "dies of SIGUSR1 and SIGTERM" in one
    assert one.endswith(
        "export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 PET_SHUTDOWN_TIMEOUT=360 "
        "before it starts"
    )


@pytest.mark.parametrize(
    "status", ["", "Name:\tbash\n", "Name:\tbash\nPPid:\tx\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\n"]
)
def test_where_the_kernel_says_nothing_nothing_is_told(tmp_path, status):
    assert list(deadly_signals(9, "USR2", warning_lead_s=120, proc=tmp_path)) == []
    write(tmp_path, 9, "bash", 1)
    (tmp_path / "9/status").write_text(status)
    assert list(deadly_signals(9, "USR2", warning_lead_s=120, proc=tmp_path)) == []


def test_torchrun_knows_these_variables():
    """As its own parser reads them: warnings are handled, and its ranks have the lead and a minute more."""
    code = (
        "from torch.distributed.run import get_args_parser as parser;"
        "found = parser().parse_args(['train.py']); print(found.signals_to_handle, found.shutdown_timeout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **torchrun_variables(240)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "300"]
