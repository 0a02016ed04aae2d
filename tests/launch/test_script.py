import json
import os
import subprocess
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.script import _settings_as_variables, node_type_options, render, slurm_time
from hpc_resume.scheduler.notes import Notes

RUN_DIR = Path("/scratch/eve/runs/gpt")
SLURM_ENVIRON = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1"}

# Stand-ins for Slurm's commands: they write down how they were called, and answer from files.
FAKES = {
    "srun": """\
echo "srun $*" >> calls; env | grep -E '^(HPC_RESUME|SRUN|SLURM_EX|PYTHONUN|SUBMITIT|A_)' >> environment
while [[ ${1:-} == -* ]]; do shift; done
"$@"
""",
    "scontrol": """\
echo "scontrol $*" >> calls
if [ "$1" = requeue ]; then
    count=$(grep -c 'scontrol requeue' calls)
    if [ -e "answer-$count" ]; then cat "answer-$count"; exit 1; fi
    cat answer 2>/dev/null
    exit "$(cat code 2>/dev/null || echo 0)"
fi
count=$(grep -c 'scontrol show' calls)
if [ -e "facts-$count" ]; then cat "facts-$count"; else cat facts; fi
""",
    "sleep": 'echo "sleep $1" >> calls\n',
    "sbatch": """\
echo "sbatch $*" >> calls
env | grep ^SLURM_ | sed 's/^/sbatch environment: /' >> calls
echo "13;cluster"
""",
    "scancel": 'echo "scancel $*" >> calls\n',
    "squeue": "cat queue 2>/dev/null\n",
    "sacct": "cat accounting 2>/dev/null\n",
}


def facts(state, reason="None"):
    return (
        "JobId=12 JobName=a JobState=RUNNING Reason=TimeLimit\n   UserId=eve(1000)\n"
        f"   JobState={state} Reason={reason} Dependency=(null)\n   Requeue=1 Restarts=0\n"
        "   Comment=JobState=RUNNING Reason=TimeLimit\n"
    )


