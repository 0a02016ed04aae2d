"""Interruptions are drawn from a seed, and fit the script's pace."""

import pytest

from hpc_resume.policy.rehearsal import KINDS, Interruption, Pace, bit_for_bit, draw, save_every

PACE = Pace(start_s=4.0, prepare_s=2.0, train_s=100.0, steps=50)


def test_a_seed_gives_the_same_interruptions_and_another_one_others():
    assert draw(3, 6) == draw(3, 6)
    assert len({draw(seed, 6) for seed in range(20)}) == 20


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_and_moment_comes_before_any_comes_again(seed):
    drawn = draw(seed, 9)
    assert sorted(each.kind for each in drawn[:4]) == sorted(KINDS)
    assert {each.moment for each in draw(seed, 5)} == {"start", "first step", "middle", "save"}
    assert {each.moment for each in draw(seed, 1)} == {"middle"}
    assert all(0 <= each.part < 1 and 0 <= each.victim < 1 for each in drawn)


def interruption(moment, part):
    return Interruption(kind="kill", moment=moment, part=part, victim=0.0)


def test_delays_follow_the_pace_of_the_script():
    assert PACE.delay_s(interruption("start", 0.5)) == 2.0
    assert PACE.delay_s(interruption("first step", 0.5)) == 1.0
    assert PACE.delay_s(interruption("middle", 0.5)) == 1.0  # anywhere in a step
    assert PACE.delay_s(interruption("save", 0.5)) == 0.0


def due(moment, part, step, others):
    return PACE.due_step(interruption(moment, part), step=step, others=others)


def test_the_step_leaves_some_to_the_interruptions_to_come_and_some_for_the_end():
    assert (due("middle", 0.0, 0, 0), due("middle", 1.0, 0, 0)) == (5, 35)
    assert (due("middle", 1.0, 0, 4), due("middle", 1.0, 25, 4)) == (7, 28)
    assert due("save", 0.0, 0, 0) == 35
    assert due("middle", 0.0, 48, 3) == 49  # a step at least


def test_every_attempt_takes_a_few_checkpoints():
    assert (save_every(1000, 4), save_every(5, 9)) == (66, 1)


def test_runs_are_equal_bit_for_bit_on_one_or_two_ranks_throughout():
    assert [bit_for_bit(ranks) for ranks in ([1], [2, 2], [2, 1], [3])] == [True, True, False, False]
