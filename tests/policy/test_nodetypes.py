"""Which node type it is, whether it will do, and what if it won't."""

import pytest

from hpc_resume.policy.nodetypes import (
    Device,
    Footprint,
    after_decline,
    configured_type,
    lacking_precision,
    refused_change,
)
from hpc_resume.settings import NodeType

GB = 10**9
V100 = Device(name="Tesla V100", precisions=frozenset({"fp32", "fp16"}), memory_bytes=16 * GB)
TYPES = (
    NodeType(name="big", partition="main", constraint="a100|h100"),
    NodeType(name="old", partition="main", constraint="v100"),
    NodeType(name="any"),
)


@pytest.mark.parametrize(
    ("found", "asked", "name"),
    [
        ("old", None, "old"),  # the embedded scheduler says the name
        ("main/h100,nvme", "old", "big"),  # moved meanwhile
        ("main/v100", "big", "old"),
        ("spare/t4", "big", "any"),  # contradicts what was asked for
        ("main", "old", "old"),  # no features known: the partition is right
        ("main", None, None),  # two may be meant
        (None, "big", "big"),
        (None, None, None),
    ],
)
def test_the_node_type_is_told_by_what_was_got_before_what_was_asked_for(found, asked, name):
    got = configured_type(TYPES, found=found, asked=asked)
    assert (got.name if got else None) == name


def test_a_single_node_type_is_always_the_one():
    assert configured_type(TYPES[:1], found="elsewhere/x", asked=None) is TYPES[0]


def test_a_precision_without_arithmetic_is_declined_by_name():
    assert lacking_precision("fp16", V100) is None
    assert "bf16 is asked for, but Tesla V100 has no arithmetic for it" in lacking_precision("bf16", V100)


def test_a_change_of_precision_needs_leave():
    assert refused_change("bf16", "bf16", allowed=False) is None
    assert refused_change(None, "fp16", allowed=False) is None
    assert refused_change("bf16", "fp16", allowed=True) is None
    assert "allow_precision_change" in refused_change("bf16", "fp16", allowed=False)


def footprint(**changes):
    # 4 GB of parameters and 8 of moments under DDP; 36 GB of activations and gradients at 16 samples.
    facts = {
        "peak_bytes": 48 * GB,
        "state_bytes": 12 * GB,
        "module_bytes": 4 * GB,
        "own_module_bytes": 4 * GB,
        "ranks": (4, 4),
        "micro_batches": (16, 16),
    }
    return Footprint.of(**{**facts, **changes})


def test_what_was_measured_is_needed_again_on_the_same_ranks():
    assert footprint() == Footprint(state_bytes=12 * GB, work_bytes=36 * GB, micro_batch=16)


def test_a_smaller_micro_batch_needs_less_work_and_a_larger_one_at_least_as_much():
    assert footprint(micro_batches=(16, 4)).work_bytes == 9 * GB
    assert footprint(micro_batches=(16, 64)).work_bytes == 36 * GB


def test_what_is_sharded_weighs_more_on_fewer_ranks():
    # FSDP: 12 GB over 4 ranks were 3 GB on each; over 2 they are 6.
    sharded = footprint(peak_bytes=13 * GB, own_module_bytes=2 * GB, ranks=(4, 2))
    assert (sharded.state_bytes, sharded.work_bytes) == (6 * GB, 10 * GB)


def test_on_a_single_rank_all_of_the_state_is_there_and_the_work_is_what_is_certain():
    alone = footprint(peak_bytes=13 * GB, ranks=(4, 1))
    assert (alone.state_bytes, alone.work_bytes) == (12 * GB, 1 * GB)


@pytest.mark.parametrize(
    "unknown", [{"peak_bytes": 0}, {"micro_batches": (None, 16)}, {"micro_batches": (16, None)}]
)
def test_what_was_not_measured_counts_as_nothing(unknown):
    assert footprint(**unknown) == Footprint(state_bytes=12 * GB)


def test_too_little_memory_is_declined_with_the_numbers_and_what_would_fit():
    problem = footprint().problem(V100)
    assert "12.0 GB of state and 36.0 GB of work" in problem
    assert "Tesla V100 has 16.0 GB" in problem
    assert "micro_batch: 1 should fit" in problem  # 0.9 x 16 GB - 12 GB = 2.4 GB, at 2.25 GB a sample
    assert footprint(micro_batches=(16, 1)).problem(V100) is None


def test_a_state_that_does_not_fit_is_helped_by_no_micro_batch():
    assert "shard the state" in footprint(module_bytes=2 * GB).problem(V100)


def test_tight_memory_is_a_warning():
    tight = Footprint(state_bytes=12 * GB, work_bytes=3 * GB, micro_batch=4)
    assert tight.problem(V100) is None
    assert "that will be tight; micro_batch: 3 should fit" in tight.warning(V100)
    roomy = Footprint(state_bytes=12 * GB, work_bytes=2 * GB, micro_batch=4)
    assert roomy.warning(V100) is None


def test_a_cpu_is_not_asked_for_its_memory():
    cpu = Device(name="a CPU", precisions=frozenset({"fp32"}))
    assert footprint().problem(cpu) is footprint().warning(cpu) is None


def test_a_declined_node_type_moves_the_run_on_to_those_that_are_left():
    decision = after_decline(["big"], ["big", "old"], patience=3)
    assert (decision.action, decision.move_on) == ("continue", True)
    assert "old" in decision.why


def test_when_all_are_declined_the_run_stops():
    decision = after_decline(["old", "big"], ["big", "old"], patience=3)
    assert (decision.action, decision.move_on) == ("stop", False)
    assert "no node type of this run is left; so were old" in decision.why
    assert after_decline(["big"], ["big"], patience=3).action == "stop"


def test_a_scheduler_that_gives_the_same_again_and_again_is_not_asked_for_ever():
    assert after_decline(["big", "big"], ["big", "old"], patience=2).action == "continue"
    decision = after_decline(["big"] * 3, ["big", "old"], patience=2)
    assert decision.action == "stop"
    assert "again and again, and not old" in decision.why
