"""What becomes of a checkpoint that the ranks have begun: who commits it, and who stands in for the dead.

Each checkpoint has one key in the control store that is written once: whoever says first what has become of it
decides for all ranks. Nothing hangs on the store, though: it may be gone with rank 0, and the receipts in the
staging folder say the same.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hpc_resume.checkpoint.health import Known
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera, Captured
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.standin import keepers, substitute
from hpc_resume.errors import HpcResumeError, IntegrityError, RendezvousError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.policy.saving import patience_s
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.environment import JobEnvironment

#: Other ranks may at least take so long over a checkpoint that is written while training goes on: whether one of
#: another node is dead, nobody may know.
_BACKGROUND_S = 600.0
#: A rank that waits looks at what is there so many times until others count as dead, and then less and less.
_LOOKS = 6


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


@dataclass(slots=True)
class Part:
    """What this rank has to do with a checkpoint that is not known to be committed.

    Parameters
    ----------
    number
        Of the save in this attempt: a step that failed may be saved once more.
    details
        For the journal.
    writing
        The thread's work, if it is written in the background.
    header, captured
        What to write for others, as long as training stands still.
    began_s, at_s
        When it began, by the monotonic clock and in Unix time.
    own_s, done_s
        What writing took, and when it ended by the monotonic clock.
    known
        What is known of the state before it is written.
    """

    number: int
    details: dict[str, Any]
    writing: Future[None] | None = None
    header: Header | None = None
    captured: Captured | None = None
    began_s: float = 0.0
    at_s: float = 0.0
    own_s: float = 0.0
    done_s: float = 0.0
    known: Known = field(default_factory=Known)


class Outcomes:
    """One rank's part in deciding what becomes of checkpoints.

    Parameters
    ----------
    peers
        The other ranks.
    own
        The same through a connection on which nobody waits: a store that waits is deaf to other threads.
    staging
        This rank's hold on the checkpoints.
    environment
        This process's place.
    dead_after_s
        A rank whose receipt comes so long after ours counts as dead.
    threads
        That write in a dead rank's stead.
    failed
        Whether a rank is known to have failed.
    monotonic, pause
        Seconds since some moment; sleeps.
    """

    def __init__(
        self,
        peers: Peers,
        own: Peers,
        staging: Staging,
        environment: JobEnvironment,
        *,
        dead_after_s: float,
        threads: int = 2,
        failed: Callable[[], bool] = lambda: False,
        monotonic: Clock = time.monotonic,
        pause: Callable[[float], None] = _pause,
    ) -> None:
        self._peers = peers
        self._own = own
        self._staging = staging
        self._environment = environment
        self._dead_after_s = dead_after_s
        self._threads = threads
        self._failed = failed
        self._monotonic = monotonic
        self._pause = pause

    def count_in(self, step: int, part: Part) -> None:
        """Say that this rank's receipt is there; the last one commits. On the writing thread.

        Raises
        ------
        OSError, IntegrityError, FencedError
            If it can't be committed.
        """
        try:
            last = self._own.store.add(f"receipts/{part.number}", 1) == self._environment.world_size
        except RuntimeError:
            return  # the store is gone with rank 0; the receipt says it, too
        if last:
            self._commit(step, part, self._own)

    def fail(self, part: Part, error: Exception) -> None:
        """Say that this rank could not do its part. On the writing thread."""
        self._say(part, {"error": self._message(error)}, self._own)

    def _message(self, error: Exception) -> str:
        kind = "" if isinstance(error, OSError | HpcResumeError) else f"{type(error).__name__}: "
        return f"rank {self._environment.rank} on {self._environment.node}: {kind}{error}"

    def known(self, part: Part) -> bool:
        """Whether it is decided what has become of a checkpoint."""
        return bool(self._peers.store.check([_key(part)]))

    def wait(self, step: int, part: Part, *, left_s: float | None = None, last: bool = False) -> JsonObject:
        """Wait for what becomes of a checkpoint; finishes it in the place of ranks that have died.

        Parameters
        ----------
        step, part
            The checkpoint, and this rank's part of it.
        left_s
            Seconds until the job is killed, if that is known.
        last
            This rank is about to leave: it waits no longer than others may well need.

        Returns
        -------
        dict
            ``{"name": …, "took_s": …}`` if it is committed, ``{"error": …}`` if it is not; with
            ``"health"`` (:meth:`.Health.brief`) if anything was looked at.

        Raises
        ------
        FencedError
            If a later attempt owns the run.
        RendezvousError
            If rank 0 is gone, or any rank has failed, and the checkpoint can't be finished; unless this rank is
            about to leave anyway, as ``last`` says.
        """
        began = self._monotonic()
        patience = (
            patience_s(part.own_s, left_s) if last else max(patience_s(part.own_s, None), _BACKGROUND_S)
        )
        dead_after = max(self._dead_after_s, part.own_s)
        look_s = dead_after / _LOOKS
        missing = [self._environment.rank]  # as long as nobody has looked
        while True:
            outcome = self._look(part, look_s, hurry=not last and bool(missing))
            if outcome is not None:
                return outcome
            try:
                missing, outcome = self._finish(step, part, dead_after)
            except (OSError, IntegrityError) as error:
                outcome = self._say(part, {"error": self._message(error)}, self._peers)
            if outcome is not None:
                return outcome
            if missing and (not last or part.captured is None) and (why := self._in_vain()):
                why = f"{why}, and the shards of ranks {_some(missing)} of step {step} have not come"
                if not last:
                    raise RendezvousError(why)
                return self._say(part, {"error": why}, self._peers)
            if self._monotonic() - began > patience:
                return self._say(part, {"error": _lacking(missing, patience)}, self._peers)
            if self._monotonic() - part.done_s > dead_after:
                look_s = min(2 * look_s, dead_after)

    def _in_vain(self) -> str:
        """Tell why nobody will finish a checkpoint; collectives would tell, but there are none while this waits."""
        if not self._peers.reachable():
            return "rank 0 is gone"
        return "a rank has failed" if self._failed() else ""

    def _finish(self, step: int, part: Part, dead_after: float) -> tuple[list[int], JsonObject | None]:
        """Do what can be done for a checkpoint by now; returns which ranks' shards are missing."""
        late_s = self._monotonic() - part.done_s
        missing = self._staging.missing(step)
        if missing and late_s > dead_after:
            self._stand_in(part, missing, turn=int(late_s / dead_after) - 1)
            missing = self._staging.missing(step)
        if missing:
            return missing, None
        return missing, self._commit(step, part, self._peers, take_over=late_s > dead_after)

    def _look(self, part: Part, look_s: float, *, hurry: bool) -> JsonObject | None:
        """Wait a little for somebody's word; in a hurry not for one that can't come."""
        began = self._monotonic()
        try:
            outcome: JsonObject = self._peers.get(_key(part), look_s)
        except RendezvousError:  # not yet; or the store is gone, and then this comes at once
            if not hurry or self._peers.reachable():
                self._pause(max(look_s - (self._monotonic() - began), 0.0))
            return None
        return outcome

    def _commit(self, step: int, part: Part, peers: Peers, *, take_over: bool = False) -> JsonObject | None:
        """Commit; None if another rank is just doing it."""
        name = self._staging.commit(step, take_over=take_over)
        if name is None:
            return None
        took_s = round(self._monotonic() - part.began_s, 4)
        found = self._staging.health(name).brief()
        health = {"health": found} if found else {}
        return self._say(part, {"name": name, "took_s": took_s, **health}, peers)

    def _say(self, part: Part, outcome: JsonObject, peers: Peers) -> JsonObject:
        """Say what has become of a checkpoint, unless somebody has said so before; returns what holds."""
        try:
            standing: JsonObject = peers.settle(_key(part), outcome)
        except RendezvousError:
            return outcome  # the store is gone with rank 0
        return standing

    def _stand_in(self, part: Part, missing: list[int], *, turn: int) -> None:
        """Write the shards of dead ranks, as far as this rank holds what they had and it is its turn.

        Of those that could, the lowest one does it at once; another one if that has not helped.
        """
        if part.captured is None or part.header is None:
            return  # the live state has moved on
        own_rank = self._environment.rank
        for rank in missing:
            able = sorted(keepers(part.captured.structure, rank, part.header.world_size) - set(missing))
            if own_rank not in able[: turn + 1]:
                continue
            other = substitute(part.captured, rank, own_rank=own_rank)
            if other is not None:
                snapshot = Camera(threads=self._threads).take(other, stage=False)
                # What the probe gave on the dead rank, nobody knows.
                known = dataclasses.replace(part.known, probed=None)
                self._staging.write(part.header, snapshot, rank=rank, known=known)


def _key(part: Part) -> str:
    return f"committed/{part.number}"


def _lacking(missing: list[int], patience: float) -> str:
    if not missing:
        return f"all shards are there, but nobody has committed them within {patience:.0f} s"
    return (
        f"the shards of ranks {_some(missing)} did not come within {patience:.0f} s, and no other rank holds what was in "
        "them; those that are there are kept"
    )


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + ("" if len(ranks) <= 8 else f" and {len(ranks) - 8} more")
