"""The checkpoints that a run can go on from, newest first, as rank 0 chooses among them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from hpc_resume import log
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.manifest import MANIFEST
from hpc_resume.errors import IntegrityError
from hpc_resume.files import may_be_damage, obstacle
from hpc_resume.journal import Journal
from hpc_resume.lineage import read_lineage
from hpc_resume.rollbacks import read_rollbacks, standing
from hpc_resume.run.probing import OTHER, SAME
from hpc_resume.run.soundness import passed_over
from hpc_resume.rundir import RunDirectory, checkpoint_step
from hpc_resume.settings import ValidationSettings
from hpc_resume.untrusted import open_regular

#: If the probe gives something else with so many checkpoints, it is not the checkpoints.
_MOST_SUSPECTS = 3
#: What is read at a time, where only that it can be read is wanted.
_STREAM_BYTES = 1 << 20


def read_through(path: Path) -> None:
    """Read all of a file, from where it lies and not from memory.

    Raises
    ------
    OSError
        If it can't be read.
    """
    fd = open_regular(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, _STREAM_BYTES):
            pass
    finally:
        os.close(fd)


class Candidates:
    """Chooses what to restore; what is wrong goes to quarantine.

    A probe that gives something else after the restore accuses the checkpoint, but it may as well be the code, the
    data or the hardware. An older checkpoint with which it gives what it gave decides: then the newer ones are set
    aside. Until then nothing is. An input/output error accuses the medium, but it may as well be the way to it: there,
    too, an older one that can be read decides.

    Parameters
    ----------
    run
        The run directory.
    settings
        What is passed over.
    journal
        Of the attempt.
    read
        Reads all of a file; for tests.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: ValidationSettings,
        journal: Journal | None,
        *,
        read: Callable[[Path], None] = read_through,
    ) -> None:
        self._run = run
        self._settings = settings
        self._journal = journal
        self._read = read
        #: Names of those that were set aside.
        self.damaged: list[str] = []
        #: Those with which the probe gives something else, and what.
        self.suspects: dict[str, str] = {}
        #: Those that can't be read, and why.
        self.unread: dict[str, str] = {}
        self._untold: set[str] = set()
        self._passed: set[str] = set()
        self._vouched = False

    def newest(self) -> str | None:
        """Name the newest one that has not been tried; None if there is none, or more would tell nothing.

        Raises
        ------
        IntegrityError
            If one can't be read that may well be whole; the cause is the system's error.
        """
        if len(self.suspects) >= _MOST_SUSPECTS:
            return None
        for name, manifest in store.newest_first(self._run):
            if any(name in told for told in (self.suspects, self.unread, self._untold, self.damaged)):
                continue
            if isinstance(manifest, IntegrityError):
                self._judge_unread(name, manifest)
            elif why := passed_over(manifest, self._settings, asked=name in self._asked):
                if name not in self._passed:
                    self._passed.add(name)
                    self._say(f"step {manifest.step} is passed over: {why}")
                    self._note("passed_over", checkpoint=name, step=manifest.step, why=why)
            else:
                return name
        return None

    def _judge_unread(self, name: str, error: IntegrityError) -> None:
        hindered = obstacle(error)
        if hindered is None:
            self.set_aside(name, str(error))
            return
        file = self._run.checkpoints / name / MANIFEST
        if not may_be_damage(hindered) or not self.pass_over(name, str(error), str(file)):
            raise error

    def pass_over(self, name: str, reason: str, unread: str | None = None) -> bool:
        """Take note of what is wrong with a checkpoint; what can't be read is tried first, on this rank.

        Parameters
        ----------
        name, reason
            The checkpoint, and what a rank says of it.
        unread
            A file of it that could not be read, if that is all.

        Returns
        -------
        bool
            Whether an older one is to be tried; no if the file can be read, so that nothing is wrong with it.
        """
        if unread is None:
            self.set_aside(name, reason)
            return True
        try:
            self._read(Path(unread))
        except OSError as error:
            if (hindered := obstacle(error)) is not None and not may_be_damage(hindered):
                raise  # this rank is no witness
        else:
            return False
        self.unread[name] = reason
        self._say(f"{name} can't be read: {reason}; trying an older one")
        self._note("unreadable", checkpoint=name, reason=reason)
        return True

    @cached_property
    def _asked(self) -> frozenset[str]:
        """Names of those that a person has chosen to go on from."""
        found = {each.to for each in standing(read_rollbacks(self._run))}
        with contextlib.suppress(IntegrityError):  # the journal says so
            if (lineage := read_lineage(self._run)) is not None:
                found.add(lineage.parent.checkpoint)
        return frozenset(found)

    def judge(self, name: str, found: str, how: str) -> bool:
        """Decide whether to go on from a checkpoint that was restored; if so, those that can't be read are set aside.

        Parameters
        ----------
        name
            Of the checkpoint.
        found, how
            :meth:`.Probing.compare`.
        """
        if not self._goes_on(name, found, how):
            return False
        for unread, why in self.unread.items():
            self.set_aside(unread, f"{why}; {name} could be read")
        self.unread = {}
        return True

    def _goes_on(self, name: str, found: str, how: str) -> bool:
        if found == OTHER:
            self._note("probe_differs", checkpoint=name, why=how)
            if self._settings.mismatch == "tell":
                self._say(
                    f"the probe gives something else than before the save: {how}; going on all the same"
                )
                return True
            self._say(
                f"{name}: the probe gives something else than before the save: {how}; trying an older one"
            )
            self.suspects[name] = how
            return False
        if not self.suspects or self._vouched:
            return True
        if found != SAME:  # it can't tell who is to blame
            self._untold.add(name)
            return False
        for suspect, why in self.suspects.items():
            reason = (
                f"the probe gives something else than before the save ({why}), but with {name} what it gave: "
                "look whether all that is trained is tracked, and whether something changed it while it was saved"
            )
            self.set_aside(suspect, reason)
        self.suspects = {}
        self._vouched = True
        newer = any(checkpoint_step(each) > checkpoint_step(name) for each in self._untold)
        self._untold = set()
        return not newer

    def set_aside(self, name: str, reason: str) -> None:
        """Put a checkpoint into quarantine, unless another one that is kept needs its bytes."""
        self.damaged.append(name)
        if (keeper := store.referring(self._run, name)) is not None:
            why = f"{reason}; it stays where it is, because part of the bytes of {keeper} lie in it"
            self._note("left_in_place", durable=True, checkpoint=name, reason=why)
            self._say(f"{name} is passed over: {why}")
            return
        store.quarantine(self._run, name, reason)
        self._say(f"{name} is set aside, in {self._run.quarantine}: {reason}")
        self._note("quarantined", durable=True, checkpoint=name, reason=reason)

    def _note(self, event: str, *, durable: bool = False, **fields: object) -> None:
        if self._journal is not None:
            self._journal.event(event, durable=durable, **fields)

    def _say(self, text: str) -> None:
        log.say(text)


def what_to_check(suspects: Mapping[str, str]) -> str:
    """Say what it may be, where the probe gives something else with every checkpoint that could tell."""
    tried = "; ".join(f"step {checkpoint_step(name)}: {how}" for name, how in suspects.items())
    many = "the only checkpoint that tells" if len(suspects) == 1 else f"each of {len(suspects)} checkpoints"
    return (
        f"the probe gives something else than before the save, with {many} ({tried}). Their bytes are what was "
        "committed, so it is more likely what computes with them: nothing was set aside. Look at what has changed: the "
        "model's code, the probe and its data, versions of packages and drivers, whether this node computes rightly "
        "(hpc-resume doctor --node). If the change is meant, go on once with validation: {mismatch: tell}"
    )
