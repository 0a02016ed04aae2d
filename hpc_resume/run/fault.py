"""What went wrong on which rank: as it says itself, or as a rank on its node sees that it has died.

A rank that fails says why in the control store, before its peers find out by a broken connection. One that was
killed says nothing; but the ranks on its node can see that its process is gone, and ask the kernel whether it
was killed for want of memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import DistError

from hpc_resume.errors import (
    EXIT_CONTINUE,
    EXIT_CORRUPT,
    EXIT_DONE,
    EXIT_NOTHING,
    EXIT_USAGE,
    BudgetSpent,
    FencedError,
    HpcResumeError,
    IntegrityError,
    RendezvousError,
    SaveError,
)
from hpc_resume.files import DISK, JsonObject, may_pass, obstacle
from hpc_resume.run.history import FAULT
from hpc_resume.run.memory import OomKills
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.scheduler.local import process_ticks

#: How collectives complain when a peer is gone; gloo raises a plain RuntimeError.
_PEER_IS_GONE = re.compile(r"gloo|NCCL|Connection (closed|reset)")
_TIMED_OUT = re.compile(r"[Tt]imed? ?out")
#: The GPU is broken, whatever the script does. Source: cudaGetErrorString of the errors that say so.
_BROKEN_DEVICE = re.compile(
    r"no CUDA-capable device|busy or unavailable|uncorrectable (ECC|NVLink) error|hardware stack error|"
    r"CUDA.*initialization error|system not yet initialized"
)
_KILLED_WORKER = re.compile(r"DataLoader worker .* killed by signal: Killed")
#: Of errors that say that a person has to decide, or to mend something, before the run may go on.
_REFUSALS = frozenset({EXIT_USAGE, EXIT_NOTHING, EXIT_CORRUPT})
#: Key in the control store of what a rank says that has failed.
_KEY = "fault"
#: A rank that crashes by itself tells why within this, and one that was killed is gone by then.
_CAUSE_S = 2.0
_LOOK_S = 0.05
#: Ranks tell where they are once all have met; what keeps one from it now is no import.
_MEET_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why an attempt fails.

    Parameters
    ----------
    cause
        What it is.
    evidence
        Which rank, and what it said or what was seen of it.
    nodes
        Where it was, if that may have to do with it.
    mistake
        An exception of the script's own before the first step.
    exit_code
        Of an error of ours that no further attempt would mend.
    fenced
        A later attempt owns the run, and goes on.
    """

    cause: Cause
    evidence: str
    nodes: tuple[str, ...] = ()
    mistake: bool = False
    exit_code: int | None = None
    fenced: bool = False

    @property
    def verdict(self) -> Verdict:
        """The same as the scheduler's side says it."""
        return Verdict(cause=self.cause, evidence=self.evidence, nodes=self.nodes)

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {**dataclasses.asdict(self), "cause": self.cause.value, "nodes": list(self.nodes)}

    @classmethod
    def from_json(cls, record: JsonObject) -> Fault:
        """Read :meth:`to_json`."""
        return cls(**{**record, "cause": Cause(record["cause"]), "nodes": tuple(record["nodes"])})


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone, or silent."""
    if isinstance(error, HpcResumeError):
        return isinstance(error, RendezvousError)
    return isinstance(error, DistError) or _PEER_IS_GONE.search(str(error)) is not None


def before_the_start(error: BaseException, node: str) -> Verdict | None:
    """Tell what kept ranks from meeting, if it may be gone another time or elsewhere."""
    if may_pass(error):
        return Verdict(cause=Cause.CRASH, evidence=summary(error))
    if not isinstance(error, Exception):
        return None
    if lost_a_peer(error):
        return Verdict(cause=Cause.HANG, evidence=f"the ranks did not meet: {error}")
    broken = _BROKEN_DEVICE.search(str(error)) is not None
    return Verdict(cause=Cause.CRASH, evidence=summary(error), nodes=(node,)) if broken else None


def summary(error: BaseException) -> str:
    """Put an exception in a line."""
    if isinstance(error, HpcResumeError):
        return str(error)
    return traceback.format_exception_only(type(error), error)[-1].strip()


class Faults:
    """One rank's knowledge of what went wrong.

    Parameters
    ----------
    environment
        This process's place.
    peers
        The other ranks.
    folder
        Of the attempt.
    oom_kills
        This process's counts at the start of the attempt.
    kills_since, monotonic, pause
        Counts again, gives seconds since some moment, and sleeps; for tests.
    """

    def __init__(
        self,
        environment: JobEnvironment,
        peers: Peers,
        folder: Path,
        oom_kills: OomKills,
        *,
        kills_since: Callable[[OomKills], int | None] = OomKills.since,
        monotonic: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._environment = environment
        self._peers = peers
        self._folder = folder
        self._oom_kills = oom_kills
        self._kills_since = kills_since
        self._monotonic = monotonic
        self._pause = pause
        self._neighbours: dict[int, tuple[int, int, OomKills | None]] = {}

    def meet(self) -> dict[str, list[int]] | None:
        """Tell all ranks where this one is; on rank 0, returns the ranks by node."""
        pid = os.getpid()
        # In different PID namespaces, as some containers have, numbers mean different processes.
        space = Path("/proc/self/ns/pid").stat().st_ino
        own = [self._environment.node, space, pid, process_ticks(pid), self._oom_kills.to_json()]
        places = self._peers.gather("where", own, patience_s=_MEET_S)
        places = self._peers.share("everywhere", places, patience_s=_MEET_S)
        self._neighbours = {
            rank: (place[2], place[3], OomKills.from_json(place[4]))
            for rank, place in enumerate(places)
            if place[:2] == own[:2] and rank != self._environment.rank
        }
        if self._environment.rank != 0:
            return None
        nodes: dict[str, list[int]] = {}
        for rank, (node, *_) in enumerate(places):
            nodes.setdefault(node, []).append(rank)
        return nodes

    def of(self, error: Exception, *, begun: bool) -> Fault:
        """Tell why an exception has left the run, and the other ranks if it is this rank's own.

        Parameters
        ----------
        error
            What was raised.
        begun
            Whether this attempt had completed a step.
        """
        if not lost_a_peer(error):
            return self.tell(self._own(error, begun=begun))
        found = self.find()
        seen = f"rank {self._environment.rank}: {summary(error)}"
        if found is not None:
            return dataclasses.replace(found, evidence=f"{found.evidence}; {seen}")
        if _TIMED_OUT.search(str(error)):
            return Fault(cause=Cause.HANG, evidence=f"{seen}; no rank has failed, as far as can be seen")
        return Fault(cause=Cause.UNKNOWN, evidence=f"{seen}; no rank has said why")

    def find(self, peers: Peers | None = None) -> Fault | None:
        """Wait a little for what a rank says, or for one on this node to be seen dead.

        Parameters
        ----------
        peers
            Another connection, for another thread.
        """
        peers = peers or self._peers
        until = self._monotonic() + _CAUSE_S
        while (found := self._look(peers)) is None and self._monotonic() <= until:
            self._pause(_LOOK_S)
        return found

    def any_known(self) -> bool:
        """Whether a rank has said that it failed, or one on this node is seen dead; then the others are told."""
        return self._look(self._peers) is not None

    def _look(self, peers: Peers) -> Fault | None:
        if (told := self._told(peers)) is not None:
            return told
        dead = self._dead(peers)
        return None if dead is None else self.tell(dead, peers)

    def behind(self, verdict: Verdict, reason: str, *, no_hang: bool) -> Verdict:
        """Tell why a run could not be stopped in order; on a thread of its own.

        Parameters
        ----------
        verdict
            Why the run was to stop.
        reason
            Of the watchdog.
        no_hang
            The step boundary came, or had come too late for a save: that is no hang of the training.
        """
        evidence = f"{reason}; asked to stop by {verdict.evidence}"
        if no_hang or verdict.cause in {Cause.CANCEL, Cause.NODE_FAILURE, Cause.OUT_OF_MEMORY}:
            return dataclasses.replace(verdict, evidence=evidence)
        with contextlib.suppress(RuntimeError):  # the other threads wait on the connection that there is
            if (found := self.find(self._peers.apart())) is not None:
                evidence = f"{found.evidence}; {evidence}"
                return dataclasses.replace(verdict, cause=found.cause, nodes=found.nodes, evidence=evidence)
        return dataclasses.replace(verdict, cause=Cause.HANG, evidence=evidence)

    def tell(self, fault: Fault, peers: Peers | None = None) -> Fault:
        """Tell all ranks, unless another one was faster, and whoever reads the run directory; gives what holds."""
        with contextlib.suppress(RendezvousError):
            fault = Fault.from_json((peers or self._peers).settle(_KEY, fault.to_json()))
        with contextlib.suppress(OSError):
            DISK.write_file(self._folder / FAULT, json.dumps(fault.to_json()).encode())
        return fault

    def exits(self, code: object, *, begun: bool) -> None:
        """Tell the other ranks, who may wait for this one, that the script has ended it by ``sys.exit``.

        Parameters
        ----------
        code
            What it was called with; without an error, and where the run is to go on, there is nothing to tell.
        begun
            Whether this attempt had completed a step.
        """
        if code is None or (isinstance(code, int) and code in {EXIT_DONE, EXIT_CONTINUE}):
            return
        place = f"rank {self._environment.rank} on {self._environment.node}"
        evidence = f"{place}: the script called sys.exit({code!r:.200})"
        self.tell(Fault(cause=Cause.CRASH, evidence=evidence, mistake=not begun))
        self.leave()

    def leave(self) -> None:
        """Say that this rank leaves by itself: it is not dead when its process is gone.

        Rank 0 keeps the store, and gives the others the time to read there what happened.
        """
        with contextlib.suppress(RuntimeError):
            self._peers.store.set(f"leaving/{self._environment.rank}", "1")
            self._peers.store.add("crashed", 1)
            if self._environment.rank == 0:
                self._peers.wait_for_count("crashed", self._environment.world_size, _CAUSE_S)

    def _own(self, error: Exception, *, begun: bool) -> Fault:
        """Judge an exception of this rank's own."""
        place = f"rank {self._environment.rank} on {self._environment.node}"
        evidence = f"{place}: {summary(error)}"
        if isinstance(error, IntegrityError) and (hindered := obstacle(error)) is not None:
            if isinstance(hindered, MemoryError):
                return Fault(cause=Cause.OUT_OF_MEMORY, evidence=evidence)
            return Fault(cause=Cause.CRASH, evidence=evidence, nodes=(self._environment.node,))
        if isinstance(error, HpcResumeError):
            cause = Cause.REFUSED if error.exit_code in _REFUSALS else Cause.CRASH
            cause = Cause.NO_PROGRESS if isinstance(error, BudgetSpent) else cause
            final = None if isinstance(error, SaveError) else error.exit_code
            fenced = isinstance(error, FencedError)
            return Fault(cause=cause, evidence=evidence, exit_code=final, fenced=fenced)
        if _out_of_memory(error):
            return Fault(cause=Cause.OUT_OF_MEMORY, evidence=evidence)
        if may_pass(error):
            return Fault(cause=Cause.CRASH, evidence=evidence)
        if _KILLED_WORKER.search(str(error)) and (kills := self._killed(self._oom_kills)):
            return Fault(cause=Cause.OUT_OF_MEMORY, evidence=f"{evidence}; {kills}")
        broken = _BROKEN_DEVICE.search(str(error)) is not None
        return Fault(
            cause=Cause.CRASH,
            evidence=evidence,
            nodes=(self._environment.node,),
            mistake=not begun and not broken,
        )

    def _told(self, peers: Peers) -> Fault | None:
        """Read what a rank says; where the store is gone with rank 0, what stands in the run directory."""
        with contextlib.suppress(RuntimeError):
            return Fault.from_json(json.loads(peers.store.get(_KEY))) if peers.store.check([_KEY]) else None
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            return Fault.from_json(json.loads((self._folder / FAULT).read_bytes()))
        return None

    def _dead(self, peers: Peers) -> Fault | None:
        """Look whether a process of another rank on this node is gone without a word."""
        for rank, (pid, ticks, oom_kills) in self._neighbours.items():
            if process_ticks(pid) == ticks or _is_leaving(peers, rank):
                continue
            node = self._environment.node
            evidence = f"rank {rank} on {node}: its process ({pid}) is gone, and it has said nothing"
            if kills := self._killed(oom_kills):
                return Fault(cause=Cause.OUT_OF_MEMORY, evidence=f"{evidence}; {kills}")
            return Fault(cause=Cause.CRASH, evidence=evidence, nodes=(node,))
        return None

    def _killed(self, oom_kills: OomKills | None) -> str:
        """Tell of kills for want of memory where a rank ran, since the attempt began."""
        kills = None if oom_kills is None else self._kills_since(oom_kills)
        if kills is None or kills <= 0:
            return ""
        return f"the kernel killed {kills} process{'' if kills == 1 else 'es'} there for want of memory meanwhile"


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, is PyTorch's or Python's for want of memory."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        error, seen = error.__cause__, seen + 1
    return False


def _is_leaving(peers: Peers, rank: int) -> bool:
    try:
        return bool(peers.store.check([f"leaving/{rank}"]))
    except RuntimeError:
        return False
