"""The script inside its allocation: started again in place, nodes looked at first, containers. Slurm is a stand-in."""

import json
import os
import subprocess
import time

import pytest

from hpc_resume.config import Config
from hpc_resume.journal import write_line
from hpc_resume.launch.script import render

# Each start of the ranks takes the next line of `plan`: what happens, as shell. A look at the nodes is no start.
FAKES = {
    "srun": """\
echo "srun $*" >> calls
case $* in
    *" true") exit "$(cat answers 2>/dev/null || echo 0)" ;;
    *" doctor --node") cat health; exit 1 ;;
esac
line=$(head -n 1 plan); sed -i 1d plan
eval "$line"
""",
    "scontrol": """\
echo "scontrol $*" >> calls
case $1-$2 in
    show-job) cat facts ;;
    show-hostnames) tr , '\\n' <<< "$3" ;;
esac
""",
    "sinfo": "echo 4\n",
    "sleep": "",
}
ENVIRON = {
    "SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_PARTITION": "main",
}  # fmt: skip
CRASHED = {"event": "ended", "cause": "crash", "evidence": "rank 1 was killed", "decision": "continue"}
STOPPED = {**CRASHED, "decision": "stop"}
FRESH = {"event": "fresh", "step": 0}
#: With which srun ends the peers of a rank that died.
PEERS = {"event": "stop_requested", "cause": "signal", "signal": "SIGTERM", "rank": 0}


def facts(state="RUNNING", left_s=9999, more="", excluded="(null)"):
    return (
        f"JobId=12 JobName=a\n   JobState={state} Reason=None Dependency=(null)\n   Requeue=1 Restarts=0\n"
        f"   StartTime=1 EndTime={int(time.time()) + left_s} Deadline=N/A\n{more}"
        f"   ReqNodeList=(null) ExcNodeList={excluded}\n   NodeList=n1\n"
    )


class Batch:
    """A rendered script among stand-ins; ``starts`` says what each start of the ranks does."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        for name, body in FAKES.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/bash\n{body}")
            path.chmod(0o755)
        self.write("facts", facts())
        self.config = {}

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def __call__(self, *starts, environ=None, bash=("bash",)):
        self.write("calls", "")
        self.write("plan", "\n".join(starts) + "\n")
        config = Config.load(overrides={"warning_lead_s": 30, **self.config})
        text = render(config, command=["python", "train.py"], run_dir=self.run)
        done = subprocess.run(
            [*bash, "-c", text], cwd=self.folder, capture_output=True, text=True, timeout=60, check=False,
            start_new_session=True, env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}", **ENVIRON, **(environ or {})},
        )  # fmt: skip
        self.err = done.stderr
        self.calls = (self.folder / "calls").read_text().splitlines()
        self.starts = sum(call.endswith("python train.py") for call in self.calls)
        return done.returncode

    def attempt(self, number, *events):
        """Shell that leaves an attempt's journal behind."""
        source = self.folder / f"journal-{number}"
        source.write_bytes(b"".join(map(write_line, events)))
        folder = f"{self.run}/attempts/{number:04d}"
        return f"mkdir -p {folder} && cp {source} {folder}/events.jsonl"

    def asked(self, what):
        return [call for call in self.calls if call.startswith(f"scontrol {what}")]


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path)


# -- started again in place -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [137, 139, 143])
def test_killed_ranks_are_started_again_without_a_requeue(batch, code):
    assert batch(f"exit {code}", "exit 0") == 0
    assert batch.starts == 2
    assert batch.asked("requeue") == []
    assert f"exit code {code}, so the ranks of job 12 are started again in place" in batch.err


def test_so_are_ranks_that_told_of_a_crash(batch):
    first = batch.attempt(1, {"event": "begun"}, {**CRASHED, "exclude": [], "move_on": False})
    assert batch(f"{first}; exit 75", "exit 0") == 0
    assert batch.starts == 2
    assert batch.asked("requeue") == []


def test_so_are_ranks_that_were_ended_because_a_peer_had_died(batch):
    assert batch(f"{batch.attempt(1, PEERS)}; exit 137", "exit 0") == 0
    assert batch.starts == 2
    assert batch(f"{batch.attempt(2, PEERS, {**CRASHED, 'cause': 'unknown'})}; exit 75", "exit 0") == 0
    assert batch.starts == 2


def test_twice_in_a_row_and_no_more(batch):
    assert batch(*["exit 137"] * 5) == 0
    assert batch.starts == 3
    assert batch.asked("requeue") == ["scontrol requeue 12"]