@pytest.fixture
def batch(tmp_path):
    """Run a rendered script where srun and scontrol are stand-ins; gives (exit code, stderr, calls)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}")
        (tools / name).chmod(0o755)

    def run(command, *arguments, config=None, environ=SLURM_ENVIRON, **given):
        (tmp_path / "calls").write_text("")
        script = tmp_path / "job.sbatch"
        script.write_text(render(config or Config(), command=command, run_dir=tmp_path / "run", **given))
        done = subprocess.run(
            ["bash", str(script), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60,
            check=False, env={"PATH": f"{tools}:{os.environ['PATH']}", **environ},
        )  # fmt: skip
        return done.returncode, done.stderr, (tmp_path / "calls").read_text().splitlines()

    run.folder = tmp_path
    run.notes = Notes(tmp_path / "run")
    return run


def asked(calls, what):
    return [call for call in calls if call.startswith(f"scontrol {what}")]


def directives(config, **given):
    text = render(config, command=["true"], run_dir=RUN_DIR, **given)
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


# -- what Slurm is asked for ------------------------------------------------------------------------------


def test_every_setting_reaches_its_directive():
    config = Config.load(
        overrides={
            "name": "gpt",
            "time_limit_s": 90_061,
            "warning_lead_s": 300,
            "warning_signal": "USR1",
            "node_types": [
                {
                    "partition": "main",
                    "constraint": "a100|h100",
                    "nodes": 2,
                    "tasks_per_node": 4,
                    "cpus_per_task": 8,
                    "gpus_per_node": 4,
                    "mem_gb": 240,
                }
            ],
            "slurm.account": "lab 7",
            "slurm.qos": "long",
            "slurm.exclude": "n[1-3]",
            "slurm.nodelist": "n4",
            "slurm.gres": "tmp:1",
            "slurm.additional_parameters": {"mail_type": "FAIL", "exclusive": True, "hold": False},
        }
    )
    assert directives(config, output="/logs/%j.log") == [
        "--job-name=gpt",
        "--output=/logs/%j.log",
        "--open-mode=append",
        "--time=25:01:01",
        "--signal=USR1@300",
        "--requeue",
        "--partition=main",
        "--constraint='a100|h100'",
        "--account='lab 7'",
        "--qos=long",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--gpus-per-node=4",
        "--gres=tmp:1",
        "--mem=240G",
        "--exclude='n[1-3]'",
        "--nodelist=n4",
        "--mail-type=FAIL",
        "--exclusive",
    ]


def test_what_is_not_set_is_left_to_the_site():
    assert directives(Config()) == [
        "--job-name=run",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--signal=USR2@120",
        "--requeue",
        "--nodes=1",
        "--ntasks-per-node=1",
    ]


def test_the_node_types_time_limit_wins_and_an_additional_parameter_wins_over_all():
    config = Config.load(
        overrides={"time_limit_s": 7200, "node_types": [{"time_limit_s": 3600, "mem_gb": 1.5}]}
    )
    assert "--time=01:00:00" in directives(config)
    assert "--mem=1536M" in directives(config)
    other = config.replace(slurm={"additional_parameters": {"time": "5"}, "requeue": False})
    assert [line for line in directives(other) if "time" in line] == ["--time=5"]
    assert "--no-requeue" in directives(other)
    assert "--requeue" not in directives(other)


def test_without_a_lead_there_is_no_warning():
    assert not [line for line in directives(Config(warning_lead_s=0)) if "signal" in line]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60, "00:01:00"), (59.2, "00:01:00"), (3600, "01:00:00"), (172_800, "48:00:00"), (360_001, "100:00:01")],
)
def test_slurm_time(seconds, text):
    assert slurm_time(seconds) == text


@pytest.mark.parametrize(
    "given",
    [
        {"run_dir": Path("/a\n#SBATCH --uid=0")},
        {"output": "a\nb"},
        {"command": "one\ntwo"},
        {"variables": {"A": "x\ny"}},
    ],
)
def test_a_line_break_cannot_smuggle_in_a_line(given):
    with pytest.raises(UsageError, match="line break"):
        render(Config(), **{"command": ["true"], "run_dir": RUN_DIR, **given})


# -- what the ranks are told ------------------------------------------------------------------------------


def test_with_a_stored_configuration_its_path_is_all(batch):
    config = Config.load(
        overrides={
            "checkpoint.every_steps": 7,
            "environment.variables": {"A_B": "it's $HOME"},
            "environment.setup": ["A_SETUP='done here'", "export A_SETUP"],
            "slurm.srun_args": ["--cpu-bind=cores"],
            "slurm.container": ["env"],
            "node_types": [{"name": "a100"}],
        }
    )
    code, _, calls = batch(
        ["true", "a b"], config=config, config_path=Path("/c.yaml"), rank_output="/logs/%j_%t.log",
        variables={"SUBMITIT_EXECUTOR": "slurm"}, environ={**SLURM_ENVIRON, "SLURM_CPUS_PER_TASK": "8"},
    )  # fmt: skip
    assert code == 0
    assert calls == [
        "srun --nodes=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --output=/logs/%j_%t.log --cpu-bind=cores env true a b"
    ]
    assert sorted((batch.folder / "environment").read_text().splitlines()) == [
        "A_B=it's $HOME",
        "A_SETUP=done here",
        "HPC_RESUME_BATCH=1",
        "HPC_RESUME_CHAIN=12",
        "HPC_RESUME_CONFIG=/c.yaml",
        "HPC_RESUME_NODE_TYPE=a100",
        f"HPC_RESUME_RUN_DIR={batch.folder}/run",
        "PYTHONUNBUFFERED=1",
        "SLURM_EXIT_ERROR=194",
        "SLURM_EXPORT_ENV=ALL",
        "SRUN_CPUS_PER_TASK=8",
        "SUBMITIT_EXECUTOR=slurm",
    ]


def test_without_one_the_ranks_read_the_same_settings_from_the_environment(batch):
    config = Config.load(
        overrides={
            "name": "on",  # YAML would read it as true
            "seed": 3,
            "warning_lead_s": 33,
            "warning_signal": "USR1",
            "checkpoint": {"every_steps": 7, "every_s": None},
            "stop.watchdog_s": 12.5,
            "budget.max_idle": 9,
            "data": {"paths": ["/a b", "$TMPDIR/it's"], "preprocessing": "1.5", "check": "off", "ignore": []},
            "allow_data_change": "labels: fixed",
            "node_types": [{"time_limit_s": 3600}],
        }
    )
    assert batch(["true"], config=config)[0] == 0
    lines = (batch.folder / "environment").read_text().splitlines()
    environ = dict(line.split("=", 1) for line in lines)
    read = Config.load(environ=environ)
    for setting in (
        "name",
        "seed",
        "warning_lead_s",
        "warning_signal",
        "checkpoint",
        "stop",
        "budget",
        "data",
    ):
        assert getattr(read, setting) == getattr(config, setting), setting
    assert read.allow_data_change == config.allow_data_change
    assert read.time_limit_s == 3600
    assert read.run_dir == str(batch.folder / "run")


def test_a_job_that_was_submitted_without_its_environment_gives_ranks_what_it_has_set_up(batch):
    assert batch(["true"], environ={**SLURM_ENVIRON, "SLURM_EXPORT_ENV": "NONE"})[0] == 0
    assert "SLURM_EXPORT_ENV=ALL" in (batch.folder / "environment").read_text().splitlines()


@pytest.mark.parametrize("own", [None, "4"])
def test_the_cpus_of_another_jobs_ranks_are_not_asked_for(batch, own):
    environ = {**SLURM_ENVIRON, "SRUN_CPUS_PER_TASK": "8", **({"SLURM_CPUS_PER_TASK": own} if own else {})}
    assert batch(["true"], environ=environ)[0] == 0
    lines = (batch.folder / "environment").read_text().splitlines()
    assert [line for line in lines if line.startswith("SRUN")] == (
        [f"SRUN_CPUS_PER_TASK={own}"] if own else []
    )


def test_a_line_of_shell_is_taken_as_it_is(batch):
    assert batch('bash -c "exit 0" && true')[0] == 0


# -- other node types, other ways to go on ----------------------------------------------------------------

TYPES = [
    {"name": "a", "partition": "main", "constraint": "a100|h100", "wait_limit_s": 60, "time_limit_s": 3600},
    {"name": "b", "partition": "low", "nodes": 2, "tasks_per_node": 4, "mem_gb": 10, "time_limit_s": 3600},
]


def test_any_node_type_can_be_asked_for_first(batch):
    config = Config(node_types=TYPES)
    assert "--partition=main" in directives(config)
    second = directives(config, node_type=1)
    assert [line for line in second if line.startswith(("--p", "--no", "--nt", "--mem", "--con"))] == [
        "--partition=low",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--mem=10G",
    ]
    code, _, calls = batch(["true"], config=config, node_type=1)
    assert code == 0
    assert calls == ["srun --nodes=1 --ntasks-per-node=4 --kill-on-bad-exit=1 true"]
    assert "HPC_RESUME_NODE_TYPE=b" in (batch.folder / "environment").read_text()


def test_the_ranks_are_told_all_node_types(batch):
    config = Config(node_types=TYPES)
    assert batch(["true"], config=config)[0] == 0
    lines = (batch.folder / "environment").read_text().splitlines()
    read = Config.load(environ=dict(line.split("=", 1) for line in lines))
    assert read.node_types == config.node_types


def test_what_sbatch_is_told_of_a_node_type():
    assert node_type_options(Config(node_types=TYPES), 1) == [
        "--partition=low",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--mem=10G",
        "--time=01:00:00",
    ]


def test_what_is_submitted_for_another_node_type_has_lost_its_own(batch):
    assert batch(["true"], config=Config(node_types=TYPES))[0] == 0
    kept = batch.notes.path("script", "12").read_text()
    directives = [line for line in kept.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "#SBATCH --job-name=run",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
    ]


@pytest.mark.parametrize("way", ["chain", "array"])
def test_a_job_that_has_a_successor_is_not_requeued_as_well(way):
    found = directives(Config(continuation=way))
    assert "--no-requeue" in found
    assert ("--array=1-20%1" in found) == (way == "array")
    assert ("--output=%x-%A_%a.log" in found) == (way == "array")


def test_the_successor_is_queued_before_the_work_begins(batch):
    environ = {**SLURM_ENVIRON, "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/etc/slurm.conf", "A_B": "kept"}
    code, _, calls = batch(["false"], config=Config(continuation="chain"), environ=environ)
    assert code == 1
    script = batch.notes.path("script", "12")
    assert calls[:3] == [
        f"sbatch --parsable --dependency=afterany:12 {script} 12 12 0",
        "sbatch environment: SLURM_CONF=/etc/slurm.conf",
        "srun --nodes=1 --ntasks-per-node=1 --kill-on-bad-exit=1 false",
    ]
    assert calls[3:] == ["scancel --state=PENDING 13"]
    assert batch.notes.read("over", "12") == "exit code 1"


def test_there_is_one_successor_however_often_the_job_starts(batch):
    config = Config(continuation="chain")
    environ = {**SLURM_ENVIRON, "SLURM_RESTART_COUNT": "1"}
    batch.notes.write("after", "12", "13")
    (batch.folder / "facts").write_text(facts("RUNNING"))
    code, err, calls = batch(["bash", "-c", "exit 75"], config=config, environ=environ)
    assert code == 0
    assert "goes on as job 13" in err
    assert not [call for call in calls if call.startswith("sbatch")]


def test_a_successor_that_nobody_wrote_down_is_found_in_the_queue(batch):
    (batch.folder / "queue").write_text("14 afterany:121(unfulfilled)\n15 afterany:12(unfulfilled)\n")
    (batch.folder / "facts").write_text(facts("RUNNING"))
    code, err, calls = batch(["bash", "-c", "exit 75"], config=Config(continuation="chain"))
    assert code == 0
    assert "goes on as job 15" in err
    assert not [call for call in calls if call.startswith("sbatch")]


@pytest.mark.parametrize("why", ["a person cancelled it", "all steps are done"])
def test_a_successor_that_starts_all_the_same_does_nothing(batch, why):
    batch.notes.write("over", "12", why)
    environ = {"SLURM_JOB_ID": "13", "SLURM_JOB_NUM_NODES": "1"}
    (batch.folder / "facts").write_text(facts("COMPLETED"))
    code, err, calls = batch(["true"], "12", "12", config=Config(continuation="chain"), environ=environ)
    assert code == 0
    assert why in err
    assert not [call for call in calls if call.startswith(("srun", "sbatch"))]


@pytest.mark.parametrize(
    ("known", "runs"),
    [
        pytest.param(facts("CANCELLED"), False, id="Slurm knows"),
        pytest.param(facts("TIMEOUT", "TimeLimit"), True, id="it was no person"),
        pytest.param(facts("CANCELLED") + "   PreemptTime=2026-11-24T08:30:53\n", True, id="preempted"),
        pytest.param("slurm_load_jobs error: Invalid job id specified", False, id="its accounting knows"),
    ],
)
def test_a_successor_looks_whether_a_person_has_cancelled_the_job_before_it(batch, known, runs):
    (batch.folder / "facts").write_text(known)
    (batch.folder / "accounting").write_text("CANCELLED by 1000\n")
    environ = {"SLURM_JOB_ID": "13", "SLURM_JOB_NUM_NODES": "1"}
    code, _, calls = batch(["true"], "12", "12", config=Config(continuation="chain"), environ=environ)
    assert code == 0
    assert any(call.startswith("srun") for call in calls) == runs
    assert ("cancelled job 12" in batch.notes.read("over", "12")) == (not runs)


def test_a_person_who_submits_the_script_again_begins_anew(batch):
    batch.notes.write("over", "12", "a person cancelled it")  # of a job 12 of long ago
    code, _, calls = batch(["true"], config=Config(continuation="chain"))
    assert code == 0
    assert any(call.startswith("srun") for call in calls)
    assert batch.notes.read("over", "12") == "exit code 0"


@pytest.mark.parametrize("way", ["requeue", "chain"])
def test_notes_that_cannot_be_written_keep_nobody_from_working(batch, way):
    (batch.folder / "run").write_text("a file")
    code, _, calls = batch(["true"], config=Config(continuation=way))
    assert code == 0
    assert any(call.startswith("srun") for call in calls)


# -- what comes next --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 74, 76, 127, 128, 193, 255])
def test_the_end_or_a_failure_is_passed_on_and_nothing_is_asked(batch, code):
    got, _, calls = batch(["bash", "-c", f"exit {code}"])
    assert got == code
    assert asked(calls, "") == []


@pytest.mark.parametrize("code", [0, 1, 75, 137])
@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, ".exit-12-0.json"),
        ({"SLURM_RESTART_COUNT": "3"}, ".exit-12-3.json"),
        ({"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2"}, ".exit-9_2-0.json"),
    ],
)
def test_the_exit_code_is_left_for_the_next_attempt(batch, tmp_path, code, environ, name):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    (tmp_path / "run/attempts").mkdir(parents=True)
    batch(["bash", "-c", f"exit {code}"], environ={**SLURM_ENVIRON, **environ})
    (left,) = (tmp_path / "run/attempts").iterdir()
    assert (left.name, json.loads(left.read_bytes())) == (name, {"-1": code})


def test_where_no_attempt_has_begun_nothing_is_left_and_nothing_said(batch):
    assert batch(["true"])[:2] == (0, "")


@pytest.mark.parametrize("code", [75, 129, 137, 143, 192, 194])
@pytest.mark.parametrize(
    ("state", "reason"),
    [("RUNNING", "None"), ("SIGNALING", "None"), ("COMPLETING", "TimeLimit"), ("TIMEOUT", "TimeLimit")],
)
def test_an_interruption_is_requeued(batch, code, state, reason):
    (batch.folder / "facts").write_text(facts(state, reason))
    got, err, calls = batch(["bash", "-c", f"exit {code}"])
    assert got == 0
    assert asked(calls, "requeue") == ["scontrol requeue 12"]
    assert "will go on" in err


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        pytest.param("COMPLETING", "None", id="cancelled, or requeued by Slurm"),
        pytest.param("CANCELLED", "None", id="cancelled"),
        pytest.param("COMPLETING", "NonZeroExitCode", id="failed"),
        pytest.param("PENDING", "BeginTime", id="requeued already"),
    ],
)
def test_a_job_that_is_being_ended_is_left_alone(batch, state, reason):
    (batch.folder / "facts").write_text(facts(state, reason))
    got, err, calls = batch(["bash", "-c", "exit 75"])
    assert got == 75
    assert asked(calls, "requeue") == []
    assert f"JobState={state} Reason={reason}" in err


def test_a_rank_was_faster(batch):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    (batch.folder / "answer").write_text("Job is pending execution for job 12\n")
    (batch.folder / "code").write_text("1")
    assert batch(["bash", "-c", "exit 75"])[0] == 0


def test_a_refusal_is_told_and_the_code_passed_on(batch):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    (batch.folder / "answer").write_text("Requested operation is presently disabled\n")
    (batch.folder / "code").write_text("1")
    code, err, _ = batch(["bash", "-c", "exit 75"])
    assert code == 75
    assert "presently disabled" in err
    assert "submit it again" in err


def test_a_lookup_that_fails_is_tried_again(batch):
    (batch.folder / "facts-1").write_text("")
    (batch.folder / "facts-2").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    (batch.folder / "facts").write_text(facts("RUNNING"))
    code, _, calls = batch(["bash", "-c", "exit 75"])
    assert code == 0
    assert len(asked(calls, "show")) == 3


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


def test_a_lookup_that_fails_for_good_requeues_nothing(batch):
    (batch.folder / "facts").write_text(AWAY)
    code, err, calls = batch(["bash", "-c", "exit 75"])
    assert code == 75
    assert asked(calls, "requeue") == []
    assert "(unknown): slurm_load_jobs error" in err
    assert calls.count("sleep 15") == 40


def test_a_controller_that_is_away_is_waited_for(batch):
    for count in range(1, 13):  # three times in each look
        (batch.folder / f"facts-{count}").write_text(AWAY)
    (batch.folder / "facts").write_text(facts("RUNNING"))
    for count in (1, 2):
        (batch.folder / f"answer-{count}").write_text(
            "Unable to contact slurm controller (connect failure)\n"
        )
    (batch.folder / "answer-3").write_text("slurm_requeue error: Socket timed out on send/recv operation\n")
    code, err, calls = batch(["bash", "-c", "exit 75"])
    assert code == 0
    assert calls.count("sleep 15") == 4 + 3
    assert calls[-2:] == ["scontrol show job 12", "scontrol requeue 12"]
    assert "will go on" in err


def test_a_requeue_that_slurm_has_heard_although_it_did_not_answer_is_not_repeated(batch):
    (batch.folder / "facts-1").write_text(facts("RUNNING"))
    (batch.folder / "facts").write_text(facts("COMPLETING"))
    (batch.folder / "answer-1").write_text("Socket timed out on send/recv operation\n")
    code, _, calls = batch(["bash", "-c", "exit 75"])
    assert code == 75
    assert asked(calls, "") == ["scontrol show job 12", "scontrol requeue 12", "scontrol show job 12"]


def test_nobody_is_waited_for_in_a_job_that_is_being_ended(batch):
    (batch.folder / "facts").write_text(AWAY)
    code, _, calls = batch(
        ["bash", "-c", "read -r _ _ _ shell _ < /proc/$PPID/stat; kill $shell; read -t 0.3 <> <(:); exit 75"]
    )
    assert code == 75
    assert calls.count("sleep 15") == 0
    (batch.folder / "bin/sleep").write_text(
        '#!/bin/bash\necho "sleep $1" >> calls; [ $1 = 1 ] || kill -TERM $PPID\n'
    )
    code, _, calls = batch(["bash", "-c", "exit 75"])
    assert code == 75
    assert calls.count("sleep 15") == 1


# -- jobs that come to nothing before the ranks keep a budget of it -------------------------------------------


def job_of(way, number):
    """Give the arguments and the environment of the first, second, third … job of a run."""
    if way == "array":
        element = {
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_ARRAY_TASK_MAX": "9",
        }
        return [], SLURM_ENVIRON | element
    if way in {"chain", "login"} and number > 1:
        return ["12", str(10 + number)], SLURM_ENVIRON | {"SLURM_JOB_ID": str(11 + number)}
    return [], SLURM_ENVIRON | ({"SLURM_RESTART_COUNT": str(number - 1)} if number > 1 else {})


@pytest.mark.parametrize("way", ["requeue", "chain", "array", "exit", "login"])
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(143, id="a module is not there: its peers were ended"),
        pytest.param(75, id="ranks that did not meet"),
        pytest.param(194, id="srun could not start them"),
    ],
)
def test_jobs_in_a_row_whose_ranks_never_begin_end_the_run(batch, way, code):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    config = Config(continuation=way)
    for number in (1, 2):
        words, environ = job_of(way, number)
        got, _, _ = batch(["bash", "-c", f"exit {code}"], *words, config=config, environ=environ)
        assert got == (code if way == "login" else 0)
        assert batch.notes.read("over", "12") == ""
    words, environ = job_of(way, 3)
    got, err, calls = batch(["bash", "-c", f"exit {code}"], *words, config=config, environ=environ)
    assert got == (1 if code == 75 else code)
    why = f"3 jobs in a row ended before the ranks had begun or restored (exit code {code})"
    assert batch.notes.read("over", "12") == why
    assert why in err
    assert asked(calls, "requeue") == []
    waiting = {"chain": {"scancel --state=PENDING 13"}, "array": {"scancel --state=PENDING 12"}}
    assert {call for call in calls if call.startswith("scancel")} == waiting.get(way, set())


def test_it_is_the_budgets_number(batch):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    assert batch(["bash", "-c", "exit 143"], config=Config(budget={"max_idle": 1}))[0] == 143


def journal(batch, *kinds):
    """Shell that leaves an attempt's journal behind."""
    folder = batch.folder / "run/attempts/0007"
    lines = "".join(json.dumps({"t": 1.5, "event": kind}) + "\\n" for kind in kinds)
    return f"mkdir -p {folder}; printf '{lines}' > {folder}/events.jsonl"


