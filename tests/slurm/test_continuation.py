"""Every way to go on, on the real Slurm, and what may come between.

Slurm takes its time, so all runs go side by side: each ``scenario_x`` runs in a thread of its own, and
``test_x`` looks at what came of it. Their ranks (``link.py``) do without torch; the last tests train.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.journal import read_events
from hpc_resume.launch.script import render
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.notes import Notes
from tests.run.training import train
from tests.slurm import table
from tests.slurm.cluster import PrivateCluster

LINK = Path(__file__).parent / "link.py"
ROOT = Path(__file__).parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "GONE")
STOP = {"until": "signal", "go_on": {}, "code": 75}
DONE = {"until": "once", "end": "all steps are done", "code": 0}
WAYS = ("requeue", "chain", "array", "exit", "login")


class Run:
    """A run whose attempts do what they are told to: see ``link.py``."""

    def __init__(
        self, cluster, name, way, *plan, types=({"constraint": "v100"},), slurm=None, script=None, limit_s=300,
        in_place=2,
    ):  # fmt: skip
        self.cluster, self.name = cluster, name
        self.path = cluster.work / f"{name}.jsonl"
        self.path.touch()
        self.root = cluster.work / "runs" / name
        config = Config.load(
            overrides={
                "name": name,
                "continuation": way,
                "budget.restarts_in_place": in_place,
                "scheduler": "slurm",
                "run_dir": str(self.root),
                "time_limit_s": limit_s,
                "warning_lead_s": 10,
                "node_types": [{"mem_gb": 0.1, **each} for each in types],
                "environment.variables": {"PYTHONPATH": str(ROOT)},
                "slurm": slurm or {},
            }
        )
        command = [sys.executable, str(LINK), str(self.path), json.dumps(plan)]
        if script is not None:
            (cluster.work / f"{name}.py").write_text(script)
            command = [sys.executable, str(cluster.work / f"{name}.py")]
        self.script = cluster.work / f"{name}.sbatch"
        self.script.write_text(render(config, command=command, run_dir=self.root))
        self.id = cluster.sbatch(self.script)
        self.notes = Notes(self.root)

    def records(self, event="begun"):
        found = map(json.loads, self.path.read_text().splitlines())
        return [record for record in found if record["event"] == event]

    def wait(self, count=1, event="begun", timeout_s=120):
        why = f"{self.name}: {count} x {event}"
        try:
            self.cluster.wait_for(lambda: len(self.records(event)) >= count, timeout_s, why)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return self.records(event)[count - 1]

    def queue(self):
        return [job for job in self.cluster.queue() if job["name"] == self.name]

    def wait_until_nothing_is_left(self, timeout_s=120):
        self.cluster.wait_for(
            lambda: not self.queue(), timeout_s, f"{self.name}: nothing is left\n{self.log}"
        )
        return self

    def wait_until_it_has_gone_on(self):
        """Or until nothing is left that could, then for the end."""
        self.cluster.wait_for(
            lambda: len(self.records()) > 1 or not self.queue(), 200, f"{self.name} goes on\n{self.log}"
        )
        return self.wait_until_nothing_is_left()

    def stop(self, count=1):
        """Warn the attempt, as before a time limit."""
        # For an element of an array, scancel signals it and says all the same that it is done (2021).
        job = self.wait(count)["job"]
        for patience_s in (2, 4, 4):  # else it tries again, and would hit the next attempt, 5 s later
            self.cluster.run("timeout", str(patience_s), "scancel", "--signal=USR2", job, check=False)
            with contextlib.suppress(AssertionError):  # on a slow machine it was not ready in time
                return self.wait(count, "signal", timeout_s=20)
        return self.wait(count, "signal")

    def hpc_resume(self, *words):
        command = [sys.executable, "-c", "from hpc_resume.cli import main; main()", *words]
        done = subprocess.run(
            command, env=self.cluster.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        return done.stdout.strip() + done.stderr.strip()

    @property
    def log(self):
        paths = sorted(self.cluster.work.glob(f"{self.name}-*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(path.read_text() for path in paths)


def only_one_at_a_time(run):
    """Whether each attempt began after the one before had ended."""
    events = [json.loads(line)["event"] for line in run.path.read_text().splitlines()]
    turns = [event for event in events if event != "signal"]
    return turns == ["begun", "ended"] * (len(turns) // 2)


def what_came(run, way):
    """What came of a run that something happened to once, in words."""
    first, *rest = (record for record in run.records() if record["rank"] == 0)
    if not rest and way == "login":
        answer = run.hpc_resume("resubmit", str(run.root))
        if answer.startswith("submitted"):
            run.wait_until_nothing_is_left()
            assert len(run.records()) == 2
            return "waits for `hpc-resume resubmit`"
    if not rest:
        print(run.name, "is over:", run.notes.read("over", run.id), run.log)  # noqa: T201 - shown if it is wrong
        return "over"
    assert len(rest) == 1
    if len(run.records("ended")) == len(run.records()):  # else one was killed
        assert only_one_at_a_time(run) or rest[0]["ranks"] > 1
    if (rest[0]["job"], rest[0]["restart"]) == (first["job"], first["restart"]):
        return "starts again in its allocation"
    if rest[0]["job"] == first["job"]:
        return "goes on in the same job"
    return "goes on in the next element" if way == "array" else "goes on in the next job"


# -- what happens to each run -----------------------------------------------------------------------------


def timed_out(cluster, way):
    """The time limit itself, with its warning: Slurm looks at both every 30 s only."""
    run = Run(cluster, f"timed-out-{way}", way, STOP, DONE, limit_s=60)
    run.wait(1, "signal", timeout_s=200)
    return run.wait_until_it_has_gone_on()


def requeued_by_an_administrator(cluster, way):
    run = Run(cluster, f"admin-{way}", way, STOP, DONE)
    job = run.wait()["job"]
    answer = cluster.run("scontrol", "requeue", job, check=False)
    if way in {"chain", "array"}:  # they are submitted with --no-requeue
        assert "disabled" in answer
        run.stop()
    return run.wait_until_it_has_gone_on()


def left_without_a_word(cluster, way):
    """A crash, a hang or want of memory, after which the ranks leave by themselves."""
    run = Run(cluster, f"wordless-{way}", way, {"until": "once", "code": 75}, DONE)
    run.wait()
    return run.wait_until_it_has_gone_on()


def together(cluster, name, plan, node_type, happen):
    """Let something happen to runs of all ways at once, which are all on one node."""
    runs = {way: Run(cluster, f"{name}-{way}", way, plan, DONE, types=[node_type]) for way in WAYS}
    (node,) = {run.wait()["node"] for run in runs.values()}
    happen(node)
    return {way: what_came(run.wait_until_it_has_gone_on(), way) for way, run in runs.items()}


def preempted_together(cluster, partition):
    def preempt(node):
        other = cluster.sbatch("#!/bin/bash\nsleep 1", "-p", "high", "-w", node, "--exclusive", "-t", "1")
        cluster.wait_state(other, *OVER, timeout_s=90)

    node_type = {"partition": partition, "constraint": "v100"}
    return together(cluster, f"all-{partition}", STOP, node_type, preempt)


def on_a_node_that_dies(cluster):
    return together(cluster, "dying", {"until": "killed"}, {"constraint": "a100"}, cluster.kill_node)


def stopped(cluster, way):
    run = Run(cluster, f"stopped-{way}", way, STOP, DONE)
    run.stop()
    if way == "login":
        return run.wait_until_nothing_is_left()
    run.wait(2)
    return run.wait_until_nothing_is_left()


def cancelled(cluster, way):
    run = Run(cluster, f"cancelled-{way}", way, STOP, DONE)
    cluster.cancel(run.wait()["job"])
    return run.wait_until_nothing_is_left()


def cancelled_and_stubborn(cluster, way):
    """Its ranks are killed after KillWait, the batch script too."""
    run = Run(cluster, f"stubborn-{way}", way, {"until": "killed"}, DONE)
    cluster.cancel(run.wait()["job"])
    return run.wait_until_nothing_is_left()


def cancelled_without_notice(cluster, way):
    """SIGKILL at once: nobody in the job lives to tell."""
    run = Run(cluster, f"kill-{way}", way, STOP, DONE)
    cluster.cancel("--signal=KILL", run.wait()["job"])
    return run.wait_until_nothing_is_left()


def killed(cluster, way):
    run = Run(cluster, f"killed-{way}", way, {"until": "killed"}, DONE)
    os.kill(run.wait()["pid"], signal.SIGKILL)
    return run.wait_until_it_has_gone_on()


def killed_for_good(cluster, way):
    """Where ranks are not started again in the same allocation, or have been often enough."""
    run = Run(cluster, f"dead-{way}", way, {"until": "killed"}, DONE, in_place=0)
    os.kill(run.wait()["pid"], signal.SIGKILL)
    return run.wait_until_it_has_gone_on()


def failed(cluster, way):
    run = Run(cluster, f"failed-{way}", way, {"until": "once", "code": 3})
    run.wait()
    return run.wait_until_nothing_is_left()


def over_by_a_rank(cluster, way):
    """Rank 0 says that it is over, but another code comes out."""
    run = Run(cluster, f"over-{way}", way, {"until": "once", "end": "no progress", "code": 137})
    run.wait()
    return run.wait_until_nothing_is_left()


def delayed(cluster, way):
    run = Run(cluster, f"delayed-{way}", way, {**STOP, "go_on": {"delay_s": 12}}, DONE)
    run.stop()
    run.wait(2)
    return run.wait_until_nothing_is_left()


def excluded(cluster, way):
    run = Run(cluster, f"excluded-{way}", way, {**STOP, "go_on": {"exclude": ["small1"]}}, DONE)
    run.stop()
    run.wait(2)
    return run.wait_until_nothing_is_left()


def moved_on(cluster, way):
    types = [{"name": "v", "constraint": "v100"}, {"name": "a", "constraint": "a100", "tasks_per_node": 2}]
    run = Run(cluster, f"moved-{way}", way, {**STOP, "go_on": {"move_on": True}}, DONE, types=types)
    run.stop()
    run.wait(3)  # the second attempt has two ranks
    return run.wait_until_nothing_is_left()


def successor_cancelled(cluster, way):
    """A person cancels the job that waits to go on, not the one that runs."""
    run = Run(cluster, f"unwanted-{way}", way, STOP, DONE)
    job = run.wait()["job"]
    cluster.cancel(*(run.notes.after(job) if way == "chain" else ["--state=PENDING", run.id]))
    run.stop()
    return run.wait_until_nothing_is_left()


def cancelled_by_us(cluster, way):
    run = Run(cluster, f"ours-{way}", way, STOP, DONE)
    run.wait()
    run.answer = run.hpc_resume("cancel", str(run.root))
    return run.wait_until_nothing_is_left()


def requeued_by_a_person_too(cluster, way):
    """Rank 0, the batch script and a person all want to have it run again."""
    run = Run(cluster, f"three-{way}", way, STOP, STOP, DONE)
    for count in (1, 2):
        job = run.wait(count)["job"]
        cluster.run("scancel", "--signal=USR2", job)
        cluster.run("scontrol", "requeue", job, check=False)
    run.wait(3)
    return run.wait_until_nothing_is_left()


def requeued_by_slurm_too(cluster, way):
    """A site, or a person, has insisted on --requeue: Slurm requeues a preempted job that has a successor."""
    insisted = {"additional_parameters": {"requeue": True}}
    run = Run(cluster, f"twice-{way}", way, STOP, STOP, DONE, types=[{"partition": "low0"}], slurm=insisted)
    node = run.wait()["node"]
    other = cluster.sbatch("#!/bin/bash\nsleep 1", "-p", "high", "-w", node, "--exclusive", "-t", "1")
    run.stop(2)
    run.wait(3)
    cluster.wait_state(other, *OVER)
    return run.wait_until_nothing_is_left()


def second_successor(cluster, way):
    """Somebody submits one more job that goes on from the running one."""
    run = Run(cluster, f"one-more-{way}", way, STOP, STOP, DONE)
    job = run.wait()["job"]
    script = str(run.notes.path("script", run.id))
    cluster.run("sbatch", f"--dependency=afterany:{job}", script, run.id, job, "0")
    run.stop()
    run.stop(2)
    run.wait(3)
    return run.wait_until_nothing_is_left()


def resubmitted(cluster, way):
    """Three at once submit it again, twice."""
    run = Run(cluster, f"again-{way}", way, STOP, STOP, DONE)
    run.wait()
    run.early = run.hpc_resume("resubmit", str(run.root))
    run.answers = []
    for count in (1, 2):
        run.stop(count)
        run.wait_until_nothing_is_left()
        with ThreadPoolExecutor(3) as pool:
            run.answers += pool.map(lambda _: run.hpc_resume("resubmit", str(run.root)), range(3))
        run.wait(count + 1)
    run.wait_until_nothing_is_left()
    run.late = run.hpc_resume("resubmit", str(run.root))
    return run


def watched(cluster, way):
    run = Run(cluster, f"watched-{way}", way, STOP, {"until": "killed"}, DONE, in_place=0)
    run.wait()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(run.hpc_resume, "resubmit", str(run.root), "--watch", "--every", "0.5")
        run.stop()
        os.kill(run.wait(2)["pid"], signal.SIGKILL)
        run.answer = watching.result()
    return run.wait_until_nothing_is_left()


def waited_too_long(cluster, way):
    """The first node type is not to be had; nobody is there but the queue itself."""
    types = [
        {"name": "v", "constraint": "v100", "wait_limit_s": 4},
        {"name": "a", "constraint": "a100", "nodes": 2},
    ]
    run = Run(cluster, f"waited-{way}", way, STOP, DONE, types=types)
    job = run.wait()["job"]
    first, _ = run.notes.after(job)
    # As if others had all its nodes.
    cluster.run("scontrol", "update", f"JobId={first}", "ExcNodeList=small1,small2")
    run.stop()
    run.wait(3)
    return run.wait_until_nothing_is_left()


def moved_in_the_queue(cluster, way, *, nodes=1):
    """A person has a job that waits ask for other nodes."""
    types = [{"name": "v", "constraint": "v100"}, {"name": "a", "constraint": "a100", "nodes": nodes}]
    plan = [{**STOP, "go_on": {"exclude": ["small1", "small2"]}}, DONE]
    run = Run(cluster, f"queue-{way}-{nodes}", way, *plan, types=types)
    run.wait()
    run.running = run.hpc_resume("move-on", str(run.root))
    run.stop()
    cluster.wait_for(lambda: any(job["state"] == "PENDING" for job in run.queue()), 30, "it waits")
    cluster.wait_for(lambda: not any(job["reason"] == "BeginTime" for job in run.queue()), 30, "it may begin")
    run.answer = run.hpc_resume("move-on", str(run.root))
    run.wait(1 + nodes)
    return run.wait_until_nothing_is_left()


def moved_in_the_queue_to_another_shape(cluster, way):
    return moved_in_the_queue(cluster, way, nodes=2)


SCENARIOS = {
    timed_out: WAYS,  # first, because it takes longest
    requeued_by_an_administrator: WAYS,
    left_without_a_word: WAYS,
    stopped: WAYS,
    cancelled: WAYS,
    cancelled_and_stubborn: WAYS,
    cancelled_without_notice: WAYS,
    killed: WAYS,
    killed_for_good: WAYS,
    failed: WAYS,
    over_by_a_rank: WAYS,
    delayed: ("requeue", "chain", "array", "exit"),
    excluded: ("requeue", "chain", "array", "exit"),
    moved_on: ("requeue", "chain", "exit"),
    successor_cancelled: ("chain", "array"),
    cancelled_by_us: ("requeue", "chain", "array"),
    requeued_by_a_person_too: ("requeue", "exit"),
    requeued_by_slurm_too: ("chain",),
    second_successor: ("chain",),
    resubmitted: ("login",),
    watched: ("login",),
    waited_too_long: ("chain",),
    moved_in_the_queue: ("requeue",),
    moved_in_the_queue_to_another_shape: ("requeue",),
}


#: The rows of the table in docs/slurm.md: each a scenario, or what happened to all ways together.
ROWS = {
    "the warning before the time limit, or the limit itself": timed_out,
    "the warning signal at another time, from a person or a site's tool": stopped,
    "preemption with a grace time": "low",
    "preemption without one (`PreemptMode=REQUEUE`)": "low0",
    "preemption for good (`PreemptMode=CANCEL`)": "spot",
    "an administrator's `scontrol requeue`": requeued_by_an_administrator,
    "a rank is killed: `kill -9`, or for want of memory": killed,
    "… and `budget.restarts_in_place` are used up": killed_for_good,
    "the node dies, with its ranks and the batch script": "dead node",
    "the ranks leave by themselves with code 75: a crash after the first step, a hang, want of memory": left_without_a_word,
    "what failed needs other nodes: the next node type": moved_on,
    "a person's `scancel`": cancelled,
    "… of ranks that do not react to it": cancelled_and_stubborn,
    "… that kills at once (`--signal=KILL`)": cancelled_without_notice,
    "a mistake that every attempt would repeat": failed,
    "the last word of a run: done, cancelled, no progress": over_by_a_rank,
}


@pytest.fixture(scope="module")
def all_at_once():
    """What came of runs that shared a node, by what happened to it; on a cluster that they have alone."""
    cluster = PrivateCluster()

    def happen():
        cluster.start()
        found = {partition: preempted_together(cluster, partition) for partition in ("low", "low0", "spot")}
        return found | {"dead node": on_a_node_that_dies(cluster)}

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(happen)
        yield found.result
    cluster.stop()


@pytest.fixture(scope="module")
def scenarios(cluster_of_session, all_at_once):
    with ThreadPoolExecutor(16) as pool:
        futures = {
            (function, way): pool.submit(function, cluster_of_session, way)
            for function, ways in SCENARIOS.items()
            for way in ways
        }
        yield lambda function, way: futures[function, way].result()
        for future in futures.values():
            future.exception()  # all are over before the cluster is used for anything else
    cluster_of_session.cancel()


def over(function):
    """Parametrize a test over all ways of a scenario."""
    return pytest.mark.parametrize("way", SCENARIOS[function])


# -- what came of it --------------------------------------------------------------------------------------


@over(stopped)
def test_a_stop_goes_on_and_nothing_is_left(scenarios, way):
    run = scenarios(stopped, way)
    first, *rest = run.records()
    if way == "login":
        assert not rest
        assert "hpc-resume resubmit" in run.log
        assert run.records("ended")[0]["how"].startswith("waits for the login node")
        return
    (second,) = rest
    same = way in {"requeue", "exit"}
    assert (second["job"] == first["job"]) == same
    assert second["restart"] == (1 if same else 0)
    assert first["chain"] == second["chain"] == run.id
    assert only_one_at_a_time(run)
    if not same:
        assert run.notes.read("over", run.id) == "all steps are done"


@pytest.mark.parametrize("function", [cancelled, cancelled_and_stubborn, cancelled_without_notice])
@pytest.mark.parametrize("way", WAYS)
def test_a_persons_cancel_ends_the_whole_run(scenarios, cluster, way, function):
    run = scenarios(function, way)
    (only,) = run.records()
    assert cluster.state(only["job"]) == "CANCELLED"
    if way == "login":
        answer = run.hpc_resume("resubmit", str(run.root))
        assert answer == f"a person cancelled job {only['job']}"
        assert not run.queue()
    if way in {"chain", "array"}:
        assert run.notes.read("over", run.id).startswith("a person cancelled job")


@over(killed)
def test_killed_ranks_are_started_again_where_they_were(scenarios, way):
    first, second = scenarios(killed, way).records()
    assert (first["job"], first["restart"]) == (second["job"], second["restart"])


@pytest.mark.parametrize("function", [failed, over_by_a_rank])
@pytest.mark.parametrize("way", WAYS)
def test_a_failure_or_a_last_word_ends_the_run(scenarios, function, way):
    run = scenarios(function, way)
    assert len(run.records()) == 1
    assert run.notes.read("over", run.id) == ("exit code 3" if function is failed else "no progress")


@over(delayed)
def test_the_next_attempt_waits_as_was_decided(scenarios, way):
    run = scenarios(delayed, way)
    _, second = run.records()
    assert second["t"] - run.records("ended")[0]["t"] >= 11  # Slurm counts whole seconds
    assert only_one_at_a_time(run)


@over(excluded)
def test_the_next_attempt_is_not_on_a_node_that_was_excluded(scenarios, way):
    _, second = scenarios(excluded, way).records()
    assert second["node"] == "small2"


@over(moved_on)
def test_the_next_attempt_is_on_the_next_node_type(scenarios, way):
    run = scenarios(moved_on, way)
    first, *second = run.records()
    assert (first["node"][:-1], first["node_type"], first["ranks"]) == ("small", "v", 1)
    assert [(r["node"][:-1], r["node_type"], r["ranks"]) for r in second] == [("big", "a", 2)] * 2
    assert second[0]["job"] != first["job"]


@over(successor_cancelled)
def test_a_cancel_of_what_comes_next_ends_the_run_after_this_attempt(scenarios, way):
    run = scenarios(successor_cancelled, way)
    assert len(run.records()) == 1
    if way == "chain":
        assert run.notes.read("over", run.id).startswith("a person cancelled job")


@over(cancelled_by_us)
def test_our_cancel_ends_the_whole_run(scenarios, way):
    run = scenarios(cancelled_by_us, way)
    assert len(run.records()) == 1
    assert run.answer == f"job {run.id} was RUNNING; cancelled"


@over(requeued_by_a_person_too)
def test_three_that_requeue_give_one_attempt(scenarios, way):
    run = scenarios(requeued_by_a_person_too, way)
    assert [record["restart"] for record in run.records()] == [0, 1, 2]
    assert only_one_at_a_time(run)


def test_a_requeue_by_slurm_and_a_successor_do_not_run_at_once(scenarios):
    run = scenarios(requeued_by_slurm_too, "chain")
    assert len(run.records()) == 3, (run.records(), run.answers, run.log)
    first, second, third = run.records()
    assert (second["job"], second["restart"]) == (first["job"], 1)
    assert third["job"] != first["job"]
    assert second["provided"] == first["provided"] == f"job {third['job']} waits to go on"
    assert third["restart"] == 0, "a job must not take over the restart count of the one that submits it"
    assert only_one_at_a_time(run)


def test_of_two_successors_one_goes_on(scenarios):
    run = scenarios(second_successor, "chain")
    assert len(run.records()) == 3
    assert only_one_at_a_time(run)


def test_a_run_is_submitted_again_once(scenarios):
    run = scenarios(resubmitted, "login")
    assert run.early == f"job {run.id} is RUNNING"
    assert len(run.records()) == 3, (run.records(), run.answers, run.log)
    first, second, third = run.records()
    assert len({record["job"] for record in run.records()}) == 3
    assert {record["chain"] for record in run.records()} == {run.id}
    submitted = [answer for answer in run.answers if answer.startswith("submitted as job")]
    assert submitted == [
        f"submitted as job {second['job']}, which goes on from job {first['job']}",
        f"submitted as job {third['job']}, which goes on from job {second['job']}",
    ]
    assert run.late == "all steps are done"
    assert only_one_at_a_time(run)


def test_a_watch_submits_again_until_it_is_over(scenarios):
    run = scenarios(watched, "login")
    assert len(run.records()) == 3
    assert run.answer.endswith("all steps are done")
    assert run.answer.count("submitted as job") == 2


def test_a_job_that_waits_too_long_gives_way_to_the_next_node_type(scenarios):
    run = scenarios(waited_too_long, "chain")
    first, *second = run.records()
    assert first["node_type"] == "v"
    assert [(r["node_type"], r["ranks"]) for r in second] == [("a", 2)] * 2
    assert second[0]["t"] - run.records("ended")[0]["t"] >= 3
    assert second[0]["restart"] == 0


@pytest.mark.parametrize("function", [moved_in_the_queue, moved_in_the_queue_to_another_shape])
def test_a_waiting_job_is_moved_to_another_node_type(scenarios, function):
    run = scenarios(function, "requeue")
    assert "does not wait for nodes" in run.running
    first, *second = run.records()
    assert {r["node_type"] for r in second} == {"a"}
    assert {r["node"][:-1] for r in second} == {"big"}
    if function is moved_in_the_queue:
        assert run.answer == f"job {run.id} asks for a now"
        assert [r["job"] for r in second] == [first["job"]]
    else:
        assert run.answer == f"job {second[0]['job']} asks for a in place of job {run.id}"
        assert {r["ranks"] for r in second} == {2}


def test_the_page_shows_what_happened(scenarios, all_at_once):
    def cells(what):
        if isinstance(what, str):
            return all_at_once()[what]
        return {way: what_came(scenarios(what, way), way) for way in SCENARIOS[what]}

    table.check([(words, cells(what)) for words, what in ROWS.items()], WAYS)


# -- with training ----------------------------------------------------------------------------------------

TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.run.training import train
train(60, step_s=0.1, every_steps=10)
"""


