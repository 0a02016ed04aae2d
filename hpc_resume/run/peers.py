"""The ranks of one attempt find each other: one store for control, one process group for training.

Rank 0 opens a store on a port that the system chooses and leaves its address in the run directory, under a
name that no other set of processes has. Nothing is derived from a job id, so nothing collides after a
requeue, and no stale rendezvous can be met. Under torchrun its own store serves.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_resume.errors import HpcResumeError, RendezvousError
from hpc_resume.files import DISK, Clock, JsonObject, may_pass
from hpc_resume.run.addresses import own_addresses
from hpc_resume.scheduler.environment import JobEnvironment

#: Ranks that wait for each other before the first step look so often whether one has failed. One that keeps the
#: store stays for two seconds then.
_LOOK_S = 1.0
#: Until all ranks must have found rank 0. Imports on a busy parallel filesystem take minutes.
JOIN_S = 600.0
_POLL_S = 0.2


class Peers:
    """The control store, and the facts that rank 0 shares through it.

    Parameters
    ----------
    environment
        This process's place.
    address
        Host and port of the store; None for a single process.
    store
        This process's first connection.
    owned
        Whether this attempt opened the store (then its keys are its own).
    """

    def __init__(
        self, environment: JobEnvironment, store: dist.Store, address: tuple[str, int] | None, prefix: str
    ) -> None:
        self._environment = environment
        self._base = store
        self._address = address
        self._prefix = prefix
        self.store: dist.Store = dist.PrefixStore(prefix, store)
        self._twin: Peers | None = None
        #: Tells whether a rank has failed: then nobody waits any longer. None where there are steps, whose
        #: collectives show it.
        self.failed: Callable[[], bool] | None = None

    def connect(self) -> dist.Store:
        """Open another connection: a store that waits is deaf to other threads."""
        if self._address is None:
            return dist.PrefixStore(self._prefix, self._base)
        host, port = self._address
        store = dist.TCPStore(host, port, is_master=False, timeout=dt.timedelta(seconds=JOIN_S))
        return dist.PrefixStore(self._prefix, store)

    def apart(self) -> Peers:
        """Return the same through a second connection, for other threads: one on which nobody may wait."""
        if self._twin is None:
            self._twin = Peers(self._environment, self._base, self._address, self._prefix)
            self._twin.store = self.connect()
        return self._twin

    def share(self, key: str, value: Any = None, *, patience_s: float = JOIN_S) -> Any:
        """Give everybody what rank 0 has; other ranks pass nothing and wait."""
        if self._environment.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        return self.get(key, patience_s)

    def get(self, key: str, patience_s: float) -> Any:
        """Wait for a key and read it.

        Raises
        ------
        RendezvousError
            If it does not come, or the store is gone; or, before the first step, a rank has failed.
        """
        try:
            self._wait(key, patience_s)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise RendezvousError(
                f"rank {self._environment.rank} waited for {key!r} from the other ranks in vain "
                f"({str(error).splitlines()[0]}); look at the other ranks' logs"
            ) from error

    def _wait(self, key: str, patience_s: float) -> None:
        until_s = time.monotonic() + patience_s
        while self.failed is not None and until_s - time.monotonic() > _LOOK_S:
            try:
                self.store.wait([key], dt.timedelta(seconds=_LOOK_S))
            except RuntimeError as error:
                if "timeout" not in str(error).lower():
                    raise
                self.check()
            else:
                return
        left_s = patience_s if self.failed is None else max(until_s - time.monotonic(), 0.001)
        self.store.wait([key], dt.timedelta(seconds=left_s))

    def check(self) -> None:
        """Find out whether a rank has failed.

        Raises
        ------
        RendezvousError
            If one has.
        """
        if self.failed is not None and self.failed():
            raise RendezvousError(
                f"rank {self._environment.rank} does not wait: another rank has failed; look at the other ranks' logs"
            )

    def reachable(self) -> bool:
        """Whether the store answers; if not, it is gone with rank 0."""
        try:
            self.store.check(["reachable"])
        except RuntimeError:
            return False
        return True

    def settle(self, key: str, value: Any) -> Any:
        """Give a key a value unless it has one; returns what it has.

        Raises
        ------
        RendezvousError
            If the store is gone.
        """
        try:
            return json.loads(self.store.compare_set(key, "", json.dumps(value)))
        except RuntimeError as error:
            raise RendezvousError(f"the control store is gone, and rank 0 with it: {error}") from error

    def gather(self, key: str, value: Any, *, patience_s: float) -> list[Any] | None:
        """Give rank 0 what everybody has, by rank; other ranks do not wait and get None."""
        if self._environment.rank != 0:
            self.store.set(f"{key}/{self._environment.rank}", json.dumps(value))
            return None
        others = range(1, self._environment.world_size)
        return [value, *(self.get(f"{key}/{rank}", patience_s) for rank in others)]

    def wait_for_count(self, key: str, count: int, patience_s: float) -> bool:
        """Wait until a counter has reached a number; False if it does not in time."""
        deadline = time.monotonic() + patience_s
        while self.store.add(key, 0) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def all_come(self, key: str) -> None:
        """Wait until all ranks have come here.

        Raises
        ------
        RendezvousError
            As of :meth:`get`.
        """
        if self.store.add(f"{key}/count", 1) == self._environment.world_size:
            self.store.set(key, "true")
        self.get(key, JOIN_S)

    def start_process_group(self) -> bool:
        """Make the default process group, unless the script has one.

        Returns
        -------
        bool
            Whether it was made here.

        Raises
        ------
        RendezvousError
            If a rank does not come to it.
        """
        if dist.is_initialized():
            return False
        # PyTorch waits up to half an hour for a rank that has failed, and does not look whether one has.
        self.all_come("group/ready")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self.store),
            rank=self._environment.rank,
            world_size=self._environment.world_size,
        )
        return True


def join(
    environment: JobEnvironment,
    run_dir: Path,
    begin: Callable[[], Any],
    *,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Peers, Any]:
    """Meet the other ranks.

    Parameters
    ----------
    environment
        This process's place.
    run_dir
        The run directory; ranks other than 0 wait until rank 0 has left its address there.
    begin
        Called on rank 0 alone, before the others hear of it; its JSON result is shared.
    clock, sleep
        For tests.

    Returns
    -------
    (Peers, Any)
        The peers, and what ``begin`` returned on rank 0.

    Raises
    ------
    RendezvousError
        If rank 0 can't be found or reached, or could not begin for a reason that may pass.
    HpcResumeError
        On the other ranks, if rank 0 could not begin for another one.
    """
    leader = environment.rank == 0
    if environment.world_size == 1:
        peers = Peers(environment, dist.HashStore(), None, "hpc-resume")
        return peers, begin()
    if environment.master is not None:
        store, address = _launcher_store(environment)
        peers = Peers(environment, store, address, f"hpc-resume/{environment.rendezvous}")
        if not leader:
            return peers, _begun(peers.share("begin"))
        shared = _begin(begin, environment, lambda word: peers.share("begin", word))
        peers.share("begin", {"begun": shared})
        return peers, shared
    meeting = run_dir / "attempts" / f".meet-{re.sub(r'[^A-Za-z0-9._-]', '_', environment.rendezvous)}.json"
    if leader:

        def tell(word: JsonObject) -> None:
            # submitit's own local executor does not number restarts, so the next one would read it, too.
            if environment.kind != "submitit-local":
                DISK.write_file(meeting, json.dumps(word).encode())

        shared = _begin(begin, environment, tell)
        opened = dist.TCPStore(
            "0.0.0.0",  # noqa: S104 - the other nodes must reach it
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=dt.timedelta(seconds=JOIN_S),
        )
        token = uuid.uuid4().hex
        opened.set("token", token)
        hosts = own_addresses(one_node=environment.local_world_size == environment.world_size)
        invitation = {"hosts": hosts, "port": opened.port, "token": token}
        DISK.write_file(meeting, json.dumps(invitation).encode())
        peers = Peers(environment, opened, ("127.0.0.1", opened.port), "hpc-resume")
        peers.share("begin", shared)
        peers.all_come("all-joined")
        meeting.unlink(missing_ok=True)
        return peers, shared
    opened, address = _accept(meeting, environment, clock, sleep)
    peers = Peers(environment, opened, address, "hpc-resume")
    shared = peers.share("begin")
    peers.all_come("all-joined")
    return peers, shared


def _begin(begin: Callable[[], Any], environment: JobEnvironment, tell: Callable[[JsonObject], Any]) -> Any:
    """On rank 0: begin, and have the others know if that fails, who would wait for it."""
    try:
        return begin()
    except Exception as error:
        with contextlib.suppress(OSError, RuntimeError):
            tell({"failed": f"rank 0 on {environment.node}: {error}", "passing": may_pass(error)})
        raise


def _begun(word: JsonObject) -> Any:
    """On the other ranks: take what rank 0 says of its beginning."""
    if "failed" not in word:
        return word["begun"]
    why = f"the run could not begin: {word['failed']}"
    raise RendezvousError(why) if word["passing"] else HpcResumeError(why)


def _launcher_store(environment: JobEnvironment) -> tuple[dist.Store, tuple[str, int]]:
    """Return torchrun's store; where torchrun leaves it to rank 0 to open one, rank 0 does."""
    assert environment.master is not None
    host, port = environment.master
    agent_keeps_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        host,
        port,
        environment.world_size,
        is_master=environment.rank == 0 and not agent_keeps_it,
        wait_for_workers=False,
        timeout=dt.timedelta(seconds=JOIN_S),
        multi_tenant=True,
    )
    return store, (host, port)


