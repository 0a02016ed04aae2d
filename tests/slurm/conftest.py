import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import PrivateCluster, SlurmUnavailable

_HERE = Path(__file__).parent


#: Tests that share a cluster, so that each group takes about as long; the others make one more.
_GROUPS = {
    "test_continuation.py": "slurm-2",
    "test_deadline.py": "slurm-2",
    "test_causes.py": "slurm-3",
    "test_inside.py": "slurm-3",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))
            item.add_marker(pytest.mark.xdist_group(_GROUPS.get(item.path.name, "slurm-1")))
    # Slurm takes its time: whatever else there is to test is done meanwhile.
    items.sort(key=lambda item: _HERE not in item.path.parents)


@pytest.fixture(scope="session")
def cluster_of_session():
    cluster = PrivateCluster()
    try:
        cluster.start()
    except SlurmUnavailable as error:
        cluster.stop()
        if os.environ.get("CI"):
            pytest.fail(f"no private Slurm cluster: {error}", pytrace=False)
        pytest.skip(f"no private Slurm cluster: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(cluster_of_session, monkeypatch):
    """The private cluster; for the length of the test this process's environment is one of its login node."""
    for name in set(os.environ) - set(cluster_of_session.environ):
        monkeypatch.delenv(name)
    for name, value in cluster_of_session.env.items():
        monkeypatch.setenv(name, value)
    before = set(cluster_of_session.names)
    yield cluster_of_session
    # A run whose test has failed would come back and back, and take the machine from those that follow.
    for name in cluster_of_session.names - before:
        cluster_of_session.run("scancel", f"--name={name}", check=False)
