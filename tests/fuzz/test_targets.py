"""The fuzzer's targets, without the fuzzer: on its seeds, on mutations of them by fixed seeds, on what it once found."""

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as fuzzer
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import TARGETS, run_target, seeds
from tests.hostile.base import make_run

FOUND = Path(__file__).parent / "found"
#: Mutations of each target; together they take a few seconds.
MUTATIONS = {"shard": 300}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("fuzz") / "run").root


def timed(name, data):
    begun = time.process_time()
    taken = run_target(name, data)
    assert time.process_time() - begun < 1, (name, data[:1000])
    return taken


def test_the_fuzzer_knows_all_targets():
    assert list(fuzzer.TARGETS) == list(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_mutations(root, name):
    rng = random.Random(name)
    inputs = list(seeds(name, root))
    taken = [data for data in inputs if timed(name, data)]
    assert taken, "no seed is right"
    for _ in range(MUTATIONS.get(name, 1500)):
        data = rng.choice(taken if rng.random() < 0.7 else inputs)
        for _ in range(rng.randrange(1, 4)):
            data = mutate(data, rng, name)
        timed(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_fuzzer_found_is_refused_now(name):
    for path in sorted(FOUND.glob(f"{name}-*")):
        timed(name, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.binary(max_size=300))
def test_any_bytes(name, data):
    timed(name, data)
