"""Templates and site files reach a wheel and an editable install alike."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {"hpc_resume/templates/job.sbatch.j2", "hpc_resume/configs/mycluster.yaml", "hpc_resume/py.typed"}
LOOK = """
from importlib import resources
print((resources.files("hpc_resume.templates") / "job.sbatch.j2").is_file(),
      (resources.files("hpc_resume.configs") / "mycluster.yaml").is_file())
"""


def pip(*words):
    command = [sys.executable, "-m", "pip", *words, "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files that git knows, elsewhere: building must not write into the checkout."""
    target = tmp_path_factory.mktemp("copy")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def test_the_wheel_holds_them_and_every_module(copy, tmp_path):
    pip("wheel", str(copy), "--wheel-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hpc_resume").rglob("*.py")}
    assert names >= DATA | modules


def test_an_editable_install_finds_them(copy, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    pip("install", "--editable", str(copy), "--target", str(site))
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", LOOK], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "True True\n", done.stderr


def test_every_requirement_has_a_reason():
    from configparser import ConfigParser

    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = parser["options"]["install_requires"] + parser["options.extras_require"]["report"]
    reasons = (ROOT / "docs/dependencies.md").read_text()
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    assert [name for name in names if name not in reasons] == []
