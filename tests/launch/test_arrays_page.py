"""What docs/arrays.md shows is what happens."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.scheduler.local import LocalState

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/arrays.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path
    for path in tmp_path.glob("runs/*/*/jobs/*_state.json"):  # whatever a failed test has left running
        state = LocalState.read(path)
        if state.alive() and state.controller_pid != os.getpid():
            os.kill(state.controller_pid, signal.SIGKILL)


@pytest.mark.timeout(600)  # ten runs, most of them one after the other
def test_the_page_from_top_to_bottom(here):
    blocks = re.findall(r"```(python|console)\n(.*?)```", PAGE, re.DOTALL)
    # The function of the first block as a file, for the command line.
    (here / "train.py").write_text(blocks[0][1].partition("\n\n\nsweep =")[0])
    names = {"__name__": "__main__"}
    said = []
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "arrays.md", "exec"), names)
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            assert words[:2] == ["$", "hpc-resume"]
            done = CliRunner().invoke(main, words[2:])
            assert done.exit_code == 0, (line, done.output)
            said.append(done.output)
    assert "train: 4 runs: 4 done" in said[1]
    assert said[2].startswith("train lr=0.1,seed=0: done at step 10, 1 attempt")
    assert "0 of 4 runs had a job; cancelled" in said[3]
    assert names["first"].run_dir.name == "lr=0.1,seed=0"
    assert sorted(names["losses"]) == sorted(names["again"].names)
    assert "4 runs done already" in repr(names["more"])
    assert repr(names["again"]).splitlines()[0] == "linear: 4 runs: 4 done"
    shown = re.search(r"^lr    seed .*$", PAGE, re.MULTILINE)[0]
    assert repr(names["again"]).splitlines()[1].split() == shown.split()
    assert repr(names["more"]).splitlines()[0] == "linear: 6 runs: 6 done"
