"""Runs that branch: what a fork, a rollback and other settings do to a real training."""

import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import hpc_resume as hr
from hpc_resume import cli
from hpc_resume.checkpoint.difference import tensor_differences, value_differences
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.journal import read_events
from hpc_resume.policy.retry import in_vain, why_spent
from hpc_resume.report.metrics import read_metrics
from hpc_resume.report.status import status
from hpc_resume.rollbacks import Rollback
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.order import permute
from hpc_resume.rundir import RunDirectory, checkpoint_step
from tests.ranks import Attempt
from tests.run.test_history import Story, began, ended
from tests.run.training import Samples


def train(steps=12, *, batch=8, lr=0.1, keep=True, entry=None, **settings):
    """Train one layer, saving every three steps; ``keep``: the rate is what the checkpoint says."""
    settings["checkpoint"] = {"every_steps": 3, "every_s": None}
    if entry is not None:
        settings["entry"] = {"target": "a.py:train", "kwargs": entry}
        lr = entry["lr"]
    with hr.Run(**settings) as run:
        net = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
        data = run.loader(Samples(), global_batch=batch)
        run.track(model=net, optimizer=optimizer, data=data)
        if not keep and "lr" in run.changed:
            for group in optimizer.param_groups:
                group["lr"] = lr
        for _, (index, x, y) in run.steps(data, until=steps):
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(
                loss=loss,
                first=index[0].item(),
                rate=optimizer.param_groups[0]["lr"],
                changed=len(run.changed),
            )
            time.sleep(0.002)


def with_settings(steps, options):
    train(steps, **options)


def attempt(run_dir, steps=12, code=0, size=1, **options):
    job = f"job-{len(list(run_dir.glob('state-*')))}"
    done = Attempt(run_dir, size, with_settings, steps, options, job=job)
    assert done.wait() == [code] * size, done.log.read_text()
    return done.log.read_text()


