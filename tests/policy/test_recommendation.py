import pytest

from hpc_resume.policy.recommendation import Abilities, recommend


@pytest.mark.parametrize(
    ("can", "way"),
    [
        (Abilities(), "requeue"),
        (Abilities(scontrol_on_nodes=True, scontrol_for_ranks=True, preempt_mode="REQUEUE"), "requeue"),
        # In a container the batch script, outside it, has scontrol.
        (Abilities(scontrol_on_nodes=True, scontrol_for_ranks=False), "exit"),
        # A preemption that cancels leaves only what is in the queue already.
        (Abilities(scontrol_on_nodes=True, sbatch_on_nodes=True, preempt_mode="CANCEL"), "chain"),
        (Abilities(scontrol_on_nodes=True, sbatch_on_nodes=False, preempt_mode="CANCEL"), "array"),
        (Abilities(sbatch_on_nodes=False, preempt_mode="CANCEL", longest_array=0), "login"),
        (Abilities(scontrol_on_nodes=False, sbatch_on_nodes=True), "chain"),
        (Abilities(scontrol_on_nodes=False, sbatch_on_nodes=False), "array"),
        (Abilities(scontrol_on_nodes=False, sbatch_on_nodes=False, longest_array=1), "login"),
        (Abilities(scontrol_on_nodes=False, requeues_75=True), "exit"),
        (
            Abilities(scontrol_on_nodes=False, sbatch_on_nodes=True, requeues_75=True, preempt_mode="CANCEL"),
            "chain",
        ),
    ],
)
def test_the_way_that_loses_least_and_needs_least(can, way):
    found = recommend(can)
    assert found.continuation == way
    assert all(found.reasons)


def test_what_nobody_has_tried_is_said():
    assert "--probe" in " ".join(recommend(Abilities()).reasons)
    assert "--probe" in " ".join(recommend(Abilities(preempt_mode="CANCEL")).reasons)
    assert "--probe" not in " ".join(recommend(Abilities(scontrol_on_nodes=True)).reasons)
