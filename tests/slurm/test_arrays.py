"""Arrays of runs on the real Slurm: each element lives, is interrupted and ends by itself."""

from pathlib import Path

import pytest

import hpc_resume as hr
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import read_events
from hpc_resume.launch.chain import OVER
from hpc_resume.launch.handle import find_jobs
from hpc_resume.scheduler.arrays import SlurmArrays
from tests.run.training import train_slowly
from tests.slurm.plain import count_to, hold_on

STEPS = 200
ROOT = Path(__file__).parents[2]
CONFIG = {
    "scheduler": "slurm",
    "time_limit_s": 600,
    "warning_lead_s": 30,
    "node_types": [{"cpus_per_task": 1, "mem_gb": 1}],
    "environment": {"variables": {"OMP_NUM_THREADS": "1"}},
}


def train_element(seed, gates):
    train_slowly(seed, gates, STEPS)


@pytest.fixture
def python(cluster, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(cluster.work)
    cluster.names |= {"array", "two", "split", "ended"}
    return cluster


class Watch:
    """Looks at an array, and sees to it that never more than so many elements run."""

    def __init__(self, cluster, sweep, at_once):
        self.cluster, self.sweep, self.at_once = cluster, sweep, at_once
        self.array = sweep[0].id.partition("_")[0]

    def states(self):
        states = self.sweep.states()
        assert list(states.values()).count("RUNNING") <= self.at_once, states
        return states

    def wait_for(self, condition, timeout_s, why):
        def met():
            self.states()
            return condition()

        try:
            self.cluster.wait_for(met, timeout_s, why)
        except AssertionError as error:
            logs = [f"--- {job.id}\n{job._handle.log_path().read_text()[-1500:]}" for job in self.sweep
                    if job._handle.log_path().exists()]  # fmt: skip
            raise AssertionError("\n".join([str(error), repr(self.sweep), *logs])) from None

    def wait_for_progress(self, place):
        journal = self.sweep[place].run_dir / "attempts/0001/events.jsonl"
        self.wait_for(
            lambda: any(event["event"] == "saved" for event in read_events(journal)),
            200,
            f"{place} has saved",
        )

    def wait_until_over(self, timeout_s):
        self.wait_for(lambda: set(self.states().values()) <= OVER, timeout_s, "all are over")
        return self.states()

    def restarts(self):
        return [
            int(self.cluster.job(f"{self.array}_{place}").get("Restarts", 0))
            for place in range(len(self.sweep))
        ]


def warn(cluster, job_id):
    """Send the warning signal, as a person may.

    While other elements wait, slurmctld delivers it and answers that it can't be now (22.05); scancel would try,
    and signal, again and again.
    """
    cluster.run("timeout", "4", "scancel", "--signal=USR2", job_id, check=False)


def left_in_queue(cluster):
    return cluster.run("squeue", "--noheader", "--array", "--format=%i %j %T").splitlines()


@pytest.mark.timeout(600)
def test_each_element_is_interrupted_cancelled_and_continued_by_itself(python):
    cluster = python
    config = {**CONFIG, "name": "array", "array": {"at_once": 2}}
    gates = cluster.work / "gates"
    gates.mkdir()
    arguments = {"gates": str(gates)}
    sweep = hr.submit(train_element, hr.grid(seed=range(4)), config=config, **arguments)
    watch = Watch(cluster, sweep, at_once=2)
    ids = [f"{watch.array}_{place}" for place in range(4)]
    assert [job.id for job in sweep] == ids

    # Submitting again while it waits and runs submits nothing.
    watch.wait_for(lambda: "RUNNING" in watch.states().values(), 200, "some run")
    again = hr.submit(train_element, hr.grid(seed=range(4)), config=config, **arguments)
    assert "4 runs in the queue or running, not submitted twice" in repr(again)

    watch.wait_for_progress(0)
    warn(cluster, ids[0])
    watch.wait_for_progress(1)
    cluster.cancel(ids[1])  # a person
    watch.wait_for(lambda: watch.restarts()[0] == 1, 200, "element 0 is requeued")
    assert watch.restarts() == [1, 0, 0, 0]

    (gates / "2").touch()
    # The last element has the array's own id as its SLURM_JOB_ID: a requeue of that number would mean them all.
    watch.wait_for_progress(3)
    watch.wait_for(lambda: watch.states()["seed=0"] == "RUNNING", 200, "element 0 runs again")
    assert cluster.job(ids[3])["JobId"] == watch.array
    warn(cluster, ids[3])
    watch.wait_for(lambda: watch.restarts()[3] == 1, 200, "element 3 is requeued")
    assert watch.states()["seed=0"] == "RUNNING"
    for place in (0, 1, 3):
        (gates / str(place)).touch()

    states = watch.wait_until_over(400)
    assert list(states.values()) == ["COMPLETED", "CANCELLED", *["COMPLETED"] * 2], sweep
    assert watch.restarts() == [1, 0, 0, 1]
    found = sweep.status()
    assert [each.state for each in found] == ["done", "cancelled", "done", "done"]
    assert [each.attempts for each in found] == [2, 1, 1, 2]
    assert [each.step for each in found if each.name != "seed=1"] == [STEPS] * 3
    assert sweep[0].status().steps_lost == sweep[3].status().steps_lost == 0
    assert left_in_queue(cluster) == []

    # Found again by its folder, and submitted again: only what is not done.
    stopped_at = found[1].step
    rest = hr.submit(train_element, hr.grid(seed=range(4)), config=config, **arguments)
    assert "3 runs done already" in repr(rest)
    assert [len(find_jobs(job.run_dir)) for job in rest] == [1, 2, 1, 1]
    (last,) = [job for job in hr.Sweep(sweep.folder) if job.id not in ids]
    assert (last.id.partition("_")[2], last.run_dir.name) == ("0", "seed=1")
    assert rest.wait(300)["seed=1"] == "COMPLETED", last.log()
    first, second = last.status().attempts
    assert (first.cause, second.first_step, second.cause) == ("cancel", stopped_at, "done")
    assert [each.state for each in hr.Sweep(sweep.folder).status()] == ["done"] * 4
    assert {job.run_dir.name: verify_run(job.run_dir) for job in sweep} == {f"seed={n}": [] for n in range(4)}
    assert left_in_queue(cluster) == []


@pytest.mark.timeout(600)
def test_the_batch_script_of_an_element_continues_it(python):
    cluster = python
    gates = cluster.work / "gates-of-two"
    gates.mkdir()
    config = {**CONFIG, "name": "two", "continuation": "exit"}
    sweep = hr.submit(train_element, hr.grid(seed=range(2)), config=config, gates=str(gates))
    watch = Watch(cluster, sweep, at_once=2)
    for place in (0, 1):
        watch.wait_for_progress(place)
    warn(cluster, sweep[1].id)
    watch.wait_for(lambda: cluster.job(sweep[1].id)["Restarts"] == "1", 200, "element 1 is requeued")
    for place in (0, 1):
        (gates / str(place)).touch()
    assert list(watch.wait_until_over(200).values()) == ["COMPLETED", "COMPLETED"]
    assert [(each.state, each.step, each.attempts) for each in sweep.status()] == [
        ("done", STEPS, 1),
        ("done", STEPS, 2),
    ]
    said = (sweep.folder / "jobs" / f"{sweep[1].id}.log").read_text()
    assert f"exit code 75, so job {sweep[1].id} is requeued" in said
    notes = {path.name for path in (sweep[1].run_dir / "continuation").iterdir()}
    assert f"latest-{sweep[1].id}" in notes
    assert not any(name.startswith("script") for name in notes)  # it would be the whole array's
    assert left_in_queue(cluster) == []


@pytest.mark.timeout(600)
def test_several_arrays_keep_to_one_limit(python, monkeypatch):
    cluster = python
    monkeypatch.setattr(SlurmArrays, "largest_array", lambda self: 2)
    note = cluster.work / "note.txt"
    sweep = hr.submit(
        count_to,
        hr.grid(seed=range(5)),
        config={**CONFIG, "name": "split", "array": {"at_once": 1}},
        file=str(note),
    )
    arrays = list(dict.fromkeys(job.id.partition("_")[0] for job in sweep))
    assert [job.id.partition("_")[2] for job in sweep] == ["0", "1", "0", "1", "0"]
    assert len(arrays) == 3
    watch = Watch(cluster, sweep, at_once=1)
    assert set(watch.wait_until_over(200).values()) == {"COMPLETED"}
    assert [job.result() for job in sweep] == list(range(5))
    assert note.read_text().splitlines() == [f"{n} {sweep.folder}/seed={n}" for n in range(5)]
    assert left_in_queue(cluster) == []


@pytest.mark.timeout(600)
def test_cancel_ends_what_runs_and_what_waits(python):
    cluster = python
    sweep = hr.submit(
        hold_on, hr.grid(seed=range(6)), config={**CONFIG, "name": "ended", "array": {"at_once": 2}}
    )
    watch = Watch(cluster, sweep, at_once=2)
    watch.wait_for(lambda: list(watch.states().values()).count("RUNNING") == 2, 60, "two run")
    sweep[4].cancel()
    assert sweep[4].wait(30) == "GONE"  # Slurm does not remember what never began
    assert list(watch.states().values()).count("RUNNING") == 2
    hr.Sweep(sweep.folder).cancel()
    assert list(watch.wait_until_over(60).values()) == ["CANCELLED"] * 2 + ["GONE"] * 4
    assert watch.restarts() == [0] * 6
    assert [each.state for each in sweep.status()] == ["cancelled"] * 2 + ["interrupted"] * 4
    assert left_in_queue(cluster) == []