def train_on_cluster(steps):
    """What submitit runs: a function, by reference."""
    train(steps, step_s=0.1, every_steps=10)
    return steps


class Training(Run):
    """A run that trains, on one rank: that several go on together is shown elsewhere."""

    def __init__(self, cluster, name, way, **node_type):
        super().__init__(
            cluster, name, way, types=[{"constraint": "v100", "mem_gb": 1, **node_type}], script=TRAIN
        )
        cluster.names.add(name)

    def wait_for_progress(self, attempt=1):
        path = RunDirectory(self.root).attempt(attempt) / "events.jsonl"

        def saved():
            return any(event["event"] == "saved" for event in read_events(path))

        self.cluster.wait_for(saved, 200, f"attempt {attempt} has saved\n{self.log}")
        return json.loads((path.parent / "attempt.json").read_text())["job_id"]

    def attempts(self):
        self.wait_until_nothing_is_left(300)
        found = status(self.root).to_json()
        assert found["state"] == "done", f"{found}\n{self.log}"
        assert verify_run(self.root) == []
        return found["attempts"]

    def kill_everything(self, job):
        """Kill all ranks at once, without a word."""
        wanted = f"SLURM_JOB_ID={job}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                if wanted in environ and any(entry.startswith(b"SLURM_PROCID=") for entry in environ):
                    os.kill(int(folder.name), signal.SIGKILL)


