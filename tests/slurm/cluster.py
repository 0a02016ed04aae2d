"""A private Slurm cluster on this machine, for an ordinary user: no root, no munge, no systemd.

Tests take it as the fixture ``cluster``. To play with it::

    $ python tests/slurm/cluster.py start        # prints how to use it
    $ eval "$(python tests/slurm/cluster.py env)"
    $ sinfo; srun -N2 hostname
    $ python tests/slurm/cluster.py stop

Whatever the cluster writes lies in one folder below /tmp that :meth:`PrivateCluster.stop` removes.
"""

# ruff: noqa: T201 - it has a command line

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from packages import SlurmUnavailable, find_slurm, library_folder, plugin_folder, search_path

NODES = {"big1": "a100", "big2": "a100", "small1": "v100", "small2": "v100"}
_GPUS = {"a100": 4, "v100": 2}
_START_TIMEOUT_S = 30.0

# Only what differs from Slurm's defaults, and why. Measured on Slurm 22.05.8.
_SLURM_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)      # must be `hostname -s`, which need not resolve: the address is here
SlurmUser={user}
SlurmdUser={user}                    # one ordinary user for everything: slurmd skips setuid
AuthType=auth/none                   # no munge; the uid that is claimed is believed
CredType=cred/none
AuthInfo=cred_expire=5               # a requeued job waits this long; below 5 silently means 120
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}                # of no node: each has its own below
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/%n.log
PlugStackConfig={base}/etc/plugstack.conf    # empty: keeps /etc/slurm of this machine out
{plugins}
ProctrackType=proctrack/linuxproc    # what needs neither root nor cgroups
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none        # /linux makes an unprivileged slurmstepd crash
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SlurmdParameters=config_overrides    # believe the NodeName lines, not the hardware
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
ReturnToService=2                    # a node that comes back is idle again by itself
KillWait=5                           # SIGTERM to SIGKILL
SlurmdTimeout=10                     # a silent node is DOWN after this
MessageTimeout=10
SchedulerType=sched/backfill         # the rest: schedule at once instead of every 30-60 s
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio   # a partition with a higher PriorityTier preempts one with a lower
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP DefaultTime=10 MaxTime=60 DefMemPerCPU=100
PartitionName=main  PriorityTier=10  PreemptMode=OFF Default=YES
PartitionName=low   PriorityTier=1   PreemptMode=REQUEUE GraceTime=20   # SIGTERM, and 20 s or more to leave
PartitionName=low0  PriorityTier=1   PreemptMode=REQUEUE GraceTime=0    # requeued on the spot
PartitionName=spot  PriorityTier=1   PreemptMode=CANCEL GraceTime=0     # killed on the spot
PartitionName=high  PriorityTier=100 PreemptMode=OFF
"""


class PrivateCluster:
    """Four nodes (``big1``, ``big2``: a100; ``small1``, ``small2``: v100) and their controller.

    Parameters
    ----------
    base
        Folder of all that the cluster writes; by default a new one below /tmp.

    Raises
    ------
    SlurmUnavailable
        From :meth:`start`.
    """

    def __init__(self, base: Path | None = None) -> None:
        # A short path without spaces: socket names are limited to 108 bytes, slurm.conf splits at spaces.
        self.base = base or Path(tempfile.mkdtemp(prefix="hpcr-slurm-", dir="/tmp"))
        self.work = self.base / "work"
        #: Of jobs that a test has submitted, for whoever cleans up after it.
        self.names: set[str] = set()
        self._queue: tuple[float, list[dict[str, str]]] | None = None
        self._queue_lock = threading.Lock()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def env(self) -> dict[str, str]:
        """Variables on top of ``os.environ`` with which Slurm's commands find this cluster."""
        env = {"SLURM_CONF": str(self.base / "etc/slurm.conf")}
        prefix = self.base / "prefix"
        if prefix.exists():
            libraries = library_folder(prefix)
            env["PATH"] = f"{prefix}/usr/bin:{prefix}/usr/sbin:{os.environ['PATH']}"
            paths = [str(libraries), str(plugin_folder(prefix)), os.environ.get("LD_LIBRARY_PATH", "")]
            env["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
        return env

    @property
    def environ(self) -> dict[str, str]:
        """All variables, without those of a Slurm job that the tests themselves may run in."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**kept, **self.env}

    # -- life ---------------------------------------------------------------------------------------------

    def start(self, *, owner: int | None = None) -> None:
        """Start the daemons and wait until all nodes are idle; a second try, should a port be taken.

        Parameters
        ----------
        owner
            A process after whose death the cluster stops by itself; by default this one; 0: none.
        """
        prefix = find_slurm()
        self.base.mkdir(exist_ok=True)
        link = self.base / "prefix"
        if prefix is not None and not link.is_symlink():
            link.symlink_to(prefix)
        for last in (False, True):
            self._write_configuration()
            if owner != 0:
                guard = [__file__, "guard", str(self.base), str(owner or os.getpid())]
                self._spawn("guard", sys.executable, *guard)
            self._spawn("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self._start_node(node)
            try:
                self.wait_for(self._all_idle, _START_TIMEOUT_S, "all nodes are idle")
            except (AssertionError, SlurmUnavailable) as error:
                self._kill(self._processes())
                if last:
                    raise SlurmUnavailable(f"Slurm does not start: {error}") from error
            else:
                return

    def stop(self) -> None:
        """Kill all that belongs to the cluster, jobs included, and remove its folder."""
        deadline = time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < deadline:
            self._kill(left)
        shutil.rmtree(self.base, ignore_errors=True)

    def kill_node(self, name: str) -> None:
        """Let a node die at once, like a power cut: slurmd, its step daemons and its tasks."""
        self._kill([pid for pid in self._processes() if self._node_of(pid) == name])

    def restore_node(self, name: str) -> None:
        """Let a dead node come back, and wait until Slurm uses it."""
        self._start_node(name)
        idle = ["sinfo", "-h", "-n", name, "-p", "main", "-o", "%t"]
        self.wait_for(lambda: self.run(*idle).strip() in {"idle", "mix", "alloc"}, 60, f"{name} is back")

    # -- use ----------------------------------------------------------------------------------------------

    def run(self, *words: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a command of this cluster in its ``work`` folder; its stdout (and stderr, if it may fail)."""
        done = subprocess.run(
            words, input=stdin or "", capture_output=True, text=True, timeout=180, check=False,
            cwd=self.work, env=self.environ,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def sbatch(self, script: str | Path, *args: str) -> str:
        """Submit a script, given as text or as a file; gives the job id."""
        if isinstance(script, Path):
            answer = self.run("sbatch", "--parsable", *args, str(script))
        else:
            answer = self.run("sbatch", "--parsable", *args, stdin=script)
        return answer.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; empty if there is no such job."""
        text = self.run("scontrol", "show", "job", "-o", job_id, check=False)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def state(self, job_id: str) -> str:
        """``JobState``, or ``"GONE"``."""
        return self.job(job_id).get("JobState", "GONE")

    def queue(self) -> list[dict[str, str]]:
        """All jobs and elements in the queue: ``id``, ``name``, ``state``, ``reason``.

        Threads that wait for runs of their own share one ``squeue``, which begins after all of them have asked.
        """
        asked = time.monotonic()
        with self._queue_lock:
            if self._queue is None or self._queue[0] < asked:
                time.sleep(0.2)  # others join
                began = time.monotonic()
                lines = self.run("squeue", "-h", "-r", "-o", "%i %j %T %r").splitlines()
                self._queue = (
                    began,
                    [
                        dict(zip(("id", "name", "state", "reason"), line.split(" ", 3), strict=True))
                        for line in lines
                    ],
                )
            return self._queue[1]

    def output(self, job_id: str) -> str:
        """What the job wrote, if its script does not say where to (array element: ``"9_1"``)."""
        try:
            return (self.work / f"slurm-{job_id}.out").read_text()
        except FileNotFoundError:
            return ""

    def cancel(self, *args: str) -> None:
        """``scancel ARGS``; without any, every job."""
        self.run("scancel", *(args or ["--user", str(os.getuid())]))

    def wait_for(self, predicate: Callable[[], object], timeout_s: float, why: str) -> None:
        """Wait until something is so.

        Raises
        ------
        AssertionError
            If it is not so in time; with the queue as it is.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            asked = time.monotonic()
            if predicate():
                return
            now = time.monotonic()
            if now > deadline:
                queue = self.run("squeue", "-o", "%i %T %r %M %R", check=False)
                raise AssertionError(f"not within {timeout_s:g} s: {why}; squeue: {queue.strip()!r}")
            # What looks into a file costs little; Slurm's commands would take the machine from the jobs.
            time.sleep(min(max(0.05, 4 * (now - asked)), 0.5))

    def wait_state(self, job_id: str, *states: str, timeout_s: float = 30) -> str:
        """Wait until a job is in one of these states; gives which."""
        self.wait_for(
            lambda: self.state(job_id) in states, timeout_s, f"job {job_id} is {' or '.join(states)}"
        )
        return self.state(job_id)

    # -- inside -------------------------------------------------------------------------------------------

    def _all_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                said = (self.base / "log" / f"{name}.out").read_text(errors="replace").splitlines()
                raise SlurmUnavailable(f"{name} ended with {daemon.returncode}: {(said or ['silently'])[-1]}")
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False)
        return sorted(states.splitlines()) == [f"{node} idle" for node in sorted(NODES)]

    def _write_configuration(self) -> None:
        shutil.rmtree(self.base / "state", ignore_errors=True)
        for folder in ("etc", "run", "log", "state", "work", "dev", *(f"spool/{node}" for node in NODES)):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(2 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"Feature={gpu} Gres=gpu:{gpu}:{_GPUS[gpu]}"
            for (name, gpu), port in zip(NODES.items(), ports[2:], strict=True)
        )
        prefix = self.base / "prefix"
        text = _SLURM_CONF.format(
            host=host, user=_user(), ports=ports, base=self.base, nodes=nodes,
            plugins=f"PluginDir={plugin_folder(prefix)}" if prefix.exists() else "",
        )  # fmt: skip
        # A GPU must be a device file: a link to one, which everyone has, will do.
        for number in range(max(_GPUS.values())):
            with contextlib.suppress(FileExistsError):
                (self.base / f"dev/gpu{number}").symlink_to("/dev/null")
        gres = "".join(
            f"NodeName={name} Name=gpu Type={gpu} File={self.base}/dev/gpu[0-{_GPUS[gpu] - 1}]\n"
            for name, gpu in NODES.items()
        )
        (self.base / "etc/slurm.conf").write_text(text)
        (self.base / "etc/gres.conf").write_text(gres)
        (self.base / "etc/plugstack.conf").write_text("")

    def _start_node(self, name: str) -> None:
        # -d: the path that is built in is the installed one
        stepd = shutil.which("slurmstepd", path=self.environ["PATH"])
        self._spawn(name, "slurmd", "-D", "-N", name, *(["-d", stepd] if stepd else []))

    def _spawn(self, name: str, *words: str) -> None:
        """Start a daemon that holds nothing of ours: a pipe that it inherits keeps its reader for ever."""
        program = shutil.which(words[0], path=search_path(self.environ["PATH"]))
        if program is None:
            raise SlurmUnavailable(f"there is no {words[0]} beside slurmctld")
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *words[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
                env=self.environ, start_new_session=True,
            )  # fmt: skip

    def _processes(self) -> list[int]:
        """Process ids of daemons and jobs: told by this cluster's SLURM_CONF, whoever their parent is now."""
        ours = f"SLURM_CONF={self.base}/etc/slurm.conf".encode()
        found = []
        for pid, environ in _all_environs():
            if ours not in environ or pid == os.getpid():
                continue
            in_job = any(entry.startswith(b"SLURM_JOB_ID=") for entry in environ)
            if in_job or _name(pid).startswith("slurm") or b"guard" in _words(pid):
                found.append(pid)
        return found

    def _node_of(self, pid: int) -> str | None:
        """Which node a process belongs to."""
        with contextlib.suppress(OSError):
            words = _words(pid)
            if b"-N" in words:  # slurmd
                return words[words.index(b"-N") + 1].decode()
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"SLURMD_NODENAME="):  # a task
                    return entry.partition(b"=")[2].decode()
            for fd in Path(f"/proc/{pid}/fd").iterdir():  # slurmstepd: the log that it has open
                target = fd.readlink()
                if target.parent == self.base / "log":
                    return target.stem
        return None

    def _kill(self, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        for daemon in self._daemons.values():
            daemon.poll()  # lest it stays as a zombie


def _all_environs() -> Iterator[tuple[int, list[bytes]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            yield int(folder.name), (folder / "environ").read_bytes().split(b"\0")


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _words(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container that runs as a number
        return str(os.getuid())


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives out by itself."""
    chosen: list[int] = []
    candidates = random.sample(range(10_000, 32_000), 2_000)
    for port in candidates:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise SlurmUnavailable("no free ports")


# -- command line -----------------------------------------------------------------------------------------


def _guard(base: Path, owner: int) -> None:
    """Stop the cluster once its owner has died without doing so."""
    while base.exists():
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            PrivateCluster(base).stop()
        time.sleep(1)


def main(arguments: list[str], environ: Mapping[str, str] = os.environ) -> int:
    """``start``, ``env`` or ``stop``; the cluster lies in $HPC_RESUME_CLUSTER or a folder of the user's."""
    if arguments[:1] == ["guard"]:
        _guard(Path(arguments[1]), int(arguments[2]))
        return 0
    base = Path(environ.get("HPC_RESUME_CLUSTER") or f"/tmp/hpcr-slurm-of-{os.getuid()}")
    cluster = PrivateCluster(base)
    if arguments == ["start"]:
        if (base / "etc/slurm.conf").exists():
            print(f"{base}: is there already; stop it first", file=sys.stderr)
            return 1
        cluster.start(owner=0)
        print(f'eval "$({sys.executable} {__file__} env)"')
    elif arguments == ["env"]:
        print("\n".join(f"export {name}='{value}'" for name, value in cluster.env.items()))
    elif arguments == ["stop"]:
        cluster.stop()
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