@pytest.mark.parametrize("kind", ["fresh", "restored", "ended"])
def test_an_attempt_that_gets_further_ends_the_row(batch, kind):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    batch.notes.write("vain", "12", "2")
    again = {**SLURM_ENVIRON, "SLURM_RESTART_COUNT": "2"}
    code, _, _ = batch(["bash", "-c", f"{journal(batch, 'begun', kind)}; exit 138"], environ=again)
    assert code == 0
    assert batch.notes.read("vain", "12") == ""
    batch.notes.write("vain", "12", "1")
    assert batch(["bash", "-c", "exit 75"], environ=again)[0] == 0  # what an earlier job has come to
    assert batch.notes.read("vain", "12") == "2"


def test_an_attempt_that_is_killed_before_it_has_restored_counts(batch):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    batch(["bash", "-c", f"{journal(batch, 'begun', 'met')}; exit 137"])
    assert batch.notes.read("vain", "12") == "1"


@pytest.mark.parametrize(
    ("shown", "ends"),
    [
        pytest.param(facts("RUNNING") + "   PreemptTime=2026-11-24T08:30:53\n", "exit 143", id="preempted"),
        pytest.param(facts("COMPLETING"), "exit 143", id="being ended"),
        pytest.param(facts("COMPLETING", "TimeLimit"), "exit 143", id="time limit"),
        pytest.param(facts("RUNNING"), "kill -TERM $(ps -o ppid= $PPID); exit 143", id="this shell was told"),
        pytest.param(facts("RUNNING"), "exit 138", id="warned by USR1"),
        pytest.param(facts("RUNNING"), "exit 140", id="warned by USR2"),
    ],
)
def test_a_job_that_slurm_ends_does_not_count(batch, shown, ends):
    (batch.folder / "facts").write_text(shown)
    batch.notes.write("vain", "12", "2")
    batch(["bash", "-c", ends], environ={**SLURM_ENVIRON, "SLURM_RESTART_COUNT": "2"})
    assert (batch.notes.read("vain", "12"), batch.notes.read("over", "12")) == ("2", "")


