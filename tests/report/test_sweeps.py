import json

import pytest

from hpc_resume.journal import write_line
from hpc_resume.report.sweeps import JobWord, read_element, sweep_table
from hpc_resume.rundir import RunDirectory, sealed


def make(root, *, arguments=None, decision=None, cause="done", attempts=1, rows=()):
    run = RunDirectory(root)
    run.create(f"gpt {root.name}", arguments=arguments)
    for number in range(1, attempts + 1):
        run.attempt(number).mkdir()
        record = {"schema": 2, "attempt": number, "kind": "slurm", "job_id": "9_0", "started": 0}
        (run.attempt(number) / "attempt.json").write_bytes(sealed(record))
        events = [{"t": 1, "event": "fresh", "step": 0}]
        if decision:
            events.append({"t": 2, "event": "ended", "cause": cause, "decision": decision, "step": 9})
        (run.attempt(number) / "events.jsonl").write_bytes(b"".join(map(write_line, events)))
        (run.attempt(number) / "metrics-rank-00000.jsonl").write_bytes(b"".join(map(write_line, rows)))
    return run


def word(state, over):
    return JobWord(job_id="9_0", state=state, over=over)


@pytest.mark.parametrize(
    ("left", "job", "state"),
    [
        ({"attempts": 0}, None, "not submitted"),
        ({"attempts": 0}, word("PENDING", False), "waiting"),
        ({"attempts": 0}, word("RUNNING", False), "running"),
        ({"attempts": 0}, word("COMPLETED", True), "done"),
        ({"attempts": 0}, word("CANCELLED", True), "cancelled"),
        ({"attempts": 0}, word("FAILED", True), "failed"),
        ({"attempts": 0}, word("GONE", True), "interrupted"),
        ({"decision": "done"}, None, "done"),
        ({"decision": "done"}, word("GONE", True), "done"),
        ({"decision": "done"}, word("UNKNOWN", None), "done"),
        ({"decision": "done"}, word("RUNNING", False), "running"),  # with other arguments, again
        ({"decision": "stop", "cause": "cancel"}, word("CANCELLED", True), "cancelled"),
        ({"decision": "stop", "cause": "cancel"}, word("PENDING", False), "waiting"),
        ({"decision": "stop", "cause": "crash"}, word("GONE", True), "failed"),
        ({"decision": "continue", "cause": "time_limit"}, word("PENDING", False), "waiting"),
        ({"decision": "continue", "cause": "time_limit"}, word("UNKNOWN", None), "waiting"),
        ({"decision": "continue", "cause": "time_limit"}, word("CANCELLED", True), "interrupted"),
    ],
)
def test_the_state_of_a_run_in_an_array(tmp_path, left, job, state):
    assert read_element(make(tmp_path / "lr=1", **left), job).state == state


def test_a_table_with_arguments_and_the_last_metrics(tmp_path):
    rows = [{"t": 1, "step": 7, "loss": 2.0}, {"t": 2, "step": 8, "loss": 0.123456, "acc": 1}]
    elements = [
        read_element(
            make(tmp_path / "a", arguments={"lr": 1e-3}, decision="done", attempts=2, rows=rows), None
        ),
        read_element(make(tmp_path / "b", arguments={"lr": 1e-4, "opt": "sgd"}, attempts=0), None),
        read_element(make(tmp_path / "c", attempts=0), word("PENDING", False)),
    ]
    table = sweep_table("gpt", elements, note="a note")
    assert table.lines() == [
        "gpt: 3 runs: 1 done, 1 waiting, 1 not submitted",
        "lr      opt  state          step  attempts  job    loss  acc",
        "0.001        done              9         2       0.1235    1",
        "0.0001  sgd  not submitted     0         0",
        "             waiting           0         0  9_0",
        "a note",
    ]
    assert "<td>0.1235</td>" in table.html()
    assert json.loads(json.dumps(elements[0].to_json()))["metrics"] == {"loss": 0.123456, "acc": 1.0}


def test_a_damaged_run_does_not_hide_the_others(tmp_path):
    run = make(tmp_path / "a", arguments={"lr": 1}, decision="done")
    run.identity_path.write_text("{}")
    found = read_element(run, None)
    assert (found.state, found.arguments) == ("damaged", {})
    assert "run.json: damaged" in found.why
    assert sweep_table("gpt", [found]).title == "gpt: 1 run: 1 damaged"


def test_a_file_that_ends_in_the_middle_of_a_line(tmp_path):
    run = make(tmp_path / "a", decision="done", rows=[{"t": 1, "step": 7, "loss": 2.0}])
    with (run.attempt(1) / "metrics-rank-00000.jsonl").open("a") as file:
        file.write('{"t": 2, "step": 8, "lo')
    assert read_element(run, None).metrics == {"loss": 2.0}
