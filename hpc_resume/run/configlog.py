"""What an attempt's settings change: told when it begins, and refused where a run must not go on with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError
from hpc_resume.files import JsonObject
from hpc_resume.journal import Journal
from hpc_resume.lineage import Lineage, read_lineage
from hpc_resume.provenance.configuration import Change, changes, read_configuration, sentences
from hpc_resume.rollbacks import Rollback, read_rollbacks
from hpc_resume.run.history import EarlierAttempt
from hpc_resume.rundir import RunDirectory
from hpc_resume.untrusted import printable

#: Of the words that a script was given, so many characters are told.
_LONGEST = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigLog:
    """Compares this attempt's settings with those that a run went on with before.

    Parameters
    ----------
    run
        The run directory.
    config
        Of this attempt.
    """

    run: RunDirectory
    config: Config

    def begin(
        self,
        earlier: Sequence[EarlierAttempt],
        rollbacks: Sequence[Rollback],
        record: JsonObject,
        journal: Journal,
        say: Callable[[str], None],
    ) -> None:
        """Write down what has come over the run since it last trained: a fork, rollbacks, other settings.

        Parameters
        ----------
        earlier
            The attempts before this one, ascending.
        rollbacks
            All of the run, ascending.
        record
            Of this attempt.
        journal
            Of this attempt.
        say
            Tells the person who reads the log.
        """
        lineage = self._lineage(journal)
        if lineage is not None and not earlier:
            say(printable(lineage.sentence))
            journal.event(
                "forked", parent=lineage.parent.run_id, checkpoint=lineage.parent.checkpoint, why=lineage.why
            )
        newest = earlier[-1].number if earlier else 0
        for each in rollbacks:
            if each.after == newest:
                say(printable(each.sentence))
                journal.event("rolled_back", number=each.number, to=each.to, undoes=each.undoes, why=each.why)
        before, since = _reference(earlier, lineage)
        digest = before.get("config")
        if not isinstance(digest, str):
            return
        try:
            found = (*_other_arguments(before, record), *self._since(digest))
        except IntegrityError as error:
            journal.event("config_unknown", since=since, why=str(error))
            return
        if found:
            why = self.config.allow_config_change or self.config.why
            reason = f"; why: {why}" if why else ""
            if not why and any(each.grade != "harmless" for each in found):
                reason = "; no reason was given (why: in the settings, --why)"
            say(printable(f"settings have changed since {_since_text(since)}: {sentences(found)}{reason}"))
            journal.event(
                "config_changed",
                since=since,
                old=digest,
                new=self.config.digest(),
                changes=[each.to_json() for each in found],
                why=why,
            )

    def problem(self, manifest: Manifest) -> str | None:
        """Say why a checkpoint must not be gone on from with these settings, or ``None``."""
        refused = [each for each in self._of(manifest) if each.grade == "stop"]
        if not refused or self.config.allow_config_change is not None:
            return None
        names = " and ".join(each.name for each in refused)
        return (
            f"step {manifest.step} was trained with other settings: {'; '.join(each.sentence for each in refused)}. "
            f'Set {names} back; or, if that is meant, say why: allow_config_change="…" in the settings '
            "(HPC_RESUME_ALLOW_CONFIG_CHANGE, -o allow_config_change=…); or begin a new run in another run_dir"
        )

    def settle(
        self,
        manifest: Manifest,
        items: Mapping[str, Any],
        given: Mapping[str, tuple[Any, ...]],
        say: Callable[[str], None],
        note: Callable[..., None],
    ) -> list[list[Any]]:
        """Tell what the restored checkpoint has other than what it was given, and what was allowed.

        Parameters
        ----------
        manifest
            Of the checkpoint.
        items
            What is tracked, restored.
        given
            The optimizers' numbers as the script gave them; see :func:`hyperparameters`.
        say, note
            Into the log; into the journal.

        Returns
        -------
        list
            Name, old and new value of all that is set otherwise, for :func:`read_changed`.
        """
        found = self._of(manifest)
        allowed = [each.sentence for each in found if each.grade == "stop"]
        allowed += [text for item in items.values() for text in getattr(item, "changes", ())]
        if allowed:
            why = self.config.allow_config_change
            say(printable(f"goes on although {'; '.join(dict.fromkeys(allowed))}: {why}"))
            note("config_change_allowed", step=manifest.step, changes=list(dict.fromkeys(allowed)), why=why)
        if any(each.grade == "look" for each in found):
            held = [
                f"{name} is {_numbers(now)} as it was saved, not {_numbers(given[name])}"
                for name, now in hyperparameters(items).items()
                if given.get(name, now) != now
            ]
            if held:
                say(f"{'; '.join(held)}: what was restored holds; to set it anew, see run.changed")
                note("hyperparameters_held", changes=held)
        return [[each.short, each.old, each.new] for each in found]

    def _of(self, manifest: Manifest) -> tuple[Change, ...]:
        try:
            return () if manifest.config is None else self._since(manifest.config)
        except IntegrityError:
            return ()  # that it can't be told stands in the journal

    def _since(self, digest: str) -> tuple[Change, ...]:
        if digest == self.config.digest():
            return ()
        old = read_configuration(self.run, digest)
        if old is None:
            raise IntegrityError(f"configs/{digest:.16}.yaml is gone, so what has changed can't be told")
        return changes(old, self.config.model_dump(mode="json"))

    def _lineage(self, journal: Journal) -> Lineage | None:
        try:
            return read_lineage(self.run)
        except IntegrityError as error:
            journal.event("lineage_unknown", why=str(error))
            return None


def given_arguments(config: Config) -> JsonObject:
    """Give the words after the script's name, for its attempt's record, if it was not us who started it.

    Rank 0's alone: launchers may tell each rank its own number there.
    """
    if config.entry.target is not None or config.entry.command:
        return {}
    return {"arguments": sys.argv[1:]}


def _other_arguments(before: JsonObject, now: JsonObject) -> Iterator[Change]:
    old, new = before.get("arguments"), now.get("arguments")
    if isinstance(old, list) and isinstance(new, list) and old != new:
        yield Change(
            name="arguments",
            old=" ".join(map(str, old))[:_LONGEST],
            new=" ".join(new)[:_LONGEST],
            grade="look",
        )


def _reference(earlier: Sequence[EarlierAttempt], lineage: Lineage | None) -> tuple[JsonObject, int]:
    """Record of the attempt with whose settings the run went on last, and its number; 0: in the run that was forked.

    An attempt that did not come to train has changed nothing.
    """
    for each in reversed(earlier):
        if each.first_step is not None and isinstance(each.record.get("config"), str):
            return each.record, each.number
    return ({} if lineage is None else {"config": lineage.config}), 0


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def read_changed(changed: Sequence[Sequence[Any]]) -> dict[str, tuple[Any, Any]]:
    """Give what :meth:`ConfigLog.settle` returned, by name, after its way through JSON."""
    return {name: (old, new) for name, old, new in changed}


def known_rollbacks(run: RunDirectory, journal: Journal) -> tuple[Rollback, ...]:
    """Read a run's rollbacks; where they can't be read, restoring says so, once all ranks have met."""
    try:
        return read_rollbacks(run)
    except IntegrityError as error:
        journal.event("rollbacks_unknown", why=str(error))
        return ()


def _since_text(attempt: int) -> str:
    return f"attempt {attempt}" if attempt else "the checkpoint that was forked"


def hyperparameters(items: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Give the numbers of each tracked optimizer's parameter groups, by name: ``optimizer.lr``."""
    found: dict[str, tuple[Any, ...]] = {}
    for key, item in items.items():
        groups = getattr(item, "param_groups", None)
        if not isinstance(groups, list):
            continue
        names = {
            name
            for group in groups
            for name, value in group.items()
            if isinstance(value, int | float | tuple)
        }
        for name in sorted(names - {"initial_lr"}):
            found[f"{key}.{name}"] = tuple(group.get(name) for group in groups)
    return found