def test_what_is_not_known_of_a_job_does_not_keep_it_from_counting(batch):
    """Where compute nodes can't ask Slurm, the run would be submitted for ever."""
    (batch.folder / "facts").write_text(AWAY)
    batch(["bash", "-c", "exit 143"], config=Config(continuation="login"))
    assert batch.notes.read("vain", "12") == "1"


@pytest.mark.parametrize("way", ["requeue", "chain"])
def test_a_job_that_a_person_submits_begins_a_new_row(batch, way):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    batch.notes.write("vain", "12", "2")  # of a job 12 of long ago
    assert batch(["bash", "-c", "exit 143"], config=Config(continuation=way))[0] == 0
    assert batch.notes.read("vain", "12") == "1"


def test_an_array_element_is_named_by_array_and_index(batch):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    environ = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    _, _, calls = batch(["bash", "-c", "exit 75"], environ=environ)
    assert asked(calls, "") == ["scontrol show job 12_3", "scontrol requeue 12_3"]


@pytest.mark.parametrize("code", [0, 75])
def test_signals_do_not_end_the_script_before_srun(batch, code):
    (batch.folder / "facts").write_text(facts("RUNNING"))
    # The command's parent's parent is the script: bash, then the stand-in for srun, then the command.
    hits = "shell=$(ps -o ppid= $PPID); for s in CONT TERM USR2 USR1 TERM; do kill -$s $shell; read -t 0.05 <> <(:); done"
    got, _, calls = batch(["bash", "-c", f"{hits}; echo over >> calls; exit {code}"])
    assert got == 0
    assert "over" in calls
    assert len(asked(calls, "requeue")) == (code == 75)


