"""What came before an attempt: how the earlier ones ended, found out where they could not say so themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hpc_resume.files import JsonObject
from hpc_resume.journal import read_events
from hpc_resume.policy.retry import History, PastAttempt
from hpc_resume.run.memory import OomKills
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.base import PastJob, Scheduler, Whereabouts
from hpc_resume.scheduler.cause import Cause, Verdict
from hpc_resume.scheduler.diagnosis import Remains, diagnose
from hpc_resume.scheduler.environment import JobEnvironment

#: Where a rank leaves what went wrong on it, in its attempt's folder.
FAULT = "fault.json"
_KINDS = frozenset(
    {"begun", "met", "restored", "fresh", "stop_requested", "ended", "diagnosed", "progress", "saved"}
)
#: Causes for which a node is to blame, if one is named.
_OF_NODES = frozenset({Cause.CRASH.value, Cause.NODE_FAILURE.value})


class EarlierAttempt:
    """What an attempt has left in the run directory.

    Parameters
    ----------
    run
        The run directory.
    number
        Of the attempt.
    """

    def __init__(self, run: RunDirectory, number: int) -> None:
        self.number = number
        self.folder = run.attempt(number)
        self.record = _json_object(self.folder / "attempt.json")
        self.events = read_events(self.folder / "events.jsonl", _KINDS)
        self.ended = self.last("ended")
        begun = self.last("restored", "fresh")
        self.first_step = None if begun is None else _number(begun.get("step"))

    def last(self, *kinds: str) -> JsonObject | None:
        """Give the last event of some kinds."""
        return next((event for event in reversed(self.events) if event.get("event") in kinds), None)

    @property
    def puzzling(self) -> bool:
        """Whether it left no last word, or one that says that a peer was lost and not why."""
        return self.ended is None or self.ended.get("cause") == Cause.UNKNOWN.value

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Ranks by node; as long as they have not met, rank 0."""
        ranks = (self.last("met") or {}).get("ranks")
        if isinstance(ranks, dict) and all(isinstance(those, list) for those in ranks.values()):
            return ranks
        return {str(node): [0] for node in _list(self.record.get("nodes"))[:1]}


def earlier_attempts(run: RunDirectory, number: int) -> list[EarlierAttempt]:
    """Read the attempts before one, ascending."""
    return [EarlierAttempt(run, each) for each in run.attempt_numbers() if each < number]


def diagnoses(
    run: RunDirectory,
    attempts: list[EarlierAttempt],
    environment: JobEnvironment,
    scheduler: Scheduler,
) -> Iterator[tuple[int, Verdict]]:
    """Find out what ended the attempts that did not say so; of all but the last one, what they left is enough.

    Yields
    ------
    (int, Verdict)
        An attempt's number, and what is known now. Those that an earlier call gave are left out.
    """
    known = {
        event.get("attempt") for each in attempts for event in each.events if event["event"] == "diagnosed"
    }
    for each in attempts:
        if each.number in known or not each.puzzling:
            continue
        newest = each is attempts[-1]
        verdict = diagnose(
            Remains(
                stop=_stop(each),
                fault=_fault(each.folder / FAULT),
                exit_codes=_exit_codes(run, each.record) if each.ended is None else {},
                ranks=each.ranks,
                job=_look_back(each, scheduler) if newest else PastJob(),
                oom_kills=_oom_kills(each, environment.node) if newest else None,
            )
        )
        # What an attempt could say itself stands, unless something is known for certain now.
        if each.ended is None or verdict.cause in {Cause.NODE_FAILURE, Cause.OUT_OF_MEMORY, Cause.CRASH}:
            yield each.number, verdict
    for path in run.attempts.glob(".exit-*.json"):
        with contextlib.suppress(OSError):
            path.unlink()  # they tell of one attempt each, and a job may have several under one id