def _accept(
    meeting: Path, environment: JobEnvironment, clock: Clock, sleep: Callable[[float], None]
) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Find rank 0's invitation and connect."""
    deadline = clock() + JOIN_S
    problem = "rank 0 has left no address there"
    while clock() < deadline:
        invitation = _invitation(meeting)
        if invitation is not None:
            _begun({"begun": None, **invitation})
            for host in invitation["hosts"]:
                store = _try_connect(host, invitation["port"], invitation["token"])
                if store is not None:
                    return store, (host, invitation["port"])
            problem = f"none of {invitation['hosts']} answers on port {invitation['port']}"
        sleep(_POLL_S)
    raise RendezvousError(
        f"rank {environment.rank} on {environment.node} found no rank 0 within {JOIN_S:g} s: {meeting}: "
        f"{problem}. Is the run directory on a filesystem that all nodes share?"
    )


def _invitation(meeting: Path) -> JsonObject | None:
    """Read what rank 0 has left; None if that is not there yet."""
    try:
        # Listing the folder makes a network filesystem look again; asking for the name alone may be answered
        # from a cache that remembers that it was not there.
        if meeting.name in os.listdir(meeting.parent):  # noqa: PTH208 - as said
            return json.loads(meeting.read_bytes())  # type: ignore[no-any-return]
    except (OSError, ValueError):
        pass
    return None


def _try_connect(host: str, port: int, token: str) -> dist.TCPStore | None:
    try:
        with socket.create_connection((host, port), timeout=5):
            pass  # before TCPStore, which would retry a dead address for minutes
        store = dist.TCPStore(host, port, is_master=False, timeout=dt.timedelta(seconds=JOIN_S))
        if store.check(["token"]) and store.get("token").decode() == token:
            return store
    except (OSError, RuntimeError):
        pass
    return None
