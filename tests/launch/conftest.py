import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def shellcheck():
    """What ShellCheck says of a script: of the version that is installed with the tests."""
    program = Path(sys.executable).with_name("shellcheck")

    def check(script: Path) -> str:
        done = subprocess.run([program, script], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    return check