def test_a_new_checkpoint_renews_the_count(batch):
    save = f"mkdir -p {batch.run}/checkpoints/000000000%d-0123abcd; exit 137"
    batch.config = {"budget.restarts_in_place": 1}
    assert batch(save % 1, save % 2, save % 3, "exit 137", "exit 0") == 0
    assert batch.starts == 4
    assert len(batch.asked("requeue")) == 1


def test_never_if_it_is_switched_off(batch):
    batch.config = {"budget.restarts_in_place": 0}
    assert batch("exit 137") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


@pytest.mark.parametrize(
    "words",
    [
        [{**CRASHED, "cause": "signal"}],
        [{**CRASHED, "cause": "time_limit"}],
        [{**CRASHED, "cause": "preemption"}],
        [{**CRASHED, "decision": "stop"}],
        [{**PEERS, "signal": "SIGUSR2"}],
        [{**PEERS, "cause": "preemption"}],
        [PEERS, {"event": "stop_agreed"}],
        [{**PEERS, "signal": "SIGUSR2"}, CRASHED],
        [{**CRASHED, "exclude": ["n1"], "move_on": False}],
        [{**CRASHED, "exclude": [], "move_on": True}],
    ],
)
@pytest.mark.parametrize("code", [75, 137])
def test_a_stop_is_no_crash(batch, words, code):
    assert batch(f"{batch.attempt(1, *words)}; exit {code}") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


def test_nor_is_a_run_that_is_over(batch):
    over = f"echo why > {batch.run}/continuation/over-12"
    assert batch(f"{over}; exit 137", "exit 0") == 137
    assert (batch.starts, batch.asked("requeue")) == (1, [])


@pytest.mark.parametrize("code", [75, 138, 140])
def test_ranks_that_left_no_word_but_were_not_killed_by_a_crash(batch, code):
    """75: another allocation may have better luck; 138 and 140: a warning before they knew what it means."""
    assert batch(f"exit {code}") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


def test_a_code_of_sruns_own_is_not_left_as_the_ranks(batch):
    assert batch("exit 137", "exit 194") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (2, 1)
    assert not (batch.run / "attempts/.exit-12-0.json").exists()
    assert batch(f"{batch.attempt(1, FRESH)}; exit 137", "exit 194") == 0
    assert json.loads((batch.run / "attempts/.exit-12-0.json").read_text()) == {"-1": 137}


@pytest.mark.parametrize("code", [0, 1, 2, 127, 255])
def test_the_end_and_a_mistake_are_passed_on(batch, code):
    assert batch(f"{batch.attempt(1, FRESH, STOPPED)}; exit {code}") == code
    assert (batch.starts, batch.asked("")) == (1, [])


# -- srun leaves with 1 where the kernel has killed for want of memory, whatever the ranks left with ---------


@pytest.mark.parametrize(
    ("words", "code", "restarts"),
    [
        pytest.param([FRESH, CRASHED], 75, True, id="rank 0 has told of a crash"),
        pytest.param([FRESH, {**CRASHED, "cause": "out_of_memory"}], 75, False, id="of want of memory"),
        pytest.param([FRESH], 137, True, id="it was killed"),
        pytest.param([{"event": "restored", "step": 9}], 137, True, id="it was killed after a restore"),
        pytest.param([FRESH, {**PEERS, "signal": "SIGUSR2"}], 137, False, id="while it was stopping"),
    ],
)
def test_a_kill_for_want_of_memory_ends_no_run(batch, words, code, restarts):
    first = batch.attempt(1, {"event": "begun"}, *words)
    assert batch(f"{first}; exit 1", "exit 0") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == ((2, 0) if restarts else (1, 1))
    assert f"srun left with 1, but by the journal it was {code}" in batch.err
    if not restarts:
        assert json.loads((batch.run / "attempts/.exit-12-0.json").read_text()) == {"-1": code}


def test_a_torchrun_that_was_warned_in_the_last_step_leaves_with_1_and_the_run_is_done(batch):
    done = {**CRASHED, "cause": "done", "decision": "done"}
    assert batch(f"{batch.attempt(1, FRESH, done)}; exit 1") == 0
    assert (batch.starts, batch.asked("requeue")) == (1, [])


def test_ranks_that_leave_with_1_and_nobody_has_said_more_have_failed(batch):
    """Before they have restored, no budget would end what fails each time."""
    assert batch(f"{batch.attempt(1, {'event': 'begun'})}; exit 1") == 1
    assert batch("exit 1") == 1
    assert batch(f"{batch.attempt(2, FRESH)}; exit 137", "exit 1") == 1  # a word of an earlier attempt
    assert batch.asked("requeue") == []