def history(
    attempts: list[EarlierAttempt],
    diagnosed: dict[int, Verdict],
    *,
    chain: str | None,
    further_types: bool,
    rolled_back_after: Collection[int] = (),
) -> History:
    """Sum up what came before an attempt, for the policy.

    Parameters
    ----------
    attempts
        As :func:`earlier_attempts` read them.
    diagnosed
        By number, what was found out just now.
    chain
        The attempt's jobs that go on from each other: those of others have a budget of their own, because a
        person submitted this one anew.
    further_types
        See :class:`History`.
    rolled_back_after
        Numbers of attempts after which a person rolled the run back: that begins a new budget, too.
    """
    verdicts = {
        event["attempt"]: event
        for each in attempts
        for event in each.events
        if event["event"] == "diagnosed" and isinstance(event.get("attempt"), int)
    }
    verdicts.update({n: {"cause": v.cause.value, "nodes": list(v.nodes)} for n, v in diagnosed.items()})
    faults: dict[str, list[int]] = {}
    past: list[PastAttempt] = []
    for each in attempts:
        word = verdicts.get(each.number) or each.ended or each.last("stop_requested") or {}
        cause = str(word.get("cause", Cause.UNKNOWN.value))
        nodes = tuple(str(node) for node in _list(word.get("nodes"))) if cause in _OF_NODES else ()
        for node in nodes:
            faults.setdefault(node, []).append(each.number)
        if chain is None or each.record.get("chain", each.record.get("job_id")) != chain:
            past.clear()
            continue
        node_type = each.record.get("node_type")
        past.append(
            PastAttempt(
                number=each.number,
                cause=cause,
                first_step=each.first_step,
                node_type=node_type if isinstance(node_type, str) else None,
                faulty=nodes,
            )
        )
        if each.number in rolled_back_after:
            past.clear()
    return History(
        past=tuple(past),
        faults={node: tuple(numbers) for node, numbers in faults.items()},
        further_types=further_types,
    )


def _stop(each: EarlierAttempt) -> Verdict | None:
    event = each.last("stop_requested")
    try:
        return (
            None if event is None else Verdict(cause=Cause(event["cause"]), evidence=str(event["evidence"]))
        )
    except (LookupError, ValueError):
        return None


def _fault(path: Path) -> Verdict | None:
    record = _json_object(path)
    try:
        return Verdict(
            cause=Cause(record["cause"]),
            evidence=str(record["evidence"]),
            nodes=tuple(str(node) for node in _list(record.get("nodes"))),
        )
    except (LookupError, ValueError):
        return None


def _exit_codes(run: RunDirectory, record: JsonObject) -> dict[int, int]:
    job_id, restarts = record.get("job_id"), _number(record.get("restart_count"))
    if not isinstance(job_id, str) or restarts is None:
        return {}
    codes = _json_object(run.exit_codes_path(job_id, restarts))
    with contextlib.suppress(ValueError, TypeError):
        return {int(rank): int(code) for rank, code in codes.items()}
    return {}


def _look_back(each: EarlierAttempt, scheduler: Scheduler) -> PastJob:
    job_id, began_s = each.record.get("job_id"), each.record.get("started")
    if not isinstance(job_id, str) or not isinstance(began_s, int | float):
        return PastJob()
    times = [event["t"] for event in each.events if isinstance(event.get("t"), int | float)]
    return scheduler.look_back(
        Whereabouts(
            job_id=job_id,
            restart_count=_number(each.record.get("restart_count")) or 0,
            nodes=tuple(each.ranks),
            began_s=began_s,
            last_sign_s=max([began_s, *times]),
        )
    )


def _oom_kills(each: EarlierAttempt, node: str) -> int | None:
    begun = each.last("begun") or {}
    record = begun.get("oom_kills")
    before = OomKills.from_json(record) if isinstance(record, dict) else None
    if before is None or _list(each.record.get("nodes"))[:1] != [node]:
        return None
    return before.since()


def _json_object(path: Path) -> JsonObject:
    try:
        record: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
