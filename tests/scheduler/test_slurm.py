import datetime as dt
import subprocess

import pytest
import stamina

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.command import Completed
from hpc_resume.scheduler.slurm import SlurmScheduler, parse_job

# As Slurm 22.05.8 prints it; the name and the comment try to look like fields.
RUNNING = """\
JobId=12 ArrayJobId=9 ArrayTaskId=3 JobName=x JobState=CANCELLED Reason=TimeLimit
   UserId=eve(1000) GroupId=eve(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=00:10:00 TimeMin=N/A
   StartTime=1795508453 EndTime=1795509053 Deadline=N/A
   PreemptEligibleTime=1795508453 PreemptTime=None
   Partition=low AllocNode:Sid=vm:2548
   Comment=a b PreemptTime=1795508453 Restarts=7
"""
NODE = """\
NodeName=big1 Arch=x86_64 CoresPerSocket=8
   AvailableFeatures=a100,nvlink
   ActiveFeatures=a100
   Gres=gpu:A100:4(S:0-1)
"""


def job(state="RUNNING", reason="None", restarts=0, preempt="None", end="1795509053"):
    return (
        RUNNING.replace("   JobState=RUNNING Reason=None", f"   JobState={state} Reason={reason}")
        .replace("Requeue=1 Restarts=2", f"Requeue=1 Restarts={restarts}")
        .replace("1795508453 PreemptTime=None", f"1795508453 PreemptTime={preempt}")
        .replace("EndTime=1795509053", f"EndTime={end}")
    )


class FakeSlurm:
    """Answers each command, named by its first two words, from a list; the last answer again and again."""

    def __init__(self, **answers):
        self.answers = {
            name.replace("_", " "): list(given if isinstance(given, list) else [given])
            for name, given in answers.items()
        }
        self.asked = []

    def __call__(self, words, timeout_s):
        self.asked.append(list(words))
        assert timeout_s > 0
        queue = self.answers[" ".join(words[:2]) if words[0] == "scontrol" else words[0]]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            return Completed(code=0, out=answer, err="")
        if isinstance(answer, Completed):
            return answer
        code, err = answer
        return Completed(code=code, out="", err=err)

    def count(self, *words):
        return sum(asked[: len(words)] == list(words) for asked in self.asked)


@pytest.fixture(autouse=True)
def _no_waiting():
    with stamina.set_testing(testing=True, attempts=3, cap=True):
        yield


def scheduler(fake, **given):
    return SlurmScheduler("9_3", runner=fake, **given)


def test_the_fields_are_read_where_no_job_name_can_put_them():
    facts = parse_job(RUNNING)
    assert (facts.state, facts.reason, facts.restarts) == ("RUNNING", None, 2)
    assert (facts.preempt_time_s, facts.end_time_s) == (None, 1795509053.0)
    assert "JobState=RUNNING" in facts.evidence
    assert "CANCELLED" not in facts.evidence


def test_reason_and_preemption():
    facts = parse_job(job("COMPLETING", "TimeLimit", preempt="1795508480"))
    assert (facts.state, facts.reason, facts.preempt_time_s) == ("COMPLETING", "TimeLimit", 1795508480.0)


def test_a_partition_without_preemption_shows_no_preempt_time():
    lines = [line for line in RUNNING.splitlines() if not line.startswith("   Preempt")]
    facts = parse_job("\n".join(lines))
    assert (facts.state, facts.preempt_time_s, facts.end_time_s) == ("RUNNING", None, 1795509053.0)


def test_local_time_is_understood_where_slurm_ignores_our_format():
    expected = dt.datetime(2026, 11, 24, 8, 30, 53).astimezone().timestamp()
    assert parse_job(job(end="2026-11-24T08:30:53")).end_time_s == expected
    assert parse_job(job(end="Unknown")).end_time_s is None


def test_text_that_is_no_job_is_unknown():
    assert parse_job("slurm_load_jobs error").state == "UNKNOWN"


def test_facts_ask_for_the_element_of_the_array():
    fake = FakeSlurm(scontrol_show=job())
    assert scheduler(fake).facts().state == "RUNNING"
    assert fake.asked == [["scontrol", "show", "job", "9_3"]]


@pytest.mark.parametrize(
    "hiccup",
    [
        pytest.param((-15, ""), id="killed by the job's SIGTERM"),
        pytest.param("", id="printed nothing"),
        pytest.param((1, "Unable to contact slurm controller (connect failure)"), id="controller busy"),
        pytest.param(subprocess.TimeoutExpired("scontrol", 10), id="hung"),
    ],
)
def test_a_lookup_is_tried_again(hiccup):
    fake = FakeSlurm(scontrol_show=[hiccup, job()])
    assert scheduler(fake).facts().state == "RUNNING"
    assert len(fake.asked) == 2


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        pytest.param((1, "Unable to contact slurm controller"), 3, id="controller down"),
        pytest.param(subprocess.TimeoutExpired("scontrol", 10), 3, id="hangs"),
        pytest.param((1, "slurm_load_jobs error: Invalid job id specified"), 1, id="no such job: final"),
        pytest.param(Completed(code=1, out="Job 9_3 not found", err=""), 1, id="no such element: final"),
        pytest.param(BlockingIOError("fork"), 3, id="no process left"),
        pytest.param(FileNotFoundError("scontrol"), 1, id="no scontrol"),
    ],
)
def test_a_lookup_that_fails_is_unknown_and_says_why(answer, tries):
    fake = FakeSlurm(scontrol_show=answer)
    facts = scheduler(fake).facts()
    assert facts.state == "UNKNOWN"
    assert facts.evidence
    assert len(fake.asked) == tries


