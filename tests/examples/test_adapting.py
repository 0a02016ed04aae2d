"""The scripts that were made resumable: how little was changed, and that it is enough."""

import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest

from hpc_resume.report.comparison import compare_runs
from tests.ranks import Attempt

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "adapting.md"
NAMES = ["digits", "words", "chargpt"]
#: Options that make each one short, and its ranks.
SHORT = {
    "digits": (["--epochs", "2", "--batch-size", "250"], 1),
    "words": (["--epochs", "2", "--width", "16", "--bptt", "300"], 1),
    "chargpt": ([], 2),
}


def diff(name):
    """What was changed, as the page shows it."""
    plain, ours = (
        (EXAMPLES / f"{name}{end}.py").read_text().splitlines(keepends=True) for end in ("_plain", "")
    )
    lines = list(difflib.unified_diff(plain, ours, n=1))[2:]
    return "".join(line if not line.startswith("@@") else "@@\n" for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_ten_lines_are_changed(name):
    added = [line for line in diff(name).splitlines() if line.startswith("+") and line != "+"]
    assert len(added) == 9, "the page says nine"


def page_with_diffs():
    text = PAGE.read_text()
    for name in NAMES:
        block = f"<!-- {name} -->\n```diff\n{diff(name)}```\n"
        text = re.sub(
            rf"<!-- {name} -->\n(?:```diff\n.*?```\n)?", lambda _, block=block: block, text, flags=re.DOTALL
        )
    return text


def test_the_page_shows_the_changes():
    """``python -m tests.examples.test_adapting`` writes them."""
    assert page_with_diffs() == PAGE.read_text()


def be_script(name, options, cut):
    """Run a script as its own main program; its first rank warns itself in the middle of a step."""
    sys.argv = [name, *options]
    sys.path.insert(0, str(EXAMPLES))
    if cut is not None:
        warn_in_step(cut)
    if name == "chargpt":  # short
        source = (EXAMPLES / "chargpt.py").read_text()
        assert "samples: int = 4000" in source
        source = source.replace("samples: int = 4000", "samples: int = 120").replace(
            "width: int = 64", "width: int = 16"
        )
        exec(compile(source, "chargpt.py", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def warn_in_step(cut):
    import os
    import signal

    from hpc_resume.run.loop import Loop

    given = Loop._next

    def warned(loop, *args):
        if loop._session.step == cut and loop._session.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
        return given(loop, *args)

    Loop._next = warned


@pytest.mark.parametrize(("name", "cut"), [("digits", 3), ("digits", 5), ("words", 4), ("chargpt", 6)])
def test_what_was_changed_is_enough(tmp_path, name, cut):
    options, ranks = SHORT[name]
    assert set(Attempt(tmp_path / "whole", ranks, be_script, name, options, None).wait()) == {0}
    first = Attempt(tmp_path / "cut", ranks, be_script, name, options, cut)
    assert set(first.wait()) == {75}, first.log.read_text()
    second = Attempt(tmp_path / "cut", ranks, be_script, name, options, None)
    assert set(second.wait()) == {0}, second.log.read_text()
    found = compare_runs(tmp_path / "whole", tmp_path / "cut", generators=True)
    assert found.identical, found


if __name__ == "__main__":
    PAGE.write_text(page_with_diffs())
