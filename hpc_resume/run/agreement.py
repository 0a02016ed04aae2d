"""How all ranks come to act after one and the same step, without a collective and at no cost to a step.

A request (to stop, to save) is a key in the control store. A thread on every rank waits for it, and answers
with the number of steps that its rank has begun; the largest answer is the step after which all act. Until
that number is known, no rank begins another step, so none can have passed it; and because the threads answer,
not the training loops, a loop that waits inside a collective delays nobody. Between requests a step costs one
comparison under a lock.

While no rank takes steps yet (it builds its model, restores), all answer :data:`NOT_BEGUN`, and act at once.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_resume.errors import RendezvousError
from hpc_resume.files import JsonObject

if TYPE_CHECKING:
    from torch.distributed import Store

#: A request that ends the threads themselves.
_CLOSE = "close"
#: Number of steps of a rank that has restored nothing yet: an appointment there is due everywhere.
NOT_BEGUN = -1
#: Rank 0 decides; the others wait so much longer for its word, so that none leaves just as it comes.
FOLLOW_S = 5.0
#: One wait for a request; then the thread waits again.
_PATIENCE = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Appointment:
    """What all ranks do after completing ``step`` steps.

    Parameters
    ----------
    kind
        ``"stop"``, ``"save"``, or ``"leave"``: stop without saving.
    step
        Number of completed steps at which to act, or :data:`NOT_BEGUN`.
    details
        What the requesting rank said: cause, signal, evidence, rank.
    """

    kind: str
    step: int
    details: JsonObject


class Agreement:
    """One rank's part in agreeing on steps.

    Parameters
    ----------
    listen, speak
        Two connections to the control store: the first is busy waiting for requests all the time, on the
        second nobody waits.
    rank, world_size
        This process's place.
    patience_s
        How long the answers may take before the ranks that miss are given up, on rank 0, which collects them.
    on_request
        Called on the thread with kind and details of each request, before it is agreed on.
    on_failure
        Called on the thread with kind and reason if no agreement is reached.
    """

    def __init__(
        self,
        listen: Store,
        speak: Store,
        *,
        rank: int,
        world_size: int,
        patience_s: float,
        on_request: Callable[[str, JsonObject], None],
        on_failure: Callable[[str, str], None],
    ) -> None:
        self._listen = listen
        self._speak = speak
        self._rank = rank
        self._world_size = world_size
        self._patience = dt.timedelta(seconds=patience_s)
        self._on_request = on_request
        self._on_failure = on_failure
        self._condition = threading.Condition()
        self._begun = NOT_BEGUN
        self._deciding = False
        self._number = 0
        self._agreed: list[Appointment] = []
        self._thread = threading.Thread(target=self._serve, name="hpc-resume-agreement", daemon=True)

    def start(self) -> None:
        """Take part from now on."""
        self._thread.start()

    def rest(self, completed: int) -> None:
        """Say that no step is being done: before the first one, and where a loop has ended early."""
        with self._condition:
            self._begun = completed

    def boundary(self, completed: int) -> Appointment | None:
        """Ask, between two steps, whether something is to be done now.

        Parameters
        ----------
        completed
            Number of completed steps.

        Returns
        -------
        Appointment or None
            What to do; ask again after doing it. None: the next step has begun as of now.
        """
        with self._condition:
            while self._deciding:
                self._condition.wait()
            for index, appointment in enumerate(self._agreed):
                if appointment.step in {completed, NOT_BEGUN}:
                    return self._agreed.pop(index)
            self._begun = completed + 1
            return None

    def due(self, completed: int) -> bool:
        """Whether all ranks have agreed to stop here; unlike :meth:`boundary`, it begins no step.

        Parameters
        ----------
        completed
            Number of completed steps, or :data:`NOT_BEGUN`.
        """
        with self._condition:
            while self._deciding:
                self._condition.wait()
            return any(each.kind != "save" and each.step in {completed, NOT_BEGUN} for each in self._agreed)

    def request(self, kind: str, **details: Any) -> None:
        """Ask all ranks for an appointment, unless somebody has asked for the same already.

        Returns at once; the appointment shows at a later :meth:`boundary`.

        Raises
        ------
        RendezvousError
            If the control store is gone.
        """
        message = json.dumps({"kind": kind, "details": {"rank": self._rank, **details}})
        number = self._number
        try:
            while True:
                standing = json.loads(self._speak.compare_set(f"request/{number}", "", message))
                if standing["kind"] == kind:
                    return
                number += 1  # a different request came first: ours is the next one
        except RuntimeError as error:
            raise RendezvousError(f"the control store is gone, and rank 0 with it: {error}") from error

    def close(self) -> None:
        """End the threads of all ranks; every rank calls it when it has left its loop for good."""
        try:
            self.request(_CLOSE)
        except RendezvousError:
            return  # rank 0 has left already
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        while True:
            try:
                text = self._wait(f"request/{self._number}")
            except RuntimeError:
                return  # the store is gone with rank 0; whatever the loop does next will show it
            message = json.loads(text)
            if message["kind"] == _CLOSE:
                return
            self._decide(message["kind"], message["details"])

    def _wait(self, key: str) -> bytes:
        while True:
            try:
                self._listen.wait([key], _PATIENCE)
                return bytes(self._listen.get(key))
            except RuntimeError as error:
                if "timeout" not in str(error).lower():
                    raise

    def _decide(self, kind: str, details: JsonObject) -> None:
        with self._condition:
            self._deciding = True
            begun = self._begun
            number = self._number
        failure = None
        step = -1
        try:
            self._on_request(kind, details)
            step = self._exchange(number, begun)
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        with self._condition:
            if failure is None:
                self._agreed.append(Appointment(kind=kind, step=step, details=details))
            self._number = number + 1
            self._deciding = False
            self._condition.notify_all()
        if failure is not None:
            self._on_failure(kind, failure)

    def _exchange(self, number: int, begun: int) -> int:
        """Give this rank's answer and get the largest; rank 0 collects."""
        store = self._listen
        store.set(f"begun/{number}/{self._rank}", str(begun))
        if self._rank == 0:
            keys = [f"begun/{number}/{rank}" for rank in range(self._world_size)]
            store.wait(keys, self._patience)
            store.set(f"step/{number}", str(max(int(store.get(key)) for key in keys)))
        else:
            store.wait([f"step/{number}"], self._patience + dt.timedelta(seconds=FOLLOW_S))
        return int(store.get(f"step/{number}"))
