"""What ends an attempt on the real Slurm, told from facts: cause, evidence, and what was decided."""

import os
import signal

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from hpc_resume.report.explain import explain
from hpc_resume.rundir import RunDirectory
from tests.slurm.scenario import Scenario


def events(run, attempt, kind):
    found = read_events(RunDirectory(run.root).attempt(attempt) / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def last_word(run, attempt=1):
    (event,) = events(run, attempt, "ended")
    return event


def told(run, attempt=1):
    return "\n".join(explain(run.root).attempts[attempt - 1].lines)


def test_a_rank_that_is_killed_is_seen_by_the_one_beside_it(cluster):
    run = Scenario(cluster, "killed-rank", constraint="v100", tasks_per_node=2)
    run.wait_for_progress()
    pid = run.pid_of_rank(1)
    job = cluster.job(run.job)
    os.kill(pid, signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    word = last_word(run)
    assert (word["cause"], word["decision"], word["nodes"]) == ("crash", "continue", [job["NodeList"]])
    assert f"rank 1 on {job['NodeList']}: its process ({pid}) is gone" in word["evidence"]
    assert word["delay_s"] == 0
    assert "a rank that crashed" in told(run)
    run.was_started_again_in_place(job["StartTime"])


def test_when_all_ranks_are_killed_the_next_attempt_finds_out(cluster):
    """A successor waits while the ranks are started again, and is cancelled when they are done."""
    run = Scenario(cluster, "killed-all", constraint="v100", settings={"continuation": "chain"})
    run.wait_for_progress()
    (successor,) = (run.root / f"continuation/after-{run.job}").read_text().split()
    os.kill(run.pid_of_rank(0), signal.SIGKILL)
    assert run.wait_until_over() == "COMPLETED", run.log()
    cluster.wait_state(successor, "CANCELLED", "GONE", timeout_s=180)
    assert events(run, 1, "ended") == []
    (found,) = events(run, 2, "diagnosed")
    assert (found["attempt"], found["cause"]) == (1, "crash")
    assert "the ranks died of SIGKILL" in found["evidence"]
    assert found["nodes"] == list(events(run, 1, "met")[0]["ranks"])
    first, second = run.status()["attempts"]
    assert (first["cause"], first["diagnosed_by"]) == ("crash", 2)
    assert first["job_id"] == second["job_id"] == run.job
    assert "found out by attempt 2" in told(run)
    assert "in place" in run.log()


def test_a_requeue_by_an_administrator(cluster):
    run = Scenario(cluster, "requeued", constraint="v100")
    run.wait_for_progress()
    cluster.run("scontrol", "requeue", run.job)
    run.wait_for_progress(attempt=2, step=30)
    assert run.wait_until_over() == "COMPLETED", run.log()
    word = last_word(run)
    assert (word["cause"], word["decision"], word["delay_s"]) == ("requeue", "continue", 0)
    assert "Restarts=1" in word["evidence"]
    assert cluster.job(run.job)["Restarts"] == "1"
    assert run.status()["steps_lost"] == 0


def test_a_cancel_is_for_good(cluster):
    run = Scenario(cluster, "cancelled", steps=5000, constraint="v100", tasks_per_node=2)
    run.wait_for_progress()
    cluster.cancel(run.job)
    assert run.wait_until_over() == "CANCELLED"
    found = run.status()
    assert (found["state"], len(found["attempts"])) == ("cancelled", 1)
    # It was saved all the same: whoever submits it again goes on from there.
    assert store.find(RunDirectory(run.root))[1].step == found["attempts"][0]["last_step"]
    assert cluster.job(run.job)["Restarts"] == "0"
    word = last_word(run)
    assert (word["cause"], word["decision"]) == ("cancel", "stop")
    assert "JobState=COMPLETING Reason=None" in word["evidence"]
    assert "a cancel is for good" in told(run)
    assert "submit it again" in explain(run.root).outlook.lines[0]


def test_a_hang_is_no_signal(cluster):
    run = Scenario(cluster, "hung", constraint="v100", train="hang_at=20, stop={'watchdog_s': 2}", steps=40)
    run.wait_for_progress()
    run.wait_for(lambda: (run.root / "step").read_text() == "20", 60, "it hangs")
    cluster.run("scancel", "--signal=USR2", run.job)
    run.wait_for(lambda: events(run, 1, "ended"), 60, "it gives up")
    cluster.cancel(run.job)
    word = last_word(run)
    assert (word["cause"], word["decision"]) == ("hang", "continue")
    assert "no step ended within 2 s of the request to stop" in word["evidence"]
    assert "SIGUSR2" in word["evidence"]


def test_a_mistake_on_one_rank_is_not_repeated(cluster):
    run = Scenario(
        cluster, "mistaken", constraint="v100", tasks_per_node=2,
        train="fail_at=0 if os.environ['SLURM_PROCID'] == '1' else None",
    )  # fmt: skip
    assert run.wait_until_over() == "FAILED", run.log()
    word = last_word(run)
    assert (word["cause"], word["decision"]) == ("crash", "stop")
    assert "rank 1 on small" in word["evidence"]
    assert "ValueError: something in the script" in word["evidence"]
    assert cluster.job(run.job)["Restarts"] == "0"


def test_a_crash_that_comes_again_stops(cluster):
    more = "fail_at=15, budget={'max_idle': 2}"
    run = Scenario(cluster, "crashing", constraint="v100", train=more, steps=40)
    assert run.wait_until_over() == "FAILED", run.log()
    words = [last_word(run, number) for number in (1, 2, 3)]
    assert [word["cause"] for word in words] == ["crash"] * 3
    assert [word["decision"] for word in words] == ["continue", "continue", "stop"]
    assert words[1]["exclude"] == words[1]["nodes"]
    assert "no progress in 2 attempts in a row" in words[2]["because"]
    assert "when it is mended, submit it again" in explain(run.root).outlook.lines[-1]


def test_a_node_that_dies_under_a_run(cluster):
    run = Scenario(cluster, "node-dies", nodes=2)
    run.wait_for_progress()
    (met,) = events(run, 1, "met")
    first, second = met["ranks"]
    cluster.kill_node(second)
    try:
        assert run.wait_until_over() == "COMPLETED", run.log()
    finally:
        cluster.restore_node(second)
    (found,) = events(run, 2, "diagnosed")
    assert (found["cause"], found["nodes"]) == ("node_failure", [second])
    assert f"node {second}: State=DOWN" in found["evidence"]
    assert f"2 ranks on {first}, {second}" in told(run)
    assert run.status()["attempts"][0]["cause"] == "node_failure"
    assert verify_run(run.root) == []