def events(run_dir, number, kind):
    found = read_events(RunDirectory(run_dir).attempt(number) / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def rows(run_dir, name):
    return [row.values[name] for row in read_metrics(run_dir)]


def steps(run_dir):
    return sorted(map(checkpoint_step, RunDirectory(run_dir).checkpoint_names()))


def differences(one, two):
    with hr.Checkpoint(one) as a, hr.Checkpoint(two) as b:
        return [*tensor_differences(a, b), *value_differences(a, b)]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run of twelve steps; made once, and copied by who changes it."""
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    attempt(run_dir)
    assert steps(run_dir) == [3, 6, 9, 12]
    return run_dir


def copied(parent, tmp_path):
    """The same run elsewhere; the settings say where it is, and nothing else does."""
    shutil.copytree(parent, tmp_path / "run")
    return tmp_path / "run"


def call(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_a_fork_with_the_same_settings_is_its_parents_continuation_bit_for_bit(parent, tmp_path):
    shown = call("fork", parent, "--at", 6, "--to", tmp_path / "fork", "--why", "to compare")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"{tmp_path / 'fork'}\n"
    assert f"start it as its parent was started, with run_dir {tmp_path / 'fork'}" in shown.stderr
    log = attempt(tmp_path / "fork")
    assert "forked from step 6 of " in log
    assert "restored step 6" in log
    assert steps(tmp_path / "fork")[-3:] == [6, 9, 12]  # and step 3, if step 6 refers to it
    assert differences(parent, tmp_path / "fork") == []
    assert rows(tmp_path / "fork", "loss") == rows(parent, "loss")[6:]
    assert rows(tmp_path / "fork", "first") == rows(parent, "first")[6:]
    assert events(tmp_path / "fork", 1, "config_changed") == []
    (forked,) = events(tmp_path / "fork", 1, "forked")
    assert forked["why"] == "to compare"
    assert verify_run(tmp_path / "fork") == verify_run(parent) == []
    assert status(tmp_path / "fork").branching[0].startswith("forked from step 6 of ")
    for words in (["status"], ["ls"], ["show", "--step", 6], ["explain"]):
        assert "forked from step 6" in call(words[0], tmp_path / "fork", *words[1:]).stdout
    assert "forked" not in call("show", tmp_path / "fork").stdout
    assert "from the fork's parent" in call("ls", tmp_path / "fork").stdout


def test_a_rolled_back_run_goes_on_from_there_and_equals_itself(parent, tmp_path):
    run = copied(parent, tmp_path)
    with hr.Checkpoint(run) as checkpoint:
        last = checkpoint.path
    shown = call("rollback", run, "--to", 6, "--why", "the loss went up", "--dry-run")
    assert (shown.exit_code, steps(run), len(shown.stdout.splitlines())) == (0, [3, 6, 9, 12], 2)
    shown = call("rollback", run, "--to", 6, "--why", "the loss went up")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("rolled back from step 12 to step 6 by ")
    found = status(run)
    assert (found.state, found.step, checkpoint_step(found.newest)) == ("interrupted", 6, 6)
    assert found.steps_lost == 0
    assert len(read_metrics(run)) == 6
    assert "set aside" in call("ls", run).stdout
    log = attempt(run)
    assert "rolled back from step 12 to step 6" in log
    assert "restored step 6" in log
    assert steps(run) == [3, 6, 9, 9, 12, 12]
    assert differences(last, run) == []  # it has done the same again
    assert rows(run, "loss") == rows(parent, "loss")
    assert [row.attempt for row in read_metrics(run)] == [1] * 6 + [2] * 6
    (told,) = events(run, 2, "rolled_back")
    assert (told["number"], told["why"]) == (1, "the loss went up")
    assert (status(run).state, status(run).step) == ("done", 12)
    assert verify_run(run) == []
    assert call("rollback", run, "--undo", "--why", "x y").exit_code == 2


def test_undoing_a_rollback_brings_the_end_back(parent, tmp_path):
    run = copied(parent, tmp_path)
    assert call("rollback", run, "--to", 9, "--why", "a mistake").exit_code == 0
    shown = call("rollback", run, "--undo", "--why", "it was none", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)["undoes"]) == (0, 1)
    found = status(run)
    assert (found.state, found.step, checkpoint_step(found.newest)) == ("done", 12, 12)
    assert len(read_metrics(run)) == 12
    assert [line.partition(" by ")[0] for line in found.branching] == [
        "rolled back from step 12 to step 9",
        "rollback 1 was undone",
    ]


@pytest.mark.parametrize("option", [{"seed": 5}, {"batch": 4}])
def test_another_order_is_refused_and_ends_the_run(parent, tmp_path, option):
    run = copied(parent, tmp_path)
    log = attempt(run, 15, code=2, size=2 if "seed" in option else 1, **option)
    assert ("seed was 0, is 5" if "seed" in option else "global_batch was 8, is 4") in log
    assert "allow_config_change" in log
    assert "Traceback" not in log
    (ended,) = events(run, 2, "ended")
    assert (ended["decision"], ended["exit_code"]) == ("stop", 2)
    assert steps(run) == [3, 6, 9, 12]  # nothing was saved, and nothing was quarantined
    assert list(RunDirectory(run).quarantine.iterdir()) == []


def test_another_seed_is_gone_on_with_if_somebody_says_why(parent, tmp_path):
    run = copied(parent, tmp_path)
    attempt(run, 15, code=2, seed=5)
    attempt(run, 15, code=2, seed=5)  # that it was refused once makes it no better
    log = attempt(run, 15, seed=5, allow_config_change="another order is wanted")
    assert "goes on although seed was 0, is 5" in log
    (allowed,) = events(run, 4, "config_change_allowed")
    assert allowed["why"] == "another order is wanted"
    (changed,) = events(run, 4, "config_changed")
    assert (changed["since"], changed["changes"][0]["name"]) == (1, "seed")
    assert rows(run, "first")[:12] == rows(parent, "first")


def test_changed_arguments_are_told_with_the_reason_and_what_was_saved_holds(tmp_path):
    run = tmp_path / "run"
    attempt(run, 3, entry={"lr": 0.1})
    log = attempt(run, 6, entry={"lr": 0.01}, why="the loss went up", warning_lead_s=90)
    assert (
        "settings have changed since attempt 1: lr was 0.1, is 0.01; besides warning_lead_s (nothing that is trained "
        "depends on it); why: the loss went up"
    ) in log
    assert "optimizer.lr is 0.1 as it was saved, not 0.01: what was restored holds" in log
    log = attempt(run, 9, entry={"lr": 0.001}, keep=False)
    assert "no reason was given" in log
    log = attempt(run, 12, entry={"lr": 0.001}, keep=False)  # the checkpoint has it by now
    assert "settings have changed" not in log
    assert rows(run, "rate") == [0.1] * 6 + [0.001] * 6
    assert rows(run, "changed") == [0] * 3 + [2] * 3 + [2] * 3 + [0] * 3
    shown = call("config", run, "--log").stdout
    assert "the loss went up" in shown
    told = json.loads(call("config", run, "--log", "--json").stdout)
    assert [(each["attempt"], each["since"], each["name"]) for each in told] == [
        (2, 1, "entry.kwargs.lr"),
        (2, 1, "warning_lead_s"),
        (3, 2, "entry.kwargs.lr"),
        (3, 2, "warning_lead_s"),
    ]
    assert json.loads(call("config", run, "--json").stdout)["entry.kwargs.lr"] == 0.001


def test_the_words_of_a_script_that_others_start_are_compared(tmp_path, monkeypatch):
    story = Story(tmp_path / "run")
    for words in (["--lr", "1e-3"], ["--lr", "1e-3"], ["--lr", "1e-4"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        story.attempt(began(0), ended("crash"))
    assert [events(tmp_path / "run", number, "config_changed") for number in (1, 2)] == [[], []]
    (changed,) = events(tmp_path / "run", 3, "config_changed")
    assert changed["changes"] == [
        {"name": "arguments", "old": "--lr 1e-3", "new": "--lr 1e-4", "grade": "look"}
    ]
    assert (changed["since"], changed["why"]) == (2, None)


def test_a_running_attempt_is_not_rolled_back_unless_it_is_fenced_off(tmp_path):
    alive = Attempt(tmp_path, 1, slowly, 4000)
    run = RunDirectory(tmp_path)
    alive.wait_until(lambda: len(run.checkpoint_names()) >= 3)
    shown = call("rollback", tmp_path, "--to", 3, "--why", "the loss went up")
    assert (shown.exit_code, "an attempt is alive" in shown.stderr) == (2, True)
    shown = call("rollback", tmp_path, "--to", 3, "--why", "the loss went up", "--fence")
    assert shown.exit_code == 0, shown.output
    names = run.checkpoint_names()
    assert alive.wait() == [1]
    assert run.checkpoint_names() == names  # it could commit nothing any more
    assert checkpoint_step(status(tmp_path).newest) == 3
    assert status(tmp_path).state == "interrupted"
    assert Attempt(tmp_path, 1, with_settings, 12, {}, job="job-2").wait() == [0]
    assert len(read_metrics(tmp_path)) == 12
    assert verify_run(tmp_path) == []


def slowly(steps):
    train(steps)


def test_attempts_before_a_rollback_do_not_count_as_without_progress(tmp_path):
    """Three that began at one step would end the run; a person who rolls it back begins a new count."""
    story = Story(tmp_path / "run")
    for first_step in (0, 6, 6, 6):
        story.attempt(began(first_step), ended("crash"))
    facts = story.attempt()
    assert why_spent(in_vain(facts.history.past, 3), Config().budget) is not None
    done = Rollback(
        number=1, to="0000000003-0123abcd", set_aside=("0000000006-0123abcd",), kept=(), after=5, why="once more",
        who="ada", when=0.0,
    )  # fmt: skip
    (story.run.root / "rollbacks").mkdir()
    (story.run.root / "rollbacks/0001.json").write_bytes(done.to_bytes())
    facts = story.attempt(began(3), ended("crash"))
    assert facts.history.past == ()
    facts = story.attempt()
    assert [each.first_step for each in facts.history.past] == [3]


def test_damaged_rollbacks_stop_the_run_before_it_goes_on_from_the_wrong_step(parent, tmp_path):
    run = copied(parent, tmp_path)
    assert call("rollback", run, "--to", 6, "--why", "the loss went up").exit_code == 0
    record = run / "rollbacks" / "0001.json"
    record.write_bytes(record.read_bytes().replace(b"went up", b"came up"))
    for verb in ("status", "ls"):
        shown = call(verb, run)
        assert (shown.exit_code, "0001.json: damaged" in shown.stderr) == (4, True)
    assert call("verify", run).exit_code == 4
    log = attempt(run, 15, code=4)
    assert "0001.json: damaged" in log
    assert "restored step" not in log


def test_losses_of_another_global_batch_are_of_samples_that_come_once(parent, tmp_path):
    """Twelve steps of 8 samples, then of 6: each sample of the epoch comes once all the same."""
    run = copied(parent, tmp_path)
    assert call("rollback", run, "--to", 3, "--why", "a smaller batch").exit_code == 0
    attempt(run, 8, batch=6, allow_config_change="a smaller batch")
    firsts = rows(run, "first")
    starts = [0, 8, 16, *range(24, 54, 6)]
    assert firsts == permute(np.array(starts), 100, 0, 0).tolist()


def loader(batch, seed=0, *, size=30, shuffle=True, allow=True):
    return ElasticLoader(
        range(size), batch, rank=0, world_size=1, seed=seed, shuffle=shuffle, allow_change=allow
    )


def take(data, count):
    batches = iter(data)
    return [next(batches).tolist() for _ in range(count)]


def flat(batches):
    return [index for batch in batches for index in batch]


def test_with_other_global_batches_each_sample_still_comes_once():
    data, found = loader(5), []
    for batch, count in ((5, 2), (4, 2), (3, 2), (6, 1)):  # 30 samples
        following = loader(batch)
        following.load_state_dict(data.state_dict())
        data = following
        found += flat(take(data, count))
    assert sorted(found) == list(range(30))
    assert found == flat(take(loader(6), 5))  # in the same order


def test_with_another_seed_what_was_used_stays_used():
    data = loader(5)
    first = take(data, 2)
    other = loader(5, seed=9)
    other.load_state_dict(data.state_dict())
    assert other.changes == ("seed was 0, is 9",)
    assert take(other, 4) == take(loader(5, seed=9), 6)[2:]
    assert first == take(loader(5), 2)


def test_other_data_is_another_matter_and_nothing_changes_unasked():
    state = loader(5).state_dict()
    with pytest.raises(UsageError, match=r"size was 30, is 31.*Set them back, or begin a new run"):
        loader(5, size=31).load_state_dict(state)
    with pytest.raises(UsageError, match=r"shuffle was True, is False.*allow_config_change"):
        loader(5, shuffle=False, allow=False).load_state_dict(state)
    same = loader(5, allow=False)
    same.load_state_dict(state)
    assert same.changes == ()


def test_a_position_of_an_earlier_version_counts_its_own_steps():
    state = loader(5).state_dict() | {"samples": 30}
    del state["steps"]
    data = loader(10)
    data.load_state_dict(state)
    assert data.steps_for(2) == 6 + 3


def rolled_back_to_a_jump(steps):
    train(steps, validation={"norm_jump": "hold_back", "norm_factor": 1.0001})


def test_a_checkpoint_whose_norms_have_jumped_is_gone_on_from_if_somebody_asks(tmp_path):
    run = tmp_path / "run"
    done = Attempt(run, 1, rolled_back_to_a_jump, 18)
    assert done.wait() == [0], done.log.read_text()
    with hr.Checkpoint(run, step=15) as jumped:
        assert jumped.manifest.health.jumped
    shutil.copytree(run, tmp_path / "copy")
    assert call("rollback", run, "--to", 15, "--why", "the jump is meant").exit_code == 0
    done = Attempt(run, 1, rolled_back_to_a_jump, 16, job="job-2")
    assert done.wait() == [0], done.log.read_text()
    assert events(run, 2, "restored")[0]["step"] == 15
    done = Attempt(tmp_path / "copy", 1, rolled_back_to_a_jump, 10, job="job-2")
    assert done.wait() == [0], done.log.read_text()
    assert events(tmp_path / "copy", 2, "restored")[0]["step"] < 15