def test_an_earlier_attempts_word_is_not_taken_for_this_ones(batch):
    first, second = batch.attempt(1, CRASHED), batch.attempt(2, {"event": "begun"})
    assert batch(f"{first}; exit 75", f"{second}; exit 75") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (2, 1)
    assert batch("exit 75") == 0  # the next allocation, which did not get as far as an attempt
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(facts("COMPLETING"), id="being ended"),
        pytest.param(facts("SIGNALING"), id="being signalled"),
        pytest.param(facts(left_s=80), id="no time left"),  # the warning lead is 30 s, and a minute more
        pytest.param(facts(more="   PreemptEligibleTime=1 PreemptTime=1795532183\n"), id="preempted"),
        pytest.param("slurm_load_jobs error: Unable to contact slurm controller\n", id="unknown"),
    ],
)
def test_only_in_a_job_that_nobody_is_ending(batch, shown):
    batch.write("facts", shown)
    batch("exit 137", "exit 0")
    assert batch.starts == 1


def test_a_job_without_an_end_has_time_left(batch):
    batch.write(
        "facts", "JobId=12\n   JobState=RUNNING Reason=None\n   StartTime=1 EndTime=Unknown Deadline=N/A\n"
    )
    assert batch("exit 137", "exit 0") == 0
    assert batch.starts == 2


def test_not_after_a_signal_to_this_shell(batch):
    assert batch("kill -TERM $PPID; read -t 0.2 <> <(:); exit 137", "exit 0") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


def test_a_signal_just_when_srun_ends_is_not_taken_for_a_failure(batch):
    for _ in range(10):  # each fifth time bash loses the code
        assert batch("kill -TERM $PPID; exit 75") == 0, batch.err
        assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


def test_the_signals_of_its_own_requeue_kill_nothing_that_this_shell_still_has_to_say(batch):
    """They come to all of the job's processes, in the moment in which the requeued job is adjusted."""
    storm = "trap '' TERM; for _ in {1..400}; do kill -TERM 0; read -t 0.002 <> <(:); done"
    path = batch.folder / "bin/scontrol"
    begun = f"({storm}) >/dev/null 2>&1 & read -t 0.1 <> <(:)"
    path.write_text(f"{path.read_text()}[ $1 != requeue ] || {{ {begun} || :; }}\n")
    more = {"exclude": ["n1"], "move_on": False}
    decided = f"cd {batch.run}/continuation; echo n1 > exclude-12; echo 60 > delay-12"
    assert batch(f"{batch.attempt(1, {**CRASHED, **more})}; ({decided}); exit 75") == 0, batch.err
    assert batch.asked("update") == ["scontrol update JobId=12 StartTime=now+60 ExcNodeList=n1"]


def test_not_on_nodes_that_do_not_answer(batch):
    batch.write("answers", "1")
    assert batch("exit 137", "exit 0") == 0
    assert (batch.starts, len(batch.asked("requeue"))) == (1, 1)


def test_strict_options_do_no_harm(batch):
    batch.config = {"environment.setup": ["set -euo pipefail"], "slurm.check_nodes": True}
    batch.write("health", "hpc_resume: node n1 is fit\n")
    assert batch("exit 137", "exit 137", "exit 0", bash=("bash", "-eu")) == 0, batch.err
    assert batch.starts == 3


# -- nodes are looked at ----------------------------------------------------------------------------------

UNFIT = 'hpc_resume: node n2 is unfit: GPU 0: CUDA error "x" \\n\nhpc_resume: node n1 is fit\n'


@pytest.fixture
def checked(batch):
    batch.config = {"slurm.check_nodes": True, "node_types": [{"nodes": 2}]}
    environ = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n1,n2"}

    def run(*starts, **more):
        return batch(*starts, environ={**environ, **more})

    return run


def notes(batch):
    path = batch.run / "jobs/unfit-nodes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_fit_nodes_are_worked_on(batch, checked):
    batch.write("health", "hpc_resume: node n1 is fit\nhpc_resume: node n2 is fit\n")
    assert checked("exit 0") == 0
    assert batch.starts == 1
    look = batch.calls[0]
    assert look.startswith(
        "srun --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=0 python -m hpc_resume.cli doctor"
    )
    assert notes(batch) == []