def test_a_requeue_by_preemption_is_told_by_squeue():
    fake = FakeSlurm(scontrol_show=job("COMPLETING", restarts=1), squeue="1795508480   \n")
    facts = scheduler(fake, nodes="big[1-2]").facts()
    assert facts.preempt_time_s == 1795508480.0
    assert "PreemptTime=1795508480" in facts.evidence


def test_a_requeue_by_node_failure_is_told_by_sinfo():
    fake = FakeSlurm(scontrol_show=job("COMPLETING", restarts=1), squeue="N/A\n", sinfo="big2\nbig2\n")
    facts = scheduler(fake, nodes="big[1-2]").facts()
    assert (facts.reason, facts.preempt_time_s) == ("NodeDown", None)
    assert "--nodes=big[1-2]" in fake.asked[-1]


def test_a_requeue_by_a_person_stays_without_reason():
    fake = FakeSlurm(scontrol_show=job("COMPLETING", restarts=1), squeue="N/A\n", sinfo="")
    assert scheduler(fake, nodes="big1").facts().reason is None


def test_why_is_not_asked_before_a_requeue():
    fake = FakeSlurm(scontrol_show=job("RUNNING", restarts=2))
    scheduler(fake, own_restarts=2).facts()
    assert fake.count("squeue") == 0


def test_requeue():
    fake = FakeSlurm(scontrol_show=job(), scontrol_requeue="")
    assert scheduler(fake).requeue() is True
    assert fake.asked[-1] == ["scontrol", "requeue", "9_3"]


@pytest.mark.parametrize(
    "answer", ["Job is pending execution for job 8", "9_0-1: Job is pending execution", "already pending"]
)
def test_a_job_that_is_pending_already_is_requeued(answer):
    fake = FakeSlurm(scontrol_show=job(), scontrol_requeue=(1, answer))
    assert scheduler(fake).requeue() is True
    assert fake.count("scontrol", "requeue") == 1


def test_a_requeue_that_died_of_its_own_success():
    fake = FakeSlurm(scontrol_show=job(), scontrol_requeue=[(-15, ""), (1, "Job is pending execution")])
    assert scheduler(fake).requeue() is True


def test_slurm_has_requeued_it_already():
    fake = FakeSlurm(scontrol_show=job("COMPLETING", restarts=3))
    assert scheduler(fake, own_restarts=2).requeue() is True
    assert fake.count("scontrol", "requeue") == 0


def test_after_the_time_limit_it_can_still_be_requeued():
    fake = FakeSlurm(scontrol_show=job("COMPLETING", "TimeLimit"), scontrol_requeue="")
    assert scheduler(fake).requeue() is True


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "SOMETHING_NEW"])
def test_a_cancelled_job_is_not_brought_back_to_life(state):
    fake = FakeSlurm(scontrol_show=job(state), scontrol_requeue="")
    with pytest.raises(SchedulerError, match=r"^job 9_3: not requeued, because it is being ended"):
        scheduler(fake).requeue()
    assert fake.count("scontrol", "requeue") == 0


def test_a_job_that_cannot_be_looked_up_is_not_requeued():
    fake = FakeSlurm(scontrol_show=(1, "Unable to contact slurm controller"), scontrol_requeue="")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        scheduler(fake).requeue()
    assert fake.count("scontrol", "requeue") == 0


def test_a_refusal_is_not_tried_again():
    fake = FakeSlurm(
        scontrol_show=job(), scontrol_requeue=(1, "Requested operation is presently disabled for job 8")
    )
    with pytest.raises(SchedulerError, match=r"presently disabled.*exit code 75"):
        scheduler(fake).requeue()
    assert fake.count("scontrol", "requeue") == 1


def test_without_scontrol_only_the_exit_code_can_requeue():
    assert scheduler(FakeSlurm(scontrol_show=FileNotFoundError("scontrol"))).requeue() is False


@pytest.mark.parametrize(
    ("node", "partition", "expected"),
    [
        (NODE, "main", "main/a100"),
        (NODE, None, "a100"),
        (NODE.replace("ActiveFeatures=a100", "ActiveFeatures=(null)"), "main", "main/a100,nvlink"),
        (NODE.replace("=a100,nvlink", "=(null)").replace("=a100", "=(null)"), "main", "main/gpu:A100"),
        ("NodeName=n1 Arch=x86_64\n   Gres=(null)\n", "main", "main"),
        ("NodeName=n1 Arch=x86_64\n", None, None),
        ((1, "Node n1 not found"), "main", "main"),
        (FileNotFoundError("scontrol"), None, None),
    ],
)
def test_node_type(node, partition, expected):
    fake = FakeSlurm(scontrol_show=node)
    assert scheduler(fake, partition=partition).node_type("big1") == expected
    assert fake.asked[0] == ["scontrol", "show", "node", "big1"]


def test_cancel():
    fake = FakeSlurm(scancel="")
    scheduler(fake).cancel()
    assert fake.asked == [["scancel", "9_3"]]


@pytest.mark.parametrize("answer", [(1, "Invalid job id specified"), FileNotFoundError("scancel")])
def test_a_cancel_that_fails_names_the_job(answer):
    with pytest.raises(SchedulerError, match=r"^job 9_3: "):
        scheduler(FakeSlurm(scancel=answer)).cancel()
