"""Real processes: the executor, its controller and ranks that know no torch. Times are fractions of seconds."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError
from hpc_resume.launch import onemachine
from hpc_resume.launch.entry import FunctionEntry
from hpc_resume.launch.onemachine import OneMachineExecutor, OneMachineJob, clean_environment, new_job_id
from hpc_resume.scheduler.local import LocalState, process_ticks, state_path

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def executor(tmp_path):
    made = []

    def make(**settings):
        folder = tmp_path / "jobs"
        config = Config(**{"warning_lead_s": 0.5, "stop": {"kill_wait_s": 0.5}, **settings})
        made.append(folder)
        return OneMachineExecutor(folder, config=config, run_dir=tmp_path, variables={"MARK": "here"})

    yield make
    for folder in made:  # whatever a failed test has left running
        for path in folder.glob("*_state.json"):
            state = LocalState.read(path)
            if state.alive() and state.controller_pid != os.getpid():
                os.kill(state.controller_pid, signal.SIGKILL)


def until(condition, seconds=120.0):
    """Wait for something that will be; fails after a time that no machine needs."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)
    return value


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def finish(job) -> LocalState:
    until(job.done)
    return job.state_record()


# Functions of a test module go to the job by value, as those of a notebook do.


def multiply(a, b):
    return a * b


def rank_and_mark():
    return os.environ["SUBMITIT_LOCAL_GLOBALID"], os.environ["MARK"], os.environ["HPC_RESUME_NODE_TYPE"]


def save_on(*names, note, finish_on=None):
    """Wait for a signal, write what the state file says then, and leave to be continued."""
    import json
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    if os.environ["HPC_RESUME_NODE_TYPE"] == finish_on:
        return "finished"
    got = []
    for name in names:
        signal.signal(getattr(signal, name), lambda number, _: got.append(signal.Signals(number).name))
    rank = os.environ["SUBMITIT_LOCAL_GLOBALID"]
    Path(f"{note}.{rank}.ready").touch()
    while not got:
        time.sleep(0.005)
    state = json.loads(Path(os.environ["HPC_RESUME_JOB_STATE"]).read_text())
    record = json.dumps({"got": got[0], "state": state})
    with Path(f"{note}.{rank}").open("a") as out:
        out.write(record + "\n")
    sys.exit(75)


def test_a_function_and_its_result(executor):
    job = executor().submit(multiply, 6, b=7)
    assert finish(job).state == "COMPLETED"
    assert job.result() == 42


def test_every_rank_knows_who_it_is(executor):
    job = executor(node_types=[{"name": "trio", "ranks": 3}]).submit(rank_and_mark)
    assert finish(job).exit_codes == (0, 0, 0)
    folder = job.paths.folder
    results = [OneMachineJob(folder, job.job_id, tasks=(rank,)).result() for rank in range(3)]
    assert results == [("0", "here", "trio"), ("1", "here", "trio"), ("2", "here", "trio")]


def test_a_failure_is_reported_with_its_traceback(executor):
    job = executor().submit(multiply, None, 7)
    state = finish(job)
    assert (state.state, state.restarts) == ("FAILED", 0)
    assert "TypeError" in str(job.exception())


def test_time_limit_then_preemption_then_the_end(executor, tmp_path):
    """The whole chain with real signals: each attempt on another node type, and the state file right each time.

    Ranks must have begun when the signals come, on a machine with other things to do, too.
    """
    job = executor(
        node_types=[
            {"name": "pair", "ranks": 2, "time_limit_s": 15},
            {"name": "single", "preempt_after_s": 6, "grace_s": 60},
            {"name": "last", "ranks": 2},
        ]
    ).submit(save_on, "SIGUSR2", "SIGTERM", note=str(tmp_path / "note"), finish_on="last")
    state = finish(job)
    assert (state.state, state.restarts, state.node_type) == ("COMPLETED", 2, "last")
    assert job.result() == "finished"
    first, second = [json.loads(line) for line in (tmp_path / "note.0").read_text().splitlines()]
    assert (first["got"], first["state"]["state"], first["state"]["node_type"]) == (
        "SIGUSR2",
        "RUNNING",
        "pair",
    )
    assert first["state"]["end_time"] is not None
    assert (second["got"], second["state"]["state"], second["state"]["restarts"]) == ("SIGTERM", "RUNNING", 1)
    assert second["state"]["preempt_time"] is not None
    assert json.loads((tmp_path / "note.1").read_text())["got"] == "SIGUSR2"