@pytest.mark.parametrize("way", ["chain", "array"])
def test_training_is_stopped_and_killed_and_goes_on_in_other_jobs(cluster, way):
    run = Training(cluster, f"training-{way}", way)
    cluster.run("scancel", "--signal=USR2", run.wait_for_progress(), check=False)
    job = run.wait_for_progress(2)
    run.kill_everything(cluster.job(job)["JobId"])
    first, second, third = run.attempts()
    assert (first["cause"], first["steps_lost"]) == ("signal", 0)
    assert second["steps_lost"] <= 10
    assert third["cause"] == "done"
    assert len({first["job_id"], second["job_id"], third["job_id"]}) == 3


def test_training_in_a_chain_outlives_the_node_of_its_batch_script(cluster):
    run = Training(cluster, "node-dies", "chain", constraint=None, nodes=1)
    job = run.wait_for_progress()
    node = cluster.job(job)["NodeList"]
    cluster.kill_node(node)
    try:
        first, second = run.attempts()
    finally:
        cluster.restore_node(node)
    assert first["decision"] is None  # it had no last word
    assert second["cause"] == "done"
    assert second["first_step"] >= 10
    assert cluster.state(job) == "NODE_FAIL"


def test_a_function_that_is_submitted_goes_on_in_a_chain_and_has_its_result(cluster, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = hr.submit(
        train_on_cluster,
        config={
            "name": "function",
            "scheduler": "slurm",
            "continuation": "chain",
            "time_limit_s": 300,
            "warning_lead_s": 10,
            "node_types": [{"mem_gb": 1}],
        },
        run_dir=cluster.work / "function",
        steps=60,
    )
    cluster.wait_for((job.run_dir / "step").exists, 200, "it trains")
    cluster.run("scancel", "--signal=USR2", job.id)
    cluster.wait_for(lambda: cluster.state(job.id) == "COMPLETED", 200, "the first job is over")
    assert not job.over(job.state)  # the run is not
    assert job.result(timeout_s=300) == 60
    assert [attempt.cause for attempt in job.status().attempts] == ["signal", "done"]
    assert hr.Job.of(job.run_dir).id == job.id
