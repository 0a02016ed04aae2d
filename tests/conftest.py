import signal

import pytest

from hpc_resume.scheduler.signals import WATCHED


@pytest.fixture(autouse=True)
def _signals_stay():
    """A test that leaves signals ignored or blocked would break others, which come after it in its process."""
    handlers = {number: signal.getsignal(number) for number in WATCHED}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    left = {number: signal.getsignal(number) for number in WATCHED}
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert left == handlers
    assert mask == blocked
