"""Rehearsals: a user's own script, interrupted at random moments, must end as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import CheckpointNotFound, UsageError
from hpc_resume.journal import read_events
from hpc_resume.launch.entry import Entry, make_entry
from hpc_resume.launch.rehearse import Rehearsed, Strike, TimeIsUp, measure, settings_for
from hpc_resume.launch.submit import resolve
from hpc_resume.policy.rehearsal import Interruption, bit_for_bit, draw
from hpc_resume.report.comparison import Comparison, compare_runs
from hpc_resume.report.rehearsal import RANDOMNESS, Act, Rehearsal, Verdict, apart, causes, counted, equal
from hpc_resume.report.status import AttemptStatus, status
from hpc_resume.rundir import RunDirectory

#: A script that trains for less is hard to hit.
_SHORTEST_S = 1.0
#: Ranks of a rehearsal, if nobody says: a cluster's number of them is not for one machine.
_RANKS = 2


def rehearse(
    target: Callable[..., Any] | str | Sequence[str],
    /,
    *,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None = None,
    times: int = 5,
    seed: int = 0,
    ranks: Sequence[int] | None = None,
    time_limit_s: float = 600.0,
    tolerance: float = 1e-3,
    keep: bool = False,
    say: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Rehearsal:
    """Interrupt a script at random moments on this machine, and compare the result with an uninterrupted run.

    Parameters
    ----------
    target
        As for :func:`hpc_resume.submit`.
    config
        Settings; of its node types the first one's precision and micro-batch count.
    times, seed
        How many interruptions, and which.
    ranks
        Of one attempt after the other, again and again; the first is the uninterrupted run's.
    time_limit_s
        For all of it, in seconds.
    tolerance
        Relative, where runs can't be equal bit for bit: on changing numbers of ranks, and on three or more.
    keep
        Keep both runs though they are equal.
    say
        Told what happens.
    **kwargs
        Arguments of the function: have it train for some seconds, not hours. One that is called as one of these
        needs ``functools.partial``.

    Returns
    -------
    Rehearsal
        ``verdict`` says it in a word.

    Raises
    ------
    UsageError
        If something is missing or contradicts itself; nothing has been run then.
    """
    return rehearse_entry(
        make_entry(target, kwargs),
        config,
        kwargs=kwargs,
        times=times,
        seed=seed,
        ranks=ranks,
        time_limit_s=time_limit_s,
        tolerance=tolerance,
        keep=keep,
        say=say or (lambda _: None),
    )


def rehearse_entry(
    entry: Entry,
    config: Config | Mapping[str, Any] | str | Path | Sequence[str | Path] | None,
    *,
    kwargs: Mapping[str, Any],
    times: int,
    seed: int,
    ranks: Sequence[int] | None,
    time_limit_s: float,
    tolerance: float,
    keep: bool,
    say: Callable[[str], None],
) -> Rehearsal:
    """Rehearse what :func:`~hpc_resume.launch.entry.make_entry` has checked; see :func:`rehearse`."""
    if times < 1 or time_limit_s <= 0:
        raise UsageError(
            "a rehearsal needs an interruption or more (--times), and some seconds (--time-limit)"
        )
    if ranks is not None and (not ranks or min(ranks) < 1):
        raise UsageError(f"ranks={list(ranks)}: give one number or more, each 1 or more, such as 2,1,3")
    root = Path(tempfile.mkdtemp(prefix="hpc-resume-rehearsal-"))
    try:
        resolved = resolve(entry, config, run_dir=root / "run", kwargs=kwargs)
        if ranks is None:
            shape = resolved.node_types[0].ranks
            ranks = (shape if resolved.scheduler == "local" else min(shape, _RANKS),)
        stage = _Stage(
            entry=entry,
            kwargs=kwargs,
            config=resolved,
            root=root,
            ranks=tuple(ranks),
            plan=draw(seed, times),
            seed=seed,
            tolerance=tolerance,
            until=time.time() + time_limit_s,
            say=say,
        )
        found = stage.play()
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    if found.verdict == "equal" and not keep:
        shutil.rmtree(root, ignore_errors=True)
        return found
    return dataclasses.replace(found, folder=root)


class _UnfinishedError(Exception):
    """A run has not come to its end."""


@dataclass(kw_only=True)
class _Stage:
    """A rehearsal that is going on."""

    entry: Entry
    kwargs: Mapping[str, Any]
    config: Config
    root: Path
    ranks: tuple[int, ...]
    plan: tuple[Interruption, ...]
    seed: int
    tolerance: float
    until: float
    say: Callable[[str], None]
    strikes: list[Strike] = field(default_factory=list)

    def play(self) -> Rehearsal:
        try:
            return self._play()
        except _UnfinishedError as error:
            return self._verdict("failed", str(error))
        except TimeIsUp:
            return self._verdict(
                "failed",
                "it was not over when the time was up: have the script train for fewer steps, or give --time-limit",
            )

    def _play(self) -> Rehearsal:
        whole = self.root / "uninterrupted"
        self.say(f"uninterrupted, on {counted(self.ranks[0], 'rank')}")
        began = time.time()
        first = self._run(whole, self.ranks[:1])
        if (state := first.finish()) != "COMPLETED":
            return self._verdict(
                "failed", f"the script fails without any interruption ({state}): {_tail(first)}"
            )
        if not RunDirectory(whole).checkpoint_names():
            return self._verdict(
                "failed", "the script saved nothing: does it use hr.Run, run.track and run.steps?"
            )
        pace = measure(whole, submitted=began)
        self.say(
            f"{pace.steps} steps in {pace.train_s:.1f} s; now with {counted(len(self.plan), 'interruption')}"
        )
        second = self._run(self.root / "interrupted", self._ranks_in_turn, self.plan, steps=pace.steps)
        self.strikes = second.interrupt(self.plan, pace)
        if (state := second.finish()) != "COMPLETED":
            return self._verdict("failed", f"it did not come to its end ({state}): {_tail(second)}")
        if not (hits := self._hits(pace.steps)):
            return self._verdict(
                "failed",
                f"all steps were done in {pace.train_s:.2f} s, before anything could interrupt them: give more",
            )
        return self._compare(whole, hits=hits, pace_s=pace.train_s)

    def _hits(self, steps: int) -> int:
        """Count the interruptions that came before the last step was done."""
        struck = {strike.allocation for strike in self.strikes}
        acts = [act for place, act in enumerate(self._acts()) if place in struck]
        return sum(act.last_step is None or act.last_step < steps for act in acts)

    def _compare(self, whole: Path, *, hits: int, pace_s: float) -> Rehearsal:
        """Judge the interrupted run; if it differs, find out whether uninterrupted ones do, too."""
        run = self.root / "interrupted"
        alike = len(set(self.ranks)) == 1
        found = compare_runs(whole, run, generators=alike)
        hints = self._remarks(run, hits=hits, pace_s=pace_s)
        if found.identical:
            return self._verdict("equal", f"{equal(found)}, bit for bit", found, hints)
        if not bit_for_bit(self.ranks) and found.within(self.tolerance):
            return self._verdict("equal", f"{equal(found)}, but for rounding ({apart(found)})", found, hints)
        self.say(f"it differs; uninterrupted once more, on {counted(self.ranks[0], 'rank')}")
        again = self._control(whole, self.ranks[0], name="again")
        if (
            not again.identical
            and again.within(self.tolerance)
            and found.within(self.tolerance, chance=again)
        ):
            why = f"{equal(found)}, as far as two uninterrupted runs are ({apart(found)})"
            return self._verdict("equal", why, found, hints)
        if not again.identical:
            return self._verdict("nondeterministic", _by_itself(again), again, [*hints, RANDOMNESS])
        chance = again
        if not alike:
            other = next(count for count in self.ranks if count != self.ranks[0])
            self.say(f"and on {counted(other, 'rank')}")
            chance = self._control(whole, other, name="others")
            if chance.logged and max(each.relative for each in chance.logged) > 10 * self.tolerance:
                why = (
                    f"uninterrupted runs on {self.ranks[0]} and on {counted(other, 'rank')} differ, too "
                    f"({apart(chance)}): what is drawn at random depends on the ranks (dropout?); rehearse on "
                    "one number of ranks to be told more"
                )
                return self._verdict("nondeterministic", why, chance, hints)
            if found.within(self.tolerance, chance=chance):
                why = f"{equal(found)}, as far as uninterrupted runs on other ranks are ({apart(found)})"
                return self._verdict("equal", why, found, hints)
        return self._verdict("differs", self._where(found), found, [*causes(found, _untracked(run)), *hints])

    def _remarks(self, run: Path, *, hits: int, pace_s: float) -> list[str]:
        """Tell what makes the rehearsal tell less than it might."""
        remarks = [
            f"{counted(each.world_size or 0, 'rank')} were declined: {each.evidence}"
            for each in status(run).attempts
            if each.cause == "declined"
        ]
        if pace_s < _SHORTEST_S:
            remarks.append(f"it trains for {pace_s:.1f} s only; more steps would tell more")
        if hits < len(self.plan):
            remarks.append(f"only {hits} of {len(self.plan)} interruptions came in time; give it more steps")
        return remarks

    def _control(self, whole: Path, ranks: int, *, name: str) -> Comparison:
        run = self._run(self.root / name, (ranks,))
        if (state := run.finish()) != "COMPLETED":
            raise _UnfinishedError(f"the script came to its end once, but not again ({state}): {_tail(run)}")
        return compare_runs(whole, run.run_dir, generators=ranks == self.ranks[0])

    def _run(
        self,
        run_dir: Path,
        ranks: Sequence[int],
        plan: Sequence[Interruption] = (),
        *,
        steps: int | None = None,
    ) -> Rehearsed:
        config = settings_for(self.config, run_dir, ranks, plan, steps=steps)
        return Rehearsed(self.entry, self.kwargs, config, run_dir, until=self.until)

    @property
    def _ranks_in_turn(self) -> list[int]:
        return [self.ranks[place % len(self.ranks)] for place in range(len(self.plan) + 1)]

    # ------------------------------------------------- words

    def _verdict(
        self, verdict: Verdict, why: str, comparison: Comparison | None = None, hints: Sequence[str] = ()
    ) -> Rehearsal:
        return Rehearsal(
            what=self.entry.name,
            verdict=verdict,
            why=why,
            seed=self.seed,
            hints=tuple(hints),
            acts=tuple(self._acts()),
            comparison=comparison,
        )

    def _acts(self) -> Iterator[Act]:
        """Tell each allocation of the interrupted run."""
        run = RunDirectory(self.root / "interrupted")
        attempts: dict[int | None, AttemptStatus] = {}
        with contextlib.suppress(CheckpointNotFound):
            attempts = {each.restart_count: each for each in status(run.root).attempts}
        strikes = {each.allocation: each for each in self.strikes}
        known = [place for place in (*attempts, *strikes) if place is not None]
        for place in range(max(known, default=-1) + 1):
            attempt, strike = attempts.get(place), strikes.get(place)
            planned = self._ranks_in_turn[min(place, len(self.plan))]
            declined = "declined" if attempt is not None and attempt.cause == "declined" else None
            yield Act(
                ranks=(attempt and attempt.world_size) or planned,
                interrupted_by=declined if strike is None else strike.interruption.kind,
                moment=None if strike is None else strike.interruption.moment,
                first_step=None if attempt is None else attempt.first_step,
                last_step=None if attempt is None else attempt.last_step,
                steps_lost=0 if attempt is None else attempt.steps_lost,
                saved_after_s=None
                if attempt is None or strike is None
                else _saved_after(run, attempt, strike),
            )

    def _where(self, found: Comparison) -> str:
        """Say where it began to differ, in terms of attempts."""
        if not found.logged:
            return "the final state differs"
        step = found.logged[0].step
        later = [place for place, act in enumerate(self._acts()) if place and (act.first_step or 0) <= step]
        begun = [
            act.first_step for act in self._acts() if act.first_step is not None and act.first_step <= step
        ]
        if not later or not begun or begun[-1] == 0:
            return f"it differs from step {step} on"
        return f"it differs from step {step} on, {counted(step - begun[-1], 'step')} after it went on from step {begun[-1]}"


def _by_itself(again: Comparison) -> str:
    where = f", from step {again.logged[0].step} on" if again.logged else ""
    return f"two uninterrupted runs differ{where}, so nothing can be said of interrupted ones"


def _untracked(run: Path) -> list[str]:
    """Read what the script has that has a state and is not tracked, as :mod:`hpc_resume.run.rehearsing` leaves it."""
    with contextlib.suppress(OSError, ValueError):
        return [str(name) for name in json.loads((run / "untracked.json").read_text())]
    return []


def _saved_after(run: RunDirectory, attempt: AttemptStatus, strike: Strike) -> float | None:
    """Seconds from a strike until what the attempt had done was committed; None if it was not all of it."""
    events = read_events(run.attempt(attempt.attempt) / "events.jsonl")
    saved = [
        each for each in events if each.get("event") == "saved" and each.get("step") == attempt.last_step
    ]
    if strike.interruption.kind == "kill" or not saved:
        return None
    return max(float(saved[-1]["t"]) - strike.at, 0.0)


def _tail(run: Rehearsed, lines: int = 12) -> str:
    """End of the log of rank 0, or of one that has more to say."""
    logs = [path.read_text(errors="replace") for path in sorted(run.job.log_path().parent.glob("*_log.out"))]
    told = next((log for log in logs if "Error" in log), logs[0] if logs else "")
    return "\n" + "\n".join(told.splitlines()[-lines:])
