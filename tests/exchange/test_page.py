"""What docs/exchange.md shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpc_resume.cli import main

PAGE = (Path(__file__).parents[2] / "docs/exchange.md").read_text()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_page_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    ran = []
    for language, block in re.findall(r"```(python|console)\n(.*?)```", PAGE, re.DOTALL):
        if language == "python":
            exec(compile(block, "exchange.md", "exec"), names)
            ran.append("python")
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            assert words[:2] == ["$", "hpc-resume"]
            done = CliRunner().invoke(main, words[2:])
            assert done.exit_code == 0, (line, done.output)
            ran.append(words[2])
    assert ran == ["python"] * 2 + ["export"] * 3 + ["import"] * 3 + ["verify", "python"]
