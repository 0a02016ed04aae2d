"""How an attempt ends: by its cause and the budget, on to the next attempt or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hpc_resume.config import Config
from hpc_resume.errors import EXIT_CONTINUE, EXIT_FAILED, SchedulerError
from hpc_resume.files import Clock, JsonObject
from hpc_resume.journal import Journal
from hpc_resume.policy.decision import Decision
from hpc_resume.policy.nodetypes import after_decline, configured_type
from hpc_resume.policy.retry import PastAttempt, avoid, decide, in_vain, why_spent
from hpc_resume.run.attempt import AttemptFacts
from hpc_resume.run.continuation import Continuation
from hpc_resume.run.fault import Fault
from hpc_resume.run.peers import Peers
from hpc_resume.scheduler.base import UNKNOWN, Scheduler
from hpc_resume.scheduler.cause import CERTAIN, Cause, Verdict, classify
from hpc_resume.scheduler.environment import JobEnvironment
from hpc_resume.settings import NodeType


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The last word of an attempt.

    Parameters
    ----------
    verdict
        Why it ended.
    decision
        ``"continue"``, ``"stop"`` or ``"done"``.
    why
        In words: the cause, what was decided and why, and how the run goes on.
    exit_code
        What every rank leaves with.
    how
        How the run goes on, as it was decided.
    """

    verdict: Verdict
    decision: str
    why: str
    exit_code: int
    how: Decision | None = None

    def to_json(self) -> JsonObject:
        """JSON form; the journal's fields."""
        record: JsonObject = {
            "cause": self.verdict.cause.value,
            "evidence": self.verdict.evidence,
            "decision": self.decision,
            "why": self.why,
            "exit_code": self.exit_code,
        }
        if self.verdict.nodes:
            record["nodes"] = list(self.verdict.nodes)
        if self.how is not None:
            record["because"] = self.how.why
            if self.how.action == "continue":
                record["delay_s"] = self.how.delay_s
                record["exclude"] = list(self.how.exclude)
                record["move_on"] = self.how.move_on
        return record


