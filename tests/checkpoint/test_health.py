"""What is known of a state, put together from all ranks, and read from files that may say anything."""

import json
import math

import pytest
import torch

from hpc_resume.checkpoint.commit import claim_attempt
from hpc_resume.checkpoint.health import Health, Known, Looked, Probed
from hpc_resume.checkpoint.manifest import Manifest, read_manifest
from hpc_resume.checkpoint.receipt import Header
from hpc_resume.checkpoint.snapshot import Camera
from hpc_resume.checkpoint.staging import Staging
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import IntegrityError
from hpc_resume.rundir import RunDirectory
from tests.golden.make import FULL, make


def probed(**values):
    return Probed(values=(values,), numerics={"threads": 2}, precision="fp32", repeats=True)


def test_ranks_are_put_together():
    ranks = [
        Looked(poisoned={"model/a": "nan"}, squares={"model": 9.0}),
        Looked(noticed={"model/mean": "nan"}, more=2, squares={"model": 16.0}),
    ]
    known = Known(usual={"model": 1.0}, factor=4.0)
    health = Health.together(ranks, [known, Known()])
    assert health.norms == {"model": 5.0}
    assert health.jumped == {"model": 1.0}
    assert health.told == "model/a (NaN) and 2 more"
    assert Health.from_json(json.loads(json.dumps(health.to_json()))) == health


def test_a_module_that_is_not_finite_on_one_rank_has_no_norm():
    ranks = [Looked(squares={"model": 9.0}), Looked(poisoned={"model/a": "inf"})]
    assert Health.together(ranks, [Known(usual={"model": 1.0}, factor=2.0)] * 2).norms == {}


def test_thousands_of_bad_tensors_are_counted():
    looked = Looked.of({f"model/{number:05d}": "nan" for number in range(5000)}, {}, {})
    health = Health.together([looked, looked], [Known(), Known()])
    assert len(health.poisoned) == 32
    assert len(json.dumps(health.to_json())) < 2000
    assert "more" in health.told


@pytest.mark.parametrize(("value", "poison"), [(math.nan, True), (math.inf, False), (1.0, False)])
def test_a_probe_that_gives_nan_is_poison(value, poison):
    health = Health.together([Looked()], [Known(probed=probed(loss=value))])
    assert bool(health.poisoned) == poison


def test_values_are_kept_once_where_ranks_agree():
    looked = [Looked()] * 2
    alike = Health.together(looked, [Known(probed=probed(a=1.0))] * 2).probe
    assert alike.values == ({"a": 1.0},)
    assert alike.of_rank(1) == {"a": 1.0}
    differ = Health.together(looked, [Known(probed=probed(a=1.0)), Known(probed=probed(a=2.0))]).probe
    assert differ.of_rank(1) == {"a": 2.0}
    assert Health.together(looked, [Known(), Known(probed=probed(a=2.0))]).probe is None


def test_known_survives_json():
    known = Known(probed=probed(a=0.1), usual={"model": 2.0}, factor=3.0)
    assert Known.from_json(json.loads(json.dumps(known.to_json()))) == known
    assert Known.from_json(Known().to_json()) == Known()


def save(staging, run, state, step, *, camera, **options):
    header = Header(
        run_id=run.identity()["run_id"],
        attempt=1,
        step=step,
        samples=0,
        reason="cadence",
        world_size=1,
        node_type=None,
        config=None,
        environment={},
    )
    staging.write(header, camera.take(state, stage=True), **options)
    name = staging.commit(step)
    staging.committed(step, name)
    return read_manifest(run.checkpoints / name)


def test_poison_in_bytes_that_are_not_written_again_is_still_poison(tmp_path):
    """An incremental checkpoint refers to an older one's NaN; its own bytes are all finite."""
    run = RunDirectory(tmp_path / "run")
    run.create("run")
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(300, 300), "b": torch.nn.Linear(300, 300)})
    state, camera = TrackedState({"model": net}, rank=0, world_size=1), Camera()
    staging = Staging(run, claim_attempt(run), 0, "here", longest_chain=8)
    assert save(staging, run, state.capture({}), 1, camera=camera).resumable
    with torch.no_grad():
        net["a"].weight[7, 7] = math.nan
    assert not save(staging, run, state.capture({}), 2, camera=camera).resumable
    with torch.no_grad():
        net["b"].weight += 1
    last = save(staging, run, state.capture({}), 3, camera=camera, only_changed=True)
    assert last.refers
    assert last.health.poisoned == {"model/a.weight": "nan"}
    with torch.no_grad():
        net["a"].weight[7, 7] = 0
    assert save(staging, run, state.capture({}), 4, camera=camera, only_changed=True).resumable


@pytest.mark.parametrize(
    "health",
    [
        [],
        {"poisoned": {"a": "bad"}},
        {"poisoned": {"a": 1}},
        {"poisoned": ["a"]},
        {"more": "x"},
        {"norms": {"a": "1"}},
        {"norms": {"a": True}},
        {"probe": {}},
        {"probe": {"values": [], "numerics": {}, "precision": "", "repeats": True, "batch": None}},
        {"probe": {"values": [{"a": "x"}], "numerics": {}, "precision": "", "repeats": True, "batch": None}},
        {"probe": {"values": [{}, {}, {}], "numerics": {}, "precision": "", "repeats": True, "batch": None}},
        {"probe": {"values": [{}], "numerics": [], "precision": "", "repeats": True, "batch": None}},
        {"probe": {"values": [{}], "numerics": {}, "precision": 1, "repeats": True, "batch": None}},
    ],
)
def test_a_manifest_that_says_nonsense_is_damaged(tmp_path, health):
    import hashlib

    make(tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    (name,) = [name for name in run.checkpoint_names() if int(name[:10]) == FULL]
    first, _, body = read_manifest(run.checkpoints / name).to_bytes().partition(b"\n")
    body = b' "health": ' + json.dumps(health).encode() + b",\n" + body
    digest = hashlib.sha256(body).hexdigest()[:32].encode()
    with pytest.raises(IntegrityError, match=r"damaged|probe"):
        Manifest.from_bytes(first[: first.rindex(b' "') + 2] + digest + b'",\n' + body)
