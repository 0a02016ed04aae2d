import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume import cli
from hpc_resume.checkpoint.verify import Finding
from hpc_resume.cli.jobs import _follow
from hpc_resume.job import Job, Sweep
from hpc_resume.journal import write_line
from hpc_resume.launch.handle import JobHandle, find_jobs
from hpc_resume.rundir import RunDirectory, sealed

REPOSITORY = Path(__file__).parents[1]

SCRIPT = """
import os, signal, sys, time
def train(lr=1.0, until=None):
    got = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: got.append(1))
    while until and not os.path.exists(until):
        time.sleep(0.01)
        if got: sys.exit(75)
    print("lr", lr)
    if lr == "bad":
        raise ValueError("lr is bad")
    return lr
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "gpt.py").write_text(SCRIPT)
    yield tmp_path
    for run in (tmp_path / "runs").glob("**/jobs/.."):
        for job in find_jobs(run.resolve()):
            record = job.submitit_job().state_record()
            if record.alive():
                os.kill(record.controller_pid, signal.SIGKILL)


@pytest.fixture
def finished(tmp_path):
    """A run with one attempt that is done, and no checkpoint."""
    run = RunDirectory(tmp_path / "runs" / "gpt")
    run.create("gpt")
    run.attempt(1).mkdir()
    record = {"schema": 2, "attempt": 1, "node_type": "pair", "world_size": 2, "started": 0}
    (run.attempt(1) / "attempt.json").write_bytes(sealed(record))
    events = [
        {"t": 1, "event": "fresh", "step": 0},
        {"t": 20, "event": "ended", "cause": "done", "decision": "done"},
    ]
    (run.attempt(1) / "events.jsonl").write_bytes(
        b"".join(write_line({**each, "step": 9}) for each in events)
    )
    return run.root


def call(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_status_is_a_table_or_json(finished):
    shown = call("status", finished)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[0] == "gpt: done at step 9, 1 attempt, 0 steps lost"
    record = json.loads(call("status", finished, "--json").stdout)
    assert (record["state"], record["attempts"][0]["node_type"]) == ("done", "pair")


@pytest.mark.parametrize("verb", ["status", "explain", "ls", "show", "verify", "cancel"])
def test_no_run_there_is_exit_code_3(tmp_path, verb):
    shown = call(verb, tmp_path / "nix")
    assert (shown.exit_code, shown.stdout) == (3, "")
    assert "nix" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("verb", ["status", "explain", "ls", "show", "verify", "cancel"])
def test_a_file_is_no_run_directory(tmp_path, verb):
    (tmp_path / "train.py").touch()
    shown = call(verb, tmp_path / "train.py")
    assert (shown.exit_code, shown.stdout) == (3, "")
    assert "no run directory" in shown.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("runs", "there are runs below it: give one, such as {}/runs/gpt"),
        ("runs/gtp", "did you mean {}/runs/gpt?"),
    ],
)
def test_a_folder_beside_a_run_is_told_from_it(tmp_path, finished, given, words):
    shown = call("ls", tmp_path / given)
    assert shown.exit_code == 3
    assert words.format(tmp_path) in shown.stderr


def test_explain_is_text_or_json(finished):
    shown = call("explain", finished)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[1:] == [
        "    2 ranks on this machine (pair)",
        "    from step 9 to step 9",
        "    ended by itself: all steps are done",
        "gpt is done",
        "    nothing is left to do",
    ]
    record = json.loads(call("explain", finished, "--json").stdout)
    assert (record["state"], record["next"]) == ("done", ["nothing is left to do"])


def test_ls_of_a_run_without_checkpoints(finished):
    assert call("ls", finished).stdout.strip().endswith("no checkpoint yet")
    assert json.loads(call("ls", finished, "--json").stdout) == []


def test_show_names_the_steps_there_are(finished):
    shown = call("show", finished, "--step", 7)
    assert (shown.exit_code, "no checkpoint of step 7; there are: none at all" in shown.stderr) == (3, True)


def test_verify_with_findings_is_exit_code_4(finished, monkeypatch):
    finding = Finding(path=finished / "checkpoints" / "x", problem="block 3 of 8 differs")
    monkeypatch.setattr("hpc_resume.checkpoint.verify.verify_run", lambda root, **_: [finding])
    shown = call("verify", finished)
    assert (shown.exit_code, shown.stdout) == (4, f"{finding.path}: block 3 of 8 differs\n")
    assert "1 problem in" in shown.stderr
    shown = call("verify", finished, "--json")
    assert (shown.exit_code, json.loads(shown.stdout)) == (
        4,
        [{"path": str(finding.path), "problem": finding.problem}],
    )


def test_verify_of_nothing_is_exit_code_3_and_of_sound_checkpoints_0(finished, monkeypatch):
    assert call("verify", finished).exit_code == 3
    (finished / "checkpoints" / "0000000009-0123abcd").mkdir()
    monkeypatch.setattr("hpc_resume.checkpoint.verify.verify_run", lambda root, **_: [])
    shown = call("verify", finished)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "1 checkpoint: every byte as committed" in shown.stderr


def test_submit_and_wait(here):
    shown = call("submit", "gpt.py:train", "--set", "lr=1e-3", "--wait")
    assert (shown.exit_code, shown.stdout) == (0, f"{here / 'runs' / 'gpt'}\n")
    assert "submitted job" in shown.stderr
    assert "hpc-resume status runs/gpt" in shown.stderr
    assert Job.of("runs/gpt").result() == 1e-3


def test_submit_as_json(here):
    shown = call("submit", "gpt.py:train", "--wait", "--json")
    record = json.loads(shown.stdout)
    assert (record["run_dir"], record["state"]) == (str(here / "runs" / "gpt"), "COMPLETED")
    assert record["job_id"] == Job.of("runs/gpt").id


def test_a_failure_shows_the_end_of_the_log(here):
    shown = call("submit", "gpt.py:train", "--set", "lr=bad", "--wait")
    assert shown.exit_code == 1
    assert "ValueError: lr is bad" in shown.stderr


def test_submit_a_command(here):
    (here / "c.yaml").write_text("node_types: [{ranks: 2}]\n")
    words = [
        "--run-dir",
        "runs/there",
        "-c",
        "c.yaml",
        "--wait",
        "--",
        sys.executable,
        "-c",
        "print('--wait')",
        "--wait",
    ]
    shown = call("submit", *words)
    assert (shown.exit_code, shown.stdout) == (0, f"{here / 'runs' / 'there'}\n")
    job = Job.of("runs/there")
    assert [job.log(rank).splitlines()[-1] for rank in range(2)] == ["--wait", "--wait"]


def test_a_flag_beats_the_file(here):
    (here / "c.yaml").write_text("seed: 1\nname: a\n")
    call("submit", "gpt.py:train", "-c", "c.yaml", "-o", "seed=2", "-o", "checkpoint.every_s=5", "--wait")
    stored = next((here / "runs" / "a" / "configs").iterdir()).read_text()
    assert "seed: 2" in stored
    assert "every_s: 5.0" in stored


def test_settings_of_text_are_as_they_are_written_and_arguments_as_yaml_reads_them(here, monkeypatch):
    monkeypatch.setenv("HPC_RESUME_SLURM__QOS", "1_2")
    words = ["-o", "slurm.account=00123", "-o", "name=2024_01", "-o", "seed=1_0"]
    settings = json.loads(call("config", *words, "--json").stdout)
    taken = [settings[name] for name in ("slurm.account", "slurm.qos", "name", "seed")]
    assert taken == ["00123", "1_2", "2024_01", 10]
    done = call("submit", "gpt.py:train", *words, "--set", "lr=1_0", "--wait")
    assert done.exit_code == 0, done.output
    given = Job.of("runs/2024_01").result()
    assert (type(given), given) == (int, 10)
    stored = next((here / "runs" / "2024_01" / "configs").iterdir()).read_text()
    assert "account: '00123'" in stored
    assert "lr: 10\n" in stored


def test_cancel_ends_a_job_and_says_how_it_was(here):
    call("submit", "gpt.py:train", "--set", f"until={here / 'never'}")
    job = Job.of("runs/gpt")
    shown = call("cancel", "runs/gpt")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert shown.stderr in {f"job {job.id} was {state}; cancelled\n" for state in ("PENDING", "RUNNING")}
    assert job.wait(60) == "CANCELLED"
    assert f"job {job.id} is CANCELLED already" in call("cancel", "runs/gpt").stderr


def test_whoever_waits_asks_slurm_seldom(finished, monkeypatch):
    states, sleeps = iter(["PENDING", "RUNNING", "COMPLETED"]), []
    monkeypatch.setattr(JobHandle, "state", lambda _: next(states))
    monkeypatch.setattr("time.sleep", sleeps.append)
    job = JobHandle(job_id="12", scheduler="slurm", run_dir=finished, what="", config="", submitted=1.0)
    assert _follow(Job(job)) == "COMPLETED"
    assert sleeps == [10.0, 10.0]


@pytest.mark.parametrize("verb", ["status", "cancel", "resubmit"])
def test_a_run_of_somebody_else_is_one_message(finished, monkeypatch, verb):
    path = str(finished / "a file")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    # Where an ordinary user is refused first; the tests may be run by root, who may do everything.
    monkeypatch.setattr(RunDirectory, "attempt_numbers", refuse)
    shown = call(verb, finished)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr.startswith(f"hpc-resume: {path}: Permission denied; ")
    assert f"namei -l '{path}'" in shown.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file: No space left on device; make room there",
        ),
        (OSError(errno.EROFS, "Read-only file system", b"/x"), "/x: Read-only file system; do this on"),
        (OSError(errno.EINVAL, "Invalid argument"), None),  # a mistake of ours: its traceback is wanted
        (PermissionError(errno.EPERM, "Operation not permitted"), None),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),  # whoever read it has seen enough
    ],
)
def test_what_a_filesystem_refuses_is_one_message(finished, monkeypatch, error, words):
    def refuse(*_):
        raise error

    monkeypatch.setattr(RunDirectory, "attempt_numbers", refuse)
    shown = call("status", finished)
    assert shown.exit_code == 1
    assert (shown.exception is error) == (words is None)
    assert shown.stderr.startswith(f"hpc-resume: {words}") if words else shown.stderr == ""


def test_a_watch_looks_at_intervals_that_there_are(finished):
    shown = call("resubmit", finished, "--watch", "--every", "-1")
    assert (shown.exit_code, "-1.0 is not in the range" in shown.stderr) == (2, True)


def test_a_grid_is_an_array_of_runs(here):
    words = ["submit", "gpt.py:train", "--grid", "lr=1e-3,3e-4", "--grid", "until=null"]
    shown = call(*words, "-o", "array.at_once=2", "--wait")
    assert (shown.exit_code, shown.stdout) == (0, f"{here / 'runs' / 'gpt'}\n")
    assert "2 runs submitted as job" in shown.stderr
    assert "hpc-resume status runs/gpt" in shown.stderr
    assert "gpt: 2 runs: 2 done" in shown.stderr
    sweep = Sweep("runs/gpt")
    assert sweep.names == ("lr=0.001,until=None", "lr=0.0003,until=None")
    assert [job.result() for job in sweep] == [1e-3, 3e-4]
    assert call("status", "runs/gpt").stdout.splitlines()[0] == "gpt: 2 runs: 2 done"
    rows = json.loads(call("status", "runs/gpt", "--json").stdout)
    assert [row["arguments"] for row in rows] == [{"lr": 1e-3, "until": None}, {"lr": 3e-4, "until": None}]
    again = call(*words, "--json")
    assert "2 runs done already, not submitted again" in again.stderr
    assert [row["state"] for row in json.loads(again.stdout)] == ["done", "done"]
    assert call("status", "runs/gpt/lr=0.001,until=None").stdout.startswith("gpt lr=0.001,until=None: done")


def test_one_run_of_an_array_that_fails_is_exit_code_1(here):
    shown = call("submit", "gpt.py:train", "--grid", "lr=1,bad", "--wait")
    assert shown.exit_code == 1
    assert "gpt: 2 runs: 1 done, 1 failed" in shown.stderr


def test_cancel_ends_all_runs_of_an_array(here):
    call("submit", "gpt.py:train", "--grid", "lr=1,2,3", "--set", f"until={here / 'never'}")
    assert "3 of 3 runs had a job; cancelled" in call("cancel", "runs/gpt").stderr
    assert set(Sweep("runs/gpt").wait(60).values()) == {"CANCELLED"}
    assert "0 of 3 runs had a job; cancelled" in call("cancel", "runs/gpt").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either FILE.py:FUNCTION or, after --, a command"),
        (("gpt.py:train", "--", "true"), "give either"),
        (("gpt.py:trian",), "did you mean train?"),
        (("gpt.py:train", "--set", "lrr=1"), "did you mean lr?"),
        (("gpt.py:train", "--set", "lr"), "--set lr: no assignment"),
        (("gpt.py:train", "--set", "seed=1"), "it is a setting, so write -o seed="),
        (("gpt.py:train", "-o", "sed=1"), "did you mean seed?"),
        (("gpt.py:train", "-c", "gtp.yaml"), "gtp.yaml: no such configuration file"),
        (("gpt.py:train", "-o", "node_types.0.ranks=0"), "node_types.0.ranks"),
        (("gpt.py:train", "-o", "time_limit_s=10"), "warning_lead_s"),
        (("--", "no-such-program-xyz"), "no such program"),
        (("--set", "lr=1", "--", "true"), "a command takes no arguments from us"),
        (("--grid", "lr=1", "--", "true"), "--grid: a command takes no arguments from us"),
        (("gpt.py:train", "--grid", "lr"), "--grid lr: no assignment"),
        (("gpt.py:train", "--grid", "lr="), "lr has no values"),
        (("gpt.py:train", "--grid", "lrr=1,2"), "did you mean lr? (in lrr=1, lrr=2)"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(here, words, message):
    shown = call("submit", *words)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert message in shown.stderr
    assert shown.stderr.startswith("hpc-resume: ")
    assert not (here / "runs").exists()


def test_script_prints_a_script_and_nothing_else(here):
    shown = call(
        "script",
        "-o",
        "scheduler=slurm",
        "-o",
        "node_types.0.nodes=2",
        "--",
        "python",
        "train.py",
        "--lr",
        "1",
    )
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("#!/bin/bash\n")
    assert "python train.py --lr 1" in shown.stdout
    assert str(here / "runs" / "train") in shown.stdout
    assert not (here / "runs").exists()
    done = subprocess.run(["bash", "-n"], input=shown.stdout, text=True, check=False)
    assert done.returncode == 0
    assert call("script").exit_code == 2


def test_the_script_of_a_site_file_runs_the_code_as_it_is(here):
    (here / "train.py").write_text("print(1)\n")
    site = str(
        REPOSITORY / "configs" / "mycluster.yaml"
    )  # says things of the environment, and not its source
    shown = call("script", "-c", site, "--", "python", "train.py")
    assert (shown.exit_code, "python train.py" in shown.stdout) == (0, True)
    assert not (here / "runs").exists()
    kept = call("script", "-c", site, "-o", "environment.source=snapshot", "--", "python", "train.py")
    assert (kept.exit_code, "python train.py" in kept.stdout) == (0, False)
    assert list((here / "runs" / "train" / "sources").glob("*.zip"))


def test_every_verb_says_what_it_does():
    names = set(cli.main.commands)
    assert names >= {"submit", "script", "status", "ls", "verify", "show", "prune", "cancel"}
    listed = call("--help").stdout
    for name in names:
        assert f"\n  {name} " in listed
        assert "Usage: " in call(name, "--help").stdout


PRELUDE = """
import sys
from click.testing import CliRunner
from hpc_resume import cli
run = sys.argv[1]
"""
HEAVY = "print([m for m in ('torch', 'submitit', 'h5py', 'numpy', 'pydantic', 'rich', 'jinja2') if m in sys.modules])"


def loaded(code: str, run: Path, cwd: Path) -> list[str]:
    """Which heavy modules a fresh interpreter has after some code."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{code}\n{HEAVY}", str(run)],
        env=environ, cwd=cwd, capture_output=True, text=True, check=True, timeout=180,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1].replace("'", '"'))


