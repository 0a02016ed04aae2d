"""What docs/provenance.md shows exists, and says what is so."""

import re
import shlex
from pathlib import Path

import yaml
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.provenance import source

PAGE = (Path(__file__).parents[2] / "docs/provenance.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_and_option_exists():
    lines = [line for block in blocks("console") for line in block.splitlines() if "hpc-resume" in line]
    assert len(lines) >= 9
    for line in lines:
        _, verb, *words = shlex.split(line.removeprefix("$ ").partition("  #")[0])[0:]
        shown = CliRunner().invoke(main, [verb, "--help"])
        assert shown.exit_code == 0
        for word in words:
            assert not word.startswith("--") or word in shown.output


def test_the_settings_are_settings():
    for block in blocks("yaml"):
        Config(**yaml.safe_load(block))


def test_the_limits_are_those_that_hold():
    assert f"more than {source._MOST_ENTRIES:,} entries" in PAGE
    assert f"More than {source.MOST_FILES:,} files or 64 MB" in PAGE
    assert source.MOST_BYTES == 64 << 20
    assert (source._LARGEST_BYTES, source._LARGEST_PYTHON_BYTES) == (1 << 20, 16 << 20)
