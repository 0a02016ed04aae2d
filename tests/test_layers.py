"""The house: data flows down the page once, and a login node needs no torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_module_imports_from_a_floor_above():
    words = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_holds_more_than_one_noun_can_need():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in ROOT.glob("hpc_resume/**/*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_importing_the_package_leaves_torch_alone():
    code = "import sys, hpc_resume; print('torch' in sys.modules, len(hpc_resume.__all__))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")


def test_every_exported_name_is_there():
    import hpc_resume

    assert [name for name in hpc_resume.__all__ if not hasattr(hpc_resume, name)] == []
    assert set(hpc_resume.__all__) <= set(dir(hpc_resume))
