import random

import pytest

from hpc_resume.policy.retention import Candidate, plan_retention


def full(step, *refers, valid=True, content="full", jumped=False):
    return Candidate(
        name=f"c{step}",
        step=step,
        full=content == "full",
        valid=valid,
        refers=tuple(f"c{older}" for older in refers),
        size_bytes=10,
        jumped=jumped,
    )


def plan(*candidates, **options):
    return plan_retention(sorted(candidates, key=lambda each: -each.step), **options)


def test_the_newest_are_kept():
    found = plan(full(10), full(20), full(30), full(40), keep=2)
    assert found.remove == ("c20", "c10")
    assert found.keep == {"c40": "newest full one", "c30": "one of the newest 2"}


def test_every_kth_step_is_kept():
    found = plan(*map(full, range(10, 110, 10)), keep=1, every_steps=50)
    assert list(found.keep) == ["c100", "c50"]
    assert found.keep["c50"] == "step is a multiple of 50"


def test_what_is_kept_keeps_what_it_refers_to():
    found = plan(full(10), full(20, 10), full(30), full(40, 10, 20), full(50, 40, 20, 10), keep=1)
    assert found.remove == ("c30",)
    assert found.keep["c10"] == "c50 refers to it"


def test_references_are_followed_however_far():
    """Manifests name all that they need; a chain is safe even if one did not."""
    found = plan(full(10), full(20, 10), full(30, 20), full(40, 30), full(50), keep=2)
    assert found.remove == ()


def test_pinned_ones_are_kept():
    found = plan(full(10), full(20, 10), full(30), keep=1, pinned=["c20"])
    assert found.remove == ()
    assert found.keep["c20"] == "pinned"


def test_a_partial_one_does_not_count_and_stays_only_while_it_is_the_newest():
    found = plan(full(10), full(20, content="model"), full(30), full(40, content="model"), keep=1)
    assert found.keep == {"c40": "newer than the newest full one", "c30": "newest full one"}
    assert found.remove == ("c20", "c10")


def test_damaged_ones_are_never_deleted_and_do_not_count():
    found = plan(full(10), full(20), full(30, 20, valid=False), keep=1)
    assert found.remove == ("c10",)
    assert found.keep["c30"] == "damaged, kept for inspection"


def test_without_a_whole_full_one_nothing_is_deleted():
    found = plan(full(10, content="model"), full(20, valid=False), full(30, content="model"), keep=1)
    assert found.remove == ()
    assert plan(keep=3).remove == ()


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1, "every_steps": 0}])
def test_the_newest_one_can_t_be_given_up(options):
    with pytest.raises(ValueError, match="at least 1"):
        plan(full(10), **options)


def test_whatever_the_history_deletion_is_safe_at_each_moment():
    chance = random.Random(0)
    for _ in range(300):
        history = []
        for step in range(1, chance.randint(2, 15)):
            older = [each.step for each in history if each.full]
            refers = chance.sample(older, chance.randint(0, len(older))) if chance.random() < 0.6 else []
            content = "full" if chance.random() < 0.8 else "model"
            history.append(full(step, *refers, valid=chance.random() < 0.9, content=content))
        found = plan(*history, keep=chance.randint(1, 4), every_steps=chance.choice([None, 3]))
        by_name = {each.name: each for each in history}
        assert sorted([*found.remove, *found.keep]) == sorted(by_name)
        there = set(by_name)
        for name in found.remove:
            there.remove(name)
            assert all(set(by_name[other].refers) <= there for other in there)
        whole = [each for each in history if each.full and each.valid]
        assert not whole or whole[-1].name in there
        assert all(each.name in there for each in history if not each.valid)


def test_the_newest_one_whose_norms_have_not_jumped_is_kept_too():
    found = plan(full(10), full(20), full(30, jumped=True), keep=1)
    assert found.keep == {"c30": "newest full one", "c20": "newest full one whose norms have not jumped"}
    assert plan(full(10, jumped=True), full(20, jumped=True), keep=1).remove == ("c10",)
