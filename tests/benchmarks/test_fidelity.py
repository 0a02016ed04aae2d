"""The benchmark of fidelity finds what it is to find."""

import random

from benchmarks.fidelity.interrupted import cuts, go, wrong_samples
from benchmarks.fidelity.subjects import Cut
from hpc_resume.report.comparison import compare_runs


def test_interruptions_are_drawn_from_the_whole_run():
    drawn = cuts(random.Random(1), 120, 20)
    assert len({cut.step for cut in drawn}) == 20
    assert 1 <= drawn[0].step < drawn[-1].step <= 118
    assert {cut.how for cut in drawn} == {"signal", "kill"}


def test_a_run_on_other_numbers_of_ranks_uses_the_same_samples_and_other_samples_are_found(tmp_path):
    how = {"seed": 3, "dropout": 0.0, "double": True}
    one, two = tmp_path / "whole", tmp_path / "interrupted"
    go(one, "digits", "ddp", 12, sizes=[1], at=[], **how)
    stops = [Cut(step=3, how="signal"), Cut(step=8, how="kill")]
    go(two, "digits", "ddp", 12, sizes=[2, 1, 3], at=stops, **how)
    found = compare_runs(one, two, generators=False)
    assert found.steps == (12, 12)
    assert found.metrics == 12
    assert max((each.relative for each in found.logged), default=0.0) < 1e-12
    assert wrong_samples(one, two) == 0
    path = max(two.glob("samples-*-01.txt"))
    lines = path.read_text().splitlines()
    step, first, *others = lines[-1].split()
    path.write_text("\n".join([*lines[:-1], " ".join([step, *others, first])]) + "\n")
    assert wrong_samples(one, two) == 1
