import pytest

from hpc_resume.policy.saving import Estimate, Looking, refer_to_older, what_fits

GB = 10**9


def measured(rate=GB, overhead_s=1.0):
    return Estimate(write_bytes_per_s=rate, overhead_s=overhead_s)


@pytest.mark.parametrize(
    ("left_s", "needs_s", "choice"),
    [
        (None, {"full": 900.0, "model": 1.0}, "full"),  # nobody knows how long is left
        (100.0, {"full": None, "model": None}, "full"),  # nothing was measured
        (100.0, {"full": 70.0, "changed": 1.0, "model": 1.0}, "full"),
        (100.0, {"full": 70.1, "changed": 70.0, "model": 1.0}, "changed"),
        (100.0, {"full": 80.0, "changed": 75.0, "model": 70.0}, "model"),
        (100.0, {"full": 80.0, "model": 30.0}, "model"),
        (100.0, {"full": 80.0, "changed": None, "model": 30.0}, "model"),
        (
            10.0,
            {"full": 80.0, "changed": 60.0, "model": 30.0},
            "full",
        ),  # nothing fits: try what is worth most
        (0.0, {"full": 0.1, "model": 0.05}, "full"),
    ],
)
def test_what_still_fits(left_s, needs_s, choice):
    chosen, note = what_fits(left_s, needs_s)
    assert chosen == choice
    assert bool(note) == (choice != "full")


def test_the_note_says_why():
    assert what_fits(30.4, {"full": 60.0, "model": 1.25}) == (
        "model",
        "30 s were left; everything needs 60 s by measurement, this 1.2 s",
    )


def test_an_estimate_follows_what_is_measured():
    estimate = Estimate()
    assert estimate.seconds(GB) is None
    estimate.add(written_bytes=GB, state_bytes=GB, write_s=2.0, whole_s=3.0)
    assert estimate.seconds(GB) == 3.0
    estimate.add(written_bytes=GB, state_bytes=GB, write_s=1.0, whole_s=2.0)
    assert estimate.write_bytes_per_s == 0.75 * GB
    assert estimate.seconds(0) == 1.0


def test_a_save_of_a_few_bytes_says_nothing_of_the_disk_s_speed():
    """An incremental save of 1 MB that takes 20 ms is no disk of 50 MB/s."""
    estimate = measured(overhead_s=0.02)
    for _ in range(20):
        estimate.add(written_bytes=10**6, state_bytes=10 * GB, write_s=0.02, whole_s=0.03, look_s=1.0)
    assert estimate.write_bytes_per_s == GB
    assert 0.02 < estimate.overhead_s < 0.04
    assert estimate.look_bytes_per_s == 10 * GB
    assert estimate.seconds(10**6, looked_at_bytes=10 * GB) == pytest.approx(1.03, abs=0.01)


def test_before_it_was_looked_once_a_look_is_taken_to_be_as_slow_as_writing():
    assert measured(overhead_s=0.0).seconds(0, looked_at_bytes=GB) == 1.0


@pytest.mark.parametrize(
    ("changed", "total", "chain", "refers"),
    [
        (0, 100 * GB, 1, True),
        (2 * GB, 100 * GB, 1, True),
        (74 * GB, 100 * GB, 1, True),
        (75 * GB, 100 * GB, 1, False),  # with the second of overhead it saves less than a quarter
        (2 * GB, 100 * GB, 8, True),
        (2 * GB, 100 * GB, 9, False),  # the chain is full
        (0, 0, 1, False),
        (10**6, 10**7, 1, False),  # a small state: the overhead is all that it costs
    ],
)
def test_only_what_pays_refers_to_older_checkpoints(changed, total, chain, refers):
    found = refer_to_older(
        changed_bytes=changed, total_bytes=total, estimate=measured(), chain=chain, longest_chain=8
    )
    assert found is refers


@pytest.mark.parametrize(("changed", "refers"), [(75, True), (76, False)])
def test_before_anything_was_measured_bytes_decide(changed, refers):
    assert refers is refer_to_older(
        changed_bytes=changed, total_bytes=100, estimate=Estimate(), chain=1, longest_chain=8
    )


def looks(answers, saves):
    looking, found = Looking(), []
    for save in range(saves):
        if looking.due():
            found.append(save)
            looking.found(worthwhile=answers(save))
    return found


def test_looking_goes_on_while_it_helps_and_gets_rare_where_it_never_does():
    assert looks(lambda _: True, 5) == [0, 1, 2, 3, 4]
    assert looks(lambda _: False, 60) == [0, 2, 5, 10, 19, 36, 53]
    assert looks(lambda save: save == 5, 12) == [0, 2, 5, 6, 8, 11]
