"""A rank without torch: waits for a signal, and writes down what the library makes of it.

    probe.py RECORDS 75|requeue|stubborn [SIGNAL ...]

RECORDS is a file of JSON lines. The signals are those that it acts on; by default TERM and USR2. A restarted
attempt leaves with 0 at once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from hpc_resume.errors import EXIT_CONTINUE, SchedulerError
from hpc_resume.scheduler.cause import classify
from hpc_resume.scheduler.command import run_command
from hpc_resume.scheduler.connect import connect
from hpc_resume.scheduler.environment import JobEnvironment

WARNING_LEAD_S = 10.0


def main():
    path, action, *names = sys.argv[1:]
    watched = {signal.Signals[f"SIG{name}"] for name in names or ("TERM", "USR2")}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    job = JobEnvironment.detect(os.environ, hostname=socket.gethostname(), pid=os.getpid())
    scheduler = connect(job, os.environ)

    def record(**fields):
        same = {"rank": job.rank, "restart_count": job.restart_count}
        line = json.dumps({**same, **fields}) + "\n"
        with open(path, "ab", buffering=0) as file:  # noqa: PTH123 - one write a line
            file.write(line.encode())

    environment = {name: getattr(job, name) for name in JobEnvironment.__slots__}
    record(event="started", environment=environment, node_type=scheduler.node_type(job.node))
    if job.restart_count:
        return 0
    children = Children() if action == "requeue" else None
    number = signal.sigwait(watched)
    facts = scheduler.facts()
    verdict = classify(
        number.name, facts, own_restarts=job.restart_count, now_s=time.time(), warning_lead_s=WARNING_LEAD_S
    )
    fields = {"signal": number.name, "cause": verdict.cause.value, "requeued": verdict.already_requeued}
    fields["evidence"] = verdict.evidence
    if action == "requeue":
        try:
            fields["answer"] = scheduler.requeue()
        except SchedulerError as error:
            fields["answer"] = str(error)
        fields["children"] = children.codes()
    record(event="signal", **fields)
    if action == "stubborn":
        time.sleep(1000)
    return EXIT_CONTINUE


class Children:
    """Two children that wait for a file: one started as the library does, one plainly."""

    def __init__(self):
        self._pipe = os.pipe()
        wait = ["sh", "-c", f"read line <&{self._pipe[0]}; exit 0"]
        os.set_inheritable(self._pipe[0], True)
        self._plain = subprocess.Popen(wait, close_fds=False, preexec_fn=_unblock)  # noqa: PLW1509 - no thread yet
        self._codes = []
        fd_path = f"/proc/{os.getpid()}/fd/{self._pipe[0]}"
        protected = ["sh", "-c", f"read line < {fd_path}; exit 0"]
        self._thread = threading.Thread(target=lambda: self._codes.append(run_command(protected, 60).code))
        self._thread.start()

    def codes(self):
        """Exit codes of the protected and of the plain child."""
        time.sleep(1)  # the requeue's SIGTERM comes after its answer
        os.write(self._pipe[1], b"go on\n" * 2)
        self._thread.join(30)
        return [*self._codes, self._plain.wait(30)]


def _unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR2})


if __name__ == "__main__":
    sys.exit(main())
