import os
import queue
import signal
import time

import pytest

from hpc_resume.scheduler.signals import SignalWatch


@pytest.fixture
def watch():
    heard = queue.Queue()
    watch = SignalWatch(heard.put)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    assert watch.start()
    watch.heard, watch.before = heard, before
    yield watch
    watch.stop()
    for number, handler in before.items():
        assert signal.getsignal(number) == handler


def child_of(function):
    """Fork, call a function in the child, and give its process id; it leaves with 1 if the function fails."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended(pid, within_s=20):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("it still runs")


def test_a_signal_is_heard(watch):
    os.kill(os.getpid(), signal.SIGUSR2)
    assert watch.heard.get(timeout=20) == "SIGUSR2"


def test_the_watch_ends_though_a_forked_process_lives(watch):
    child = child_of(lambda: time.sleep(100))
    watch.stop()  # it used to wait for the end of a pipe that the child holds open
    os.kill(child, signal.SIGKILL)
    ended(child)


def test_signals_may_be_ignored_after_the_watch(watch):
    watch.stop(ignored=[signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signal.getsignal(signal.SIGTERM) == watch.before[signal.SIGTERM]
    signal.signal(signal.SIGUSR2, watch.before[signal.SIGUSR2])


def test_what_a_forked_process_is_sent_does_not_count_as_sent_to_this_one(watch):
    child = child_of(lambda: time.sleep(100))
    time.sleep(0.2)
    os.kill(child, signal.SIGUSR2)  # not for it: it lives on
    time.sleep(0.2)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert ended(child) == -signal.SIGTERM  # as if nobody watched
    assert watch.heard.empty()


def test_a_process_that_is_forked_after_the_watch_is_as_any_other(watch):
    watch.stop()

    def check():
        assert signal.getsignal(signal.SIGUSR2) == watch.before[signal.SIGUSR2]

    assert ended(child_of(check)) == 0