class LastWord:
    """Ends an attempt on its rank 0: decides, has the run continued or not, writes the journal.

    The other ranks decide alike.

    Parameters
    ----------
    environment, scheduler, config
        Of the attempt.
    continuation
        How the run goes on; on rank 0.
    clock
        Unix time in seconds.
    journal
        On rank 0; elsewhere nothing is written.
    facts
        Who this attempt is, and what came before.
    """

    def __init__(
        self,
        environment: JobEnvironment,
        scheduler: Scheduler,
        config: Config,
        continuation: Continuation,
        *,
        clock: Clock,
        journal: Journal | None,
        facts: AttemptFacts,
    ) -> None:
        self._environment = environment
        self._scheduler = scheduler
        self._config = config
        self._continuation = continuation
        self._clock = clock
        self._journal = journal
        self._facts = facts

    @property
    def attempt(self) -> int:
        """Number of the attempt."""
        return self._facts.number

    def why_spent(self, first_step: int) -> str | None:
        """Tell why an attempt that begins at this step must not be tried, or ``None``."""
        return why_spent(in_vain(self._facts.history.past, first_step), self._config.budget)

    def end(
        self,
        verdict: Verdict,
        *,
        first_step: int,
        step: int,
        progressed: bool,
        fault: Fault | None = None,
    ) -> Ending:
        """Decide, tell the scheduler, and write it down.

        Parameters
        ----------
        verdict
            Why the attempt ends.
        first_step, step
            Completed steps at its start, and now.
        progressed
            Whether this attempt has saved anything new.
        fault
            What went wrong, if something did. All ranks leave by themselves then, so where the launcher acts on
            exit code 75, the scheduler need not be told in the midst of it.
        """
        now = PastAttempt(
            number=self._facts.number,
            cause=verdict.cause.value,
            first_step=first_step,
            node_type=self._facts.node_type,
            faulty=verdict.nodes,
        )
        decision = decide(
            now,
            self._facts.history,
            self._config.budget,
            progressed=progressed or self._environment.job_id is None,
            begun=step > first_step,
            mistake=fault is not None and fault.mistake,
            chance=random.random(),  # noqa: S311 - spreads retries, keeps no secret
        )
        if self._environment.rank != 0:
            return _ending(verdict, decision, "")
        return self.carry_out(verdict, decision, step=step, failing=fault is not None)

    def leave_bad_nodes(self, ranks: dict[str, list[int]] | None, peers: Peers) -> str | None:
        """Have the run continued elsewhere, before its first step, if these nodes have failed it before.

        Parameters
        ----------
        ranks
            By node; rank 0 alone knows, and decides.
        peers
            The other ranks.

        Returns
        -------
        str or None
            Why all ranks leave now; ``None`` if they stay.
        """
        decision = None
        if ranks is not None and self._environment.kind == "slurm":  # elsewhere there are no other nodes
            decision = avoid(tuple(ranks), self._facts.history, self._config.budget)
        why: str | None = peers.share("avoid", decision and decision.why)
        if decision is not None:
            evidence = f"the attempt was started on {', '.join(ranks or ())}"
            self.carry_out(Verdict(cause=Cause.BAD_NODE, evidence=evidence), decision, step=0)
        return why

    def decline(self, why: str, node_type: NodeType | None, peers: Peers, *, step: int) -> tuple[int, str]:
        """Have the run continued on another of its node types, or end it if none is left.

        Parameters
        ----------
        why
            What speaks against this one.
        node_type
            Which of the configured ones it is, if that is known.
        peers
            The other ranks, all of which come here.
        step
            Completed steps.

        Returns
        -------
        (int, str)
            Exit code of all ranks, and the reason.
        """
        told = None
        if self._environment.rank == 0:
            types, facts = self._config.node_types, self._facts
            names = [node_type.name if node_type is not None else str(facts.node_type)]
            for each in reversed(facts.history.past):
                if each.cause != Cause.DECLINED.value:
                    break
                earlier = configured_type(types, found=each.node_type, asked=None)
                names.insert(0, earlier.name if earlier is not None else str(each.node_type))
            decision = after_decline(
                names, [each.name for each in types], patience=self._config.budget.max_idle
            )
            verdict = Verdict(cause=Cause.DECLINED, evidence=why)
            ending = self.carry_out(verdict, decision, step=step, failing=True)
            told = [ending.exit_code, ending.why]
        code, reason = peers.share("declined", told)
        return code, reason

    def carry_out(self, verdict: Verdict, decision: Decision, *, step: int, failing: bool = False) -> Ending:
        """Tell the scheduler what was decided, and write it down.

        Parameters
        ----------
        verdict
            Why the attempt ends.
        decision
            How the run goes on.
        step
            Completed steps.
        failing
            All ranks leave by themselves.
        """
        ending = end_attempt(
            verdict,
            decision,
            self._scheduler,
            self._continuation,
            own_restarts=self._environment.restart_count,
            warning_lead_s=self._config.warning_lead_s,
            now_s=self._clock(),
            exit_code_suffices=failing and self._environment.launcher_requeues,
        )
        self.write(ending, step=step)
        return ending

    def fail(self, fault: Fault, *, first_step: int, step: int, progressed: bool) -> int:
        """End an attempt that fails, and return the exit code; parameters as for :meth:`end`."""
        verdict = fault.verdict
        if verdict.cause is Cause.UNKNOWN and self._environment.rank == 0:
            verdict = self._why_lost(verdict)
        if fault.exit_code is None and self._environment.job_id is not None:
            ending = self.end(verdict, first_step=first_step, step=step, progressed=progressed, fault=fault)
            return ending.exit_code
        why = (
            "nobody starts it again by itself"
            if fault.exit_code is None
            else "no further attempt would mend it"
        )
        ending = _ending(verdict, Decision(action="stop", why=why), "")
        ending = replace(ending, exit_code=fault.exit_code or EXIT_FAILED)
        self.write(ending, step=step, fenced=fault.fenced)
        return ending.exit_code

    def _why_lost(self, verdict: Verdict) -> Verdict:
        """Ask the scheduler why a peer was lost; only what it says for certain counts."""
        facts = self._scheduler.facts()
        if facts.state == UNKNOWN:
            return verdict
        again = classify(
            "no signal",
            facts,
            own_restarts=self._environment.restart_count,
            now_s=self._clock(),
            warning_lead_s=self._config.warning_lead_s,
        )
        if again.cause not in CERTAIN:
            return verdict
        return replace(again, evidence=f"{verdict.evidence}; {again.evidence}")

    def note(self, cause: Cause, decision: str, why: str, *, step: int, exit_code: int) -> None:
        """Write an ending that needed no decision."""
        verdict = Verdict(cause=cause, evidence=why)
        self.write(Ending(verdict=verdict, decision=decision, why=why, exit_code=exit_code), step=step)

    def write(self, ending: Ending, *, step: int, fenced: bool = False) -> None:
        """Write an ending; on rank 0 nothing comes after one that is none to go on, unless it has come already."""
        if self._journal is not None:
            if ending.decision != "continue" and not fenced:
                self._continuation.end(ending.why)
            self._journal.event("ended", durable=True, step=step, **ending.to_json())


def end_attempt(
    verdict: Verdict,
    decision: Decision,
    scheduler: Scheduler,
    continuation: Continuation,
    *,
    own_restarts: int,
    warning_lead_s: float,
    now_s: float,
    exit_code_suffices: bool,
) -> Ending:
    """Have a decision carried out.

    Parameters
    ----------
    verdict
        Why the attempt ends, as judged when the signal came.
    decision
        How the run goes on.
    scheduler
        Of this job.
    continuation
        Who has it go on.
    own_restarts, warning_lead_s, now_s
        For judging anew if the scheduler refuses.
    exit_code_suffices
        The launcher acts on exit code 75, and this process need not call the scheduler itself.
    """
    if decision.action == "stop":
        return _ending(verdict, decision, "")
    try:
        how = (
            continuation.leave(decision)
            if exit_code_suffices
            else continuation.go_on(decision, already=verdict.already_requeued)
        )
    except SchedulerError as error:
        # Saving took its time: somebody may have cancelled the job meanwhile.
        again = classify(
            "SIGTERM",
            scheduler.facts(),
            own_restarts=own_restarts,
            now_s=now_s,
            warning_lead_s=warning_lead_s,
        )
        if again.cause is Cause.CANCEL:
            stop = Decision(action="stop", why="a person cancelled it while it was saving")
            return _ending(again, stop, "")
        how = f"not requeued from here ({error}), left to exit code {EXIT_CONTINUE}"
    return _ending(verdict, decision, how)


def _ending(verdict: Verdict, decision: Decision, done: str) -> Ending:
    why = f"{verdict.cause.value} ({verdict.evidence}); {decision.why}"
    return Ending(
        verdict=verdict,
        decision=decision.action,
        why=f"{why}; {done}" if done else why,
        exit_code=EXIT_CONTINUE if decision.action == "continue" else EXIT_FAILED,
        how=decision,
    )
