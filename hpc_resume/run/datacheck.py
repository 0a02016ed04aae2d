"""The data of a run: what it is, whether it is still what was trained on, and what if it is not."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import HpcResumeError, IntegrityError, RendezvousError, UsageError
from hpc_resume.files import DISK, Clock, JsonObject
from hpc_resume.journal import read_events
from hpc_resume.provenance.datachange import DataChange, compare_data
from hpc_resume.provenance.datahash import Reading, Taken, Taking, take_snapshot
from hpc_resume.provenance.datarecord import DataRecord, Decision
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.provenance.hashcache import HashCache, user_cache
from hpc_resume.records import data_path
from hpc_resume.run.datasource import Source
from hpc_resume.run.peers import Peers
from hpc_resume.rundir import RunDirectory

#: How far reading is stands in the log this often.
_TELL_S = 30.0
#: So much to read is said at once: it takes from half a minute on.
_MUCH_BYTES = 10_000_000_000
#: Ranks that wait for rank 0 look around this often, at first and later: thousands may wait for hours.
_LOOK_S, _LONGEST_LOOK_S = 0.02, 1.0
#: Reading that takes longer is worth doing beforehand.
_LONG_S = 60.0
_KEY = "data"
_EVENT = "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """What the attempt lends to the check.

    Parameters
    ----------
    run, attempt
        The run directory, and the number of the attempt.
    peers, rank
        The other ranks, and this one.
    say, note
        Into the log; into the journal.
    breathe
        Leaves if a stop was asked for.
    clock
        Unix time in seconds.
    """

    run: RunDirectory
    attempt: int
    peers: Peers
    rank: int
    say: Callable[[str], None]
    note: Callable[..., None]
    breathe: Callable[[], None]
    clock: Clock = time.time


class RunData:
    """What a run trains and validates on, by its settings or its script.

    Parameters
    ----------
    config
        Of the run.
    """

    def __init__(self, config: Config) -> None:
        settings = config.data
        self._settings = settings
        self._reason = config.allow_data_change
        self._training = Source(paths=settings.paths)
        self._validation = Source(paths=settings.validation)
        self._preprocessing = settings.preprocessing

    def declare(self, data: Any, validation: Any, preprocessing: str | None) -> None:
        """Say what the data is, in place of the settings.

        Parameters
        ----------
        data
            A folder or file, a list of those, or ``{name: path}``; or a Hugging Face dataset in memory, which is
            known by its fingerprint.
        validation
            The same for what the run is validated on: a change is told, and stops nothing.
        preprocessing
            A version of what is done with the data before the model sees it.

        Raises
        ------
        UsageError
            If it is none of these.
        """
        if data is not None:
            self._training = Source.of(data, "data")
        if validation is not None:
            self._validation = Source.of(validation, "validation")
        if preprocessing is not None:
            self._preprocessing = str(preprocessing)

    def check(self, saved: JsonObject | None, place: str, host: Hosting) -> JsonObject:
        """Compare the data with what the run was trained on so far; all ranks come here.

        Parameters
        ----------
        saved
            ``environment`` of the checkpoint that was restored; ``None`` for a new run.
        place
            What that is, in words.
        host
            The attempt.

        Returns
        -------
        dict
            What checkpoints are to say of it.

        Raises
        ------
        UsageError
            On all ranks, if it has changed and nobody said why, or can't be read.
        """
        if host.rank == 0:
            answer: list[Any] = [None, {}]
            try:
                answer[1] = self._judge(saved, place, host).to_json()
            except (UsageError, IntegrityError) as error:
                answer[0] = str(error)
            except OSError as error:
                host.peers.share(_KEY, [str(error), None])
                raise  # it may be gone in another attempt
            host.peers.share(_KEY, answer)
        else:
            _wait(host)
            answer = host.peers.share(_KEY)
        problem, record = answer
        if record is None:
            raise RendezvousError(f"rank 0 could not look at the data: {problem}")
        if problem is not None:
            raise UsageError(problem)
        return {"data": record} if record else {}

    def _judge(self, saved: JsonObject | None, place: str, host: Hosting) -> DataRecord:
        """On rank 0: find out what the data is, and whether the run may go on with it."""
        before = _earlier(host) if saved is None else DataRecord.from_json(saved.get("data"))
        if saved is None and before:
            place = "an earlier attempt"
        off = self._settings.check == "off"
        training = None if off or not self._training else self._take(self._training, "data", host)
        validation = None if off or not self._validation else self._take(self._validation, "validation", host)
        now = DataRecord(
            digest=before.digest,
            validation=before.validation,
            preprocessing=self._preprocessing or before.preprocessing,
            checked="no" if training is None else self._settings.check,
            decisions=before.decisions,
        )
        change = DataChange()
        if training is not None and saved is not None and before.digest is None:
            host.say(f"{place} does not say what data it was trained on; from here on checkpoints do")
        if training is not None:
            now, change = self._compared(now, before.digest, training.snapshot, host)
        told = [] if not change else [f"{self._where()}: {change.counts()}", *change.lines()]
        if (
            None not in {before.preprocessing, now.preprocessing}
            and before.preprocessing != now.preprocessing
        ):
            told.insert(0, f"preprocessing: {before.preprocessing} → {now.preprocessing}")
        if told:
            now = self._allowed(before, now, place, told)
            reason = now.decisions[-1].reason
            host.say("\n  ".join([f"the data is not that of {place}, and the run goes on: {reason}", *told]))
            host.note(
                "data_changed",
                durable=True,
                before=before.to_json(),
                after=now.to_json(),
                reason=reason,
                what=told,
            )
        if validation is not None:
            now = self._validated(now, before.validation, validation.snapshot, host)
        if before.digest is not None and training is None:
            why = "data.check is off" if off else "nobody says where it lies"
            host.say(f"the data is NOT compared with that of {place}: {why}")
        if now:
            host.note(_EVENT, durable=True, **now.to_json())
        return now

    def _where(self) -> str:
        return ", ".join(self._training.each) or "data"

    def _take(self, source: Source, what: str, host: Hosting) -> Taken:
        """Take the snapshot of some data, breathing."""
        source.check_apart(host.run)
        settings = self._settings
        user = user_cache(os.environ)
        folders = [host.run.data / "cache"] if user is None else [user, host.run.data / "cache"]
        reading = Reading(
            contents=settings.check == "contents",
            inside=settings.inside,
            ignore=settings.ignore,
            threads=settings.threads,
            cache=HashCache(folders, clock=host.clock),
            clock=host.clock,
        )
        telling = _Telling(what, host)
        taken = take_snapshot(source.paths, reading, fingerprints=source.fingerprints, tell=telling)
        telling.done(taken)
        return taken

    def _compared(
        self, now: DataRecord, old: str | None, new: DataSnapshot, host: Hosting
    ) -> tuple[DataRecord, DataChange]:
        """Compare training data; returns the record with the snapshot that counts from here on."""
        if old == new.digest:
            _keep(new, host.run)
            return now, DataChange()
        if old is None:
            return dataclasses.replace(now, digest=_keep(new, host.run)), DataChange()
        try:
            earlier = DataSnapshot.load(data_path(host.run, old))
        except (OSError, IntegrityError) as error:
            what = getattr(error, "strerror", None) or str(error)
            change = DataChange(
                changed=((self._where(), f"nobody can say what: {old} can't be read: {what}"),)
            )
        else:
            change = compare_data(earlier, new)
            new = new.believing(earlier)
            if change.rewritten and not change:
                host.say(
                    "\n  ".join(["HDF5 files were rewritten; their contents are the same", *change.lines()])
                )
        return dataclasses.replace(now, digest=_keep(new, host.run)), change

    def _validated(self, now: DataRecord, old: str | None, new: DataSnapshot, host: Hosting) -> DataRecord:
        """Compare validation data: a change makes scores incomparable, and spoils no training."""
        told: list[str] = []
        if old not in {None, new.digest}:
            try:
                earlier = DataSnapshot.load(data_path(host.run, str(old)))
                change = compare_data(earlier, new)
                new = new.believing(earlier)
                told = [change.counts(), *change.lines()] if change else []
            except (OSError, IntegrityError):
                told = [f"nobody can say what: {data_path(host.run, str(old))} can't be read"]
        if told:
            host.say(
                "\n  ".join(
                    [
                        "LOOK: the validation data has changed, scores before and after are of different things",
                        *told,
                    ]
                )
            )
            host.note("validation_changed", durable=True, before=old, after=new.digest, what=told)
        return dataclasses.replace(now, validation=_keep(new, host.run))

    def _allowed(self, before: DataRecord, now: DataRecord, place: str, told: Sequence[str]) -> DataRecord:
        """Take a change with its reason, or refuse it."""
        listed = "\n  ".join(told)
        what = f"the data is not that of {place}, and no step was done with it:\n  {listed}\n"
        if self._reason is None:
            raise UsageError(
                f'{what}Put it back as it was, or say why the run may go on with it: allow_data_change="reason", as a '
                "setting, in hr.Run(…), or as HPC_RESUME_ALLOW_DATA_CHANGE; the reason is recorded"
            )
        decision = Decision(before=before.state, after=now.state, reason=self._reason)
        used = [each for each in before.decisions if each.reason == self._reason]
        if used:
            raise UsageError(
                f"{what}The reason {self._reason!r} was given for another change before ({used[-1].before} → "
                f"{used[-1].after}); put the data back, or give a reason for this one"
            )
        return dataclasses.replace(now, decisions=(*before.decisions, decision))


class _Telling:
    """Says in the log how far a snapshot is, and lets a stop happen."""

    def __init__(self, what: str, host: Hosting) -> None:
        self._what = what
        self._host = host
        self._began_s = self._told_s = time.monotonic()
        self._much = False

    def __call__(self, taking: Taking) -> None:
        self._host.breathe()
        now_s = time.monotonic()
        much = not self._much and taking.total_bytes >= _MUCH_BYTES
        if now_s - self._told_s < _TELL_S and not much:
            return
        self._told_s = now_s
        self._much |= much
        if not taking.files:
            self._host.say(f"{self._what}: listing the files")
            return
        done, total = taking.done_bytes, taking.total_bytes
        self._host.say(f"{self._what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB read that are not known yet")

    def done(self, taken: Taken) -> None:
        """Say what it is, and what it took."""
        took_s = time.monotonic() - self._began_s
        snapshot = taken.snapshot
        read = f"{taken.read_bytes / 1e9:.1f} GB read" if taken.read_files else "nothing had to be read"
        self._host.say(
            f"{self._what}: snapshot {snapshot.digest}, {len(snapshot.files):,} files, "
            f"{snapshot.size_bytes / 1e9:.1f} GB, {read}, {took_s:.1f} s"
        )
        if took_s > _LONG_S and taken.read_files:
            self._host.say(
                "hpc-resume data snapshot PATH on a login node, before submitting, would have saved that time"
            )


def _wait(host: Hosting) -> None:
    """Wait for rank 0's word, breathing."""
    pause_s = _LOOK_S
    try:
        while not host.peers.store.check([_KEY]):
            host.breathe()
            host.peers.check()
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_LOOK_S)
    except RuntimeError as error:
        if isinstance(error, HpcResumeError):
            raise
        raise RendezvousError(f"rank {host.rank} waited for rank 0 to look at the data: {error}") from error


def _earlier(host: Hosting) -> DataRecord:
    """Give what the newest attempt before this one said of its data; of a run without checkpoints."""
    for number in reversed(host.run.attempt_numbers()):
        if number < host.attempt:
            events = read_events(host.run.attempt(number) / "events.jsonl", {_EVENT})
            if events:
                return DataRecord.from_json(events[-1])
    return DataRecord()


def _keep(snapshot: DataSnapshot, run: RunDirectory) -> str:
    """Write a snapshot into the run directory, unless it is there; returns its digest."""
    path: Path = data_path(run, snapshot.digest)
    if not path.exists():
        DISK.make_dirs(path.parent)
        DISK.write_file(path, snapshot.to_bytes())
    return snapshot.digest
