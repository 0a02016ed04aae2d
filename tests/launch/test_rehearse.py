"""What a rehearsal makes of the user's settings, and of a run that it looks at."""

from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.journal import write_line
from hpc_resume.launch.rehearse import measure, settings_for
from hpc_resume.policy.rehearsal import Interruption, Pace
from hpc_resume.rundir import RunDirectory

CLUSTER = Config(
    name="mine",
    scheduler="slurm",
    continuation="array",
    time_limit_s=86400,
    budget={"crashes": 1, "backoff_s": 7},
    environment={"setup": ["export A=1"], "variables": {"B": "2"}},
    node_types=[{"name": "a100", "nodes": 2, "tasks_per_node": 4, "precision": "bf16", "micro_batch": 4}],
)


def interruption(kind):
    return Interruption(kind=kind, moment="middle", part=0.5, victim=0.5)


def test_a_clusters_settings_become_those_of_one_machine():
    plan = [interruption("kill"), interruption("preemption without grace")]
    config = settings_for(CLUSTER, Path("/scratch/r"), (2, 1, 3), plan, steps=90)
    assert (config.scheduler, config.time_limit_s) == ("local", None)
    assert [each.ranks for each in config.node_types] == [2, 1, 3]
    assert [each.grace_s for each in config.node_types] == [30.0, 0.0, 30.0]
    assert {(each.precision, each.micro_batch) for each in config.node_types} == {("bf16", 4)}
    assert len({each.name for each in config.node_types}) == 3
    assert (config.budget.crashes, config.budget.max_idle) == (None, 5)
    assert config.budget.restarts_in_place == 0
    assert config.budget.backoff_s == Config().budget.backoff_s  # the user's are not meant here


def test_what_a_script_reads_from_its_own_files_is_overruled():
    config = settings_for(CLUSTER, Path("/scratch/r"), (1, 1), [interruption("kill")], steps=60)
    assert config.environment.setup == ("export A=1",)
    assert config.environment.variables == {
        "B": "2",
        "HPC_RESUME_REHEARSAL": "/scratch/r",
        "HPC_RESUME_BUDGET__MAX_IDLE": "4",
        "HPC_RESUME_CHECKPOINT__EVERY_STEPS": "10",
    }


def test_the_uninterrupted_run_saves_as_the_user_says():
    config = settings_for(CLUSTER, Path("/scratch/r"), (1,), [], steps=None)
    assert "HPC_RESUME_CHECKPOINT__EVERY_STEPS" not in config.environment.variables


def test_the_pace_is_read_from_the_journal(tmp_path):
    folder = RunDirectory(tmp_path).attempt(1)
    folder.mkdir(parents=True)
    events = [("begun", 103.0, 0), ("fresh", 104.5, 0), ("saved", 110.0, 20), ("ended", 114.5, 40)]
    lines = [write_line({"t": t, "event": event, "step": step}) for event, t, step in events]
    (folder / "events.jsonl").write_bytes(b"".join(lines))
    assert measure(tmp_path, submitted=100.0) == Pace(start_s=3.0, prepare_s=1.5, train_s=10.0, steps=40)