def test_scontrol_outlives_the_jobs_sigterm(batch):
    # Slurm signals every process of the batch step, the scontrol that is just asking included.
    (batch.folder / "facts").write_text(facts("RUNNING"))
    scontrol = batch.folder / "bin/scontrol"
    scontrol.write_text(scontrol.read_text().replace("#!/bin/bash\n", "#!/bin/bash\nkill -TERM $$\n"))
    code, _, calls = batch(["bash", "-c", "exit 75"])
    assert code == 0
    assert asked(calls, "requeue") == ["scontrol requeue 12"]


def test_strict_shell_options_of_a_setup_line_do_no_harm(batch):
    (batch.folder / "facts-1").write_text("")
    (batch.folder / "facts").write_text(facts("RUNNING"))
    config = Config(environment={"setup": ["set -euo pipefail"]})
    code, _, calls = batch(["bash", "-c", "exit 75"], config=config)
    assert code == 0
    assert asked(calls, "requeue") == ["scontrol requeue 12"]


@pytest.mark.parametrize("way", ["requeue", "chain", "array", "exit", "login"])
def test_shellcheck_has_nothing_to_say(tmp_path, shellcheck, way):
    script = tmp_path / "job.sbatch"
    for types in [TYPES[:1]] if way == "array" else [TYPES[:1], TYPES]:
        config = Config(continuation=way, node_types=types)
        script.write_text(render(config, command=["python", "train.py"], run_dir=RUN_DIR))
        assert shellcheck(script) == ""


def test_lines_are_not_too_long_to_read():
    text = render(
        Config.load(Path(__file__).parents[2] / "configs/mycluster.yaml"),
        command=["python", "train.py"],
        run_dir=RUN_DIR,
    )
    assert max(map(len, text.splitlines())) <= 110
    assert "\n\n\n" not in text


def test_reasons_reach_the_ranks_whatever_they_say():
    settings = {"why": 'it\'s 50% "worse": $HOME', "allow_config_change": "yes, really"}
    variables = _settings_as_variables(Config(**settings))
    assert Config.load(environ=variables) == Config(**settings)
    text = render(Config(**settings), command=["python", "train.py"], run_dir=Path("/run"))
    (line,) = [line for line in text.splitlines() if "HPC_RESUME_WHY" in line]
    done = subprocess.run(
        ["bash", "-c", f'{line}\nprintf %s "$HPC_RESUME_WHY"'], capture_output=True, check=True, text=True
    )
    assert done.stdout == variables["HPC_RESUME_WHY"]