def test_importing_the_package_and_asking_for_help_load_nothing_heavy(finished, tmp_path):
    assert loaded("import hpc_resume; hpc_resume.HpcResumeError; dir(hpc_resume)", finished, tmp_path) == []
    assert loaded("assert CliRunner().invoke(cli.main, ['--help']).exit_code == 0", finished, tmp_path) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["status"], 0), (["explain"], 0), (["ls"], 0), (["show"], 3), (["verify"], 3), (["cancel"], 3), (["resubmit"], 3),
        (["move-on"], 3),
        (["prune", "RUN", "--keep", "1"], 0), (["script", "--", "true"], 0),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_no_verb_that_needs_no_tensors_loads_torch(finished, tmp_path, words, code):
    given = words if "--" in words or "RUN" in words else [*words, "RUN"]
    call_it = f"words = [run if word == 'RUN' else word for word in {given}]\n"
    call_it += f"got = CliRunner().invoke(cli.main, words)\nassert got.exit_code == {code}, got.output"
    heavy = loaded(call_it, finished, tmp_path)
    assert "torch" not in heavy
    if words[0] in {"status", "explain", "ls", "show", "verify", "prune"}:
        assert not {"submitit", "h5py", "pydantic"} & set(heavy)


def test_submitting_loads_no_torch(here):
    code = "assert CliRunner().invoke(cli.main, ['submit', 'gpt.py:train', '--wait']).exit_code == 0"
    assert "torch" not in loaded(code, here, here)


def test_on_a_terminal_tables_have_frames_and_no_color_is_respected(finished):
    """A real terminal: rich decides by itself what it may do."""
    import pty

    def on_a_terminal(**environ):
        controller, terminal = pty.openpty()
        code = "from hpc_resume.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "status", str(finished)], stdout=terminal, stdin=terminal,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color", "COLUMNS": "120", **environ},
        )  # fmt: skip
        os.close(terminal)
        output = b""
        try:
            while chunk := os.read(controller, 4096):
                output += chunk
        except OSError:
            pass  # Linux's way to say that the terminal's other end is closed
        os.close(controller)
        assert process.wait(60) == 0
        return output.decode()

    plain = on_a_terminal(NO_COLOR="1")
    assert "━" in plain or "─" in plain
    assert "pair" in plain
    assert "\x1b[3" not in plain
