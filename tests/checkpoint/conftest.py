"""A run of two attempts, made once, and a copy of it for each test that changes it."""

import shutil

import pytest

from hpc_resume.rundir import RunDirectory
from tests.checkpoint.story import World, two_attempts


@pytest.fixture(scope="session")
def origin(tmp_path_factory):
    base = tmp_path_factory.mktemp("origin")
    two_attempts(World(2), RunDirectory(base / "run"))
    return base


@pytest.fixture
def run(origin, tmp_path):
    shutil.copytree(origin / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")
