import os
import signal
import subprocess
import sys

import pytest

from hpc_resume.scheduler.command import run_command


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "INT", "HUP"])
def test_the_jobs_signals_do_not_kill_the_command(name):
    done = run_command(["sh", "-c", f"kill -{name} $$; echo alive"], 10)
    assert (done.code, done.out) == (0, "alive\n")


def test_without_that_they_would():
    done = subprocess.run(["sh", "-c", "kill -TERM $$; echo alive"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM


def test_the_protection_survives_another_exec():
    code = "import signal; print(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    done = run_command(["sh", "-c", 'exec "$0" -c "$1"', sys.executable, code], 30)
    assert done.out == "True\n"


def test_our_own_signals_are_delivered_afterwards():
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        run_command(["sh", "-c", f"kill -USR1 {os.getpid()}"], 10)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen == [signal.SIGUSR1]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_command_that_hangs_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        run_command(["sleep", "60"], 0.05)


def test_no_such_command():
    with pytest.raises(FileNotFoundError):
        run_command(["no-such-command-here"], 1)


def test_output_variables_and_code():
    done = run_command(["sh", "-c", 'echo "$A"; echo "two  words" >&2; exit 3'], 10, environ={"A": "b"})
    assert (done.code, done.out, done.complaint) == (3, "b\n", "two words")
    assert run_command(["sh", "-c", "exit 4"], 10).complaint == "exit code 4, nothing on stderr"
