import os
import signal
import subprocess
import sys
import time

from hpc_resume.run.workers import Shielded
from tests.scheduler.test_signals import child_of, ended


def test_a_worker_ends_by_its_rank_alone(tmp_path):
    def work():
        Shielded(lambda number: (tmp_path / f"worker-{number}").touch())(3)
        time.sleep(100)

    worker = child_of(work)
    while not (tmp_path / "worker-3").exists():  # the user's own worker_init_fn
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # from anybody else, as slurmstepd
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker}, {int(number)})"], check=True)
    time.sleep(0.3)
    assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    assert ended(worker) == 0