def test_an_unfit_node_is_written_down_and_kept_out_of_the_next_attempt(batch, checked):
    batch.write("health", UNFIT)
    assert checked("exit 0") == 0
    assert batch.starts == 0
    assert batch.asked("requeue") + batch.asked("update") == [
        "scontrol requeue 12", "scontrol update JobId=12 ExcNodeList=n2",
    ]  # fmt: skip
    assert batch.calls.index("scontrol requeue 12") < batch.calls.index(
        "scontrol update JobId=12 ExcNodeList=n2"
    )
    (note,) = notes(batch)
    assert (note["job_id"], note["nodes"]) == ("12", {"n2": "GPU 0: CUDA error x n"})
    assert abs(note["t"] - time.time()) < 100
    assert "node n2 is unfit: GPU 0" in batch.err


def test_a_node_that_says_nothing_is_unfit(batch, checked):
    batch.write("health", "hpc_resume: node n1 is fit\nsrun: error: n2: task 1: Killed\n")
    checked("exit 0")
    assert [note["nodes"] for note in notes(batch)] == [{"n2": "no answer within 120 s"}]


def test_all_that_are_unfit_stand_in_one_line(batch, checked):
    batch.write("health", "")
    checked("exit 0")
    assert [list(note["nodes"]) for note in notes(batch)] == [["n1", "n2"]]
    assert batch.asked("update") == ["scontrol update JobId=12 ExcNodeList=n1,n2"]


def test_what_was_excluded_before_stays_so(batch, checked):
    batch.write("health", UNFIT)
    batch.write("facts", facts(excluded="n7"))
    checked("exit 0")
    assert batch.asked("update") == ["scontrol update JobId=12 ExcNodeList=n7,n2"]


def test_nodes_are_not_excluded_if_too_few_would_be_left(batch, checked):
    batch.write("health", UNFIT)
    batch.write("facts", facts(excluded="n7,n8"))  # 4 nodes in all, 2 are needed
    assert checked("exit 0") == 0
    assert (len(batch.asked("requeue")), batch.asked("update")) == (1, [])


def test_after_three_looks_that_led_to_no_attempt_nobody_looks_any_more(batch, checked):
    batch.write("health", UNFIT)
    for restart in range(3):
        assert checked("exit 0", SLURM_RESTART_COUNT=str(restart)) == 0
        assert batch.starts == 0
        assert not (batch.run / "continuation/vain-12").exists()  # no fault of the ranks
    assert checked(f"{batch.attempt(1, CRASHED)}; exit 0", SLURM_RESTART_COUNT="3") == 0
    assert batch.starts == 1
    later_s = time.time() + 100
    os.utime(batch.run / "attempts/0001", (later_s, later_s))
    assert checked("exit 0", SLURM_RESTART_COUNT="4") == 0  # there has been an attempt since
    assert batch.starts == 0


def test_nodes_are_looked_at_before_a_restart_in_place_too(batch, checked):
    batch.write("health", "hpc_resume: node n1 is fit\nhpc_resume: node n2 is fit\n")
    batch.write("unfit", UNFIT)
    assert checked("cp unfit health; exit 137", "exit 0") == 0
    assert batch.starts == 1
    assert not (batch.run / "continuation/vain-12").exists()
    assert batch.asked("update") == ["scontrol update JobId=12 ExcNodeList=n2"]


# -- what it looks like -----------------------------------------------------------------------------------

ALL = {
    "slurm.check_nodes": True,
    "slurm.container": {"image": "a.sif", "args": ["--nv"]},
    "environment": {"modules": ["gcc/13"], "activate": "~/env", "setup": ["ulimit -n 4096"]},
}


@pytest.mark.parametrize(
    "overrides", [{}, ALL, {**ALL, "budget.restarts_in_place": 0}, {"slurm.check_nodes": True}]
)
def test_shellcheck_has_nothing_to_say(tmp_path, shellcheck, overrides):
    script = tmp_path / "job.sbatch"
    script.write_text(
        render(Config.load(overrides=overrides), command=["python", "train.py"], run_dir=tmp_path)
    )
    assert shellcheck(script) == ""
    assert "\n\n\n" not in script.read_text()


def test_a_container_gets_its_folder_made_and_nodes_are_looked_at_from_inside(batch):
    batch.config = ALL | {"environment": {}}
    batch.write("health", "hpc_resume: node n1 is fit\n")
    assert batch("exit 0") == 0
    assert batch.run.is_dir()
    inside = f"apptainer exec --bind={batch.run} --bind={batch.folder} --pwd={batch.folder} --nv a.sif python"
    assert batch.calls == [
        f"srun --nodes=1 --ntasks-per-node=1 --kill-on-bad-exit=0 {inside} -m hpc_resume.cli doctor --node",
        "scontrol show hostnames n1",
        f"srun --nodes=1 --ntasks-per-node=1 --kill-on-bad-exit=1 {inside} train.py",
    ]