def test_preempting_by_hand(executor, tmp_path):
    note = tmp_path / "note"
    job = executor(node_types=[{"name": "one", "grace_s": 60}, {"name": "last"}]).submit(
        save_on, "SIGTERM", note=str(note), finish_on="last"
    )
    until((tmp_path / "note.0.ready").exists)
    job.preempt()
    assert (finish(job).state, job.result()) == ("COMPLETED", "finished")


@pytest.mark.parametrize("signals", [("SIGTERM",), ()], ids=["saves", "dies"])
def test_cancelling_ends_for_good(executor, tmp_path, signals):
    entry = FunctionEntry(
        function=functools.partial(save_on, *signals), kwargs={"note": str(tmp_path / "note")}
    )  # without it, submitit would ignore SIGTERM
    job = executor(node_types=[{"ranks": 2}], stop={"kill_wait_s": 60}).submit(entry)
    until(lambda: all((tmp_path / f"note.{rank}.ready").exists() for rank in range(2)))
    job.cancel()
    state = finish(job)
    assert (state.state, state.restarts) == ("CANCELLED", 0)
    assert state.exit_codes == ((75, 75) if signals else (-15, -15))
    job.cancel()  # once more is harmless


def kill_one_rank(job, folder):
    until(lambda: all((folder / f"note.{rank}.ready").exists() for rank in range(2)))
    controller = job.state_record().controller_pid
    ranks = [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
    for rank in range(2):
        (folder / f"note.{rank}.ready").unlink()
    os.kill(ranks[1], signal.SIGKILL)
    return ranks


def test_a_killed_rank_takes_its_peer_down_and_the_job_goes_on(executor, tmp_path):
    job = executor(
        node_types=[{"name": "pair", "ranks": 2}, {"name": "last"}], budget={"restarts_in_place": 0}
    ).submit(save_on, note=str(tmp_path / "note"), finish_on="last")
    kill_one_rank(job, tmp_path)
    state = finish(job)
    assert (state.state, state.restarts, job.result()) == ("COMPLETED", 1, "finished")


def test_a_killed_rank_is_started_again_in_the_same_allocation(executor, tmp_path):
    job = executor(
        node_types=[{"name": "pair", "ranks": 2}, {"name": "last"}], budget={"restarts_in_place": 1}
    ).submit(save_on, note=str(tmp_path / "note"), finish_on="last")
    before = kill_one_rank(job, tmp_path)
    until(lambda: job.state_record().why.startswith("started again in place after exit codes"))
    assert job.state_record().restarts == 0
    assert not set(before) & set(kill_one_rank(job, tmp_path))
    state = finish(job)  # without a new checkpoint in between, the next crash gives the allocation up
    assert (state.state, state.restarts, job.result()) == ("COMPLETED", 1, "finished")


def stubborn(note):
    import os
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
    Path(note).with_suffix(".tmp").rename(note)
    time.sleep(600)


def test_a_stubborn_rank_is_killed_with_its_children(executor, tmp_path):
    job = executor().submit(stubborn, str(tmp_path / "pids"))
    until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(process_ticks(pid) for pid in pids)
    job.cancel()
    assert finish(job).exit_codes == (-9,)
    until(lambda: not any(process_ticks(pid) for pid in pids))


def test_no_rank_outlives_its_controller(executor, tmp_path):
    job = executor().submit(stubborn, str(tmp_path / "pids"))
    until((tmp_path / "pids").exists)
    rank = int((tmp_path / "pids").read_text().split()[0])
    os.kill(job.state_record().controller_pid, signal.SIGKILL)
    until(lambda: process_ticks(rank) is None)
    assert (job.state, job.done()) == ("LOST", True)
    os.kill(int((tmp_path / "pids").read_text().split()[1]), signal.SIGKILL)


def test_the_job_outlives_the_process_that_submitted_it(tmp_path):
    code = f"""
import time
from pathlib import Path
from hpc_resume.config import Config
from hpc_resume.launch.onemachine import OneMachineExecutor
def wait():
    while not Path({str(tmp_path / "go")!r}).exists():
        time.sleep(0.01)
    return "done"
executor = OneMachineExecutor(Path({str(tmp_path / "jobs")!r}), config=Config(), run_dir=Path({str(tmp_path)!r}))
print(executor.submit(wait).job_id)
"""
    submitted = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert submitted.stderr == ""
    job = OneMachineJob(tmp_path / "jobs", submitted.stdout.strip(), tasks=(0,))
    assert job.state in {"PENDING", "RUNNING"}
    (tmp_path / "go").touch()
    assert (finish(job).state, job.result()) == ("COMPLETED", "done")


def test_setup_lines_come_before_the_ranks_and_fail_the_job(executor):
    setup = ["export MARK=from-setup-$PET_SHUTDOWN_TIMEOUT"]  # which torchrun is told
    good = executor(warning_lead_s=40, environment={"setup": setup}).submit(rank_and_mark)
    assert finish(good).state == "COMPLETED"
    assert good.result()[1] == "from-setup-100"
    bad = executor(environment={"setup": ["echo reading modules", "false"]}).submit(rank_and_mark)
    assert finish(bad).state == "FAILED"
    assert "reading modules" in text(bad.paths.stdout)


def test_an_interpreter_that_is_not_there_is_named(executor):
    job = executor(environment={"python": "/no/such/python"}).submit(multiply, 1, 2)
    state = finish(job)
    assert state.state == "FAILED"
    assert "/no/such/python" in state.why


def test_a_controller_that_does_not_start_is_an_error_with_its_words(executor, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SchedulerError, match=r"did not start \(exit code 1\)"):
        executor().submit(multiply, 1, 2)
    # and it does not look alive, which would block the run directory
    folder = executor().folder
    assert not any(LocalState.read(path).alive() for path in folder.glob("*_state.json"))


def test_a_job_of_another_machine_is_not_signalled(executor, monkeypatch):
    job = executor().submit(multiply, 1, 2)
    finish(job)
    path = state_path(job.paths.folder, job.job_id)
    dataclasses.replace(LocalState.read(path), host="elsewhere", state="RUNNING").write(path)
    assert job.state == "RUNNING"
    with pytest.raises(SchedulerError, match="runs on elsewhere"):
        job.cancel()


def test_a_job_of_somebody_else_is_not_signalled(executor, monkeypatch):
    job = executor().submit(multiply, 1, 2)
    finish(job)
    path, pid = state_path(job.paths.folder, job.job_id), os.getpid()
    mine = {"controller_pid": pid, "controller_ticks": process_ticks(pid)}
    dataclasses.replace(LocalState.read(path), state="RUNNING", **mine).write(path)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(SchedulerError, match="belongs to someone else"):
        job.cancel()


def test_an_unknown_job_is_unknown(tmp_path):
    job = OneMachineJob(tmp_path, "nix", tasks=(0,))
    assert (job.state, job.done()) == ("UNKNOWN", False)


def test_ids_differ_and_do_not_look_like_an_array_element():
    ids = {new_job_id() for _ in range(50)}
    assert len(ids) > 1
    assert not any("_" in each or "%" in each for each in ids)


def test_other_launchers_variables_stay_outside():
    foreign = {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "x", "SLURM_JOB_ID": "1",
        "SUBMITIT_EXECUTOR": "slurm", "HPC_RESUME_SEED": "1", "HPC_RESUME_RUN_DIR": "/outer",
    }  # fmt: skip
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "a", "RANKING": "1"}
    assert clean_environment({**foreign, **kept}) == kept


def test_the_executor_is_not_chosen_by_itself():
    assert onemachine.OneMachineExecutor.affinity() == 0
