"""What docs/sameness.md shows is what happens."""

import re
from pathlib import Path

import torch

import hpc_resume as hr
from hpc_resume.run import generators

PAGE = (Path(__file__).parents[2] / "docs/sameness.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_a_run_that_goes_on_is_one_that_was_never_interrupted(tmp_path, monkeypatch):
    before, threads = generators.capture(), torch.get_num_threads()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = []
    try:
        torch.set_num_threads(1)
        for place, script in enumerate((BLOCKS[0], BLOCKS[0].replace("train(until=10)", "pass"))):
            folder = tmp_path / str(place)
            folder.mkdir()
            monkeypatch.chdir(folder)
            exec(compile(script, "sameness.md", "exec"), {})
            with hr.Checkpoint("runs/same") as checkpoint:
                assert checkpoint.step == 16
                found.append(checkpoint.load())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.set_num_threads(threads)
        generators.restore(before)
    one, two = found
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_the_init_function_sets_what_it_says():
    names = {"torch": torch, "hr": hr}
    exec(compile(BLOCKS[1], "sameness.md", "exec"), names)
    assert float(names["model"][0].weight.detach().std()) > 0.015
    assert float(names["model"][2].weight.detach().std()) < 0.02
