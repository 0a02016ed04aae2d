"""Which checkpoint a run goes on from, and what becomes of those that will not do."""

import pytest

import hpc_resume as hr
from hpc_resume.branching import undo
from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.journal import Journal, read_events
from hpc_resume.run.candidates import Candidates
from hpc_resume.rundir import checkpoint_step
from hpc_resume.settings import ValidationSettings
from tests.checkpoint.story import three_saves


@pytest.fixture
def run(tmp_path):
    return three_saves(tmp_path)


def candidates(run):
    return Candidates(run, ValidationSettings(), Journal(run.root / "events.jsonl"))


def steps(run):
    return [checkpoint_step(name) for name in run.checkpoint_names()]


def test_from_the_newest_on_they_are_set_aside(run):
    chosen = candidates(run)
    for step in (30, 20, 10):
        name = chosen.newest()
        assert checkpoint_step(name) == step
        chosen.set_aside(name, "damaged")
    assert chosen.newest() is None
    assert (steps(run), len(list(run.quarantine.glob("*.json")))) == ([], 3)


def test_what_others_that_are_kept_refer_to_stays_where_it_is(run, capsys):
    hr.rollback(run.root, to=10, why="the loss went up")
    chosen = candidates(run)
    name = chosen.newest()
    assert checkpoint_step(name) == 10
    chosen.set_aside(name, "the probe gives something else")
    assert chosen.newest() is None
    assert steps(run) == [10, 20, 30]
    assert not list(run.quarantine.iterdir())
    (event,) = read_events(run.root / "events.jsonl", {"left_in_place"})
    keeper = run.checkpoint_names()[-1]
    assert event["checkpoint"] == name
    assert event["reason"].startswith(
        "the probe gives something else; it stays where it is, because part of the"
    )
    assert f"{name} is passed over: {event['reason']}" in capsys.readouterr().err
    assert keeper in event["reason"]
    undo(run.root, why="it went up with the old one, too")
    assert checkpoint_step(candidates(run).newest()) == 30
    assert verify_run(run.root) == []


def test_one_that_can_not_be_read_refers_to_nothing(run):
    first, second, third = run.checkpoint_names()
    for name in (second, third):
        (run.checkpoints / name / "manifest.json").write_bytes(b"{")
    assert store.referring(run, first) is None
