"""How PyTorch computes: recorded, set again, or told."""

import os
import subprocess
import sys

import pytest
import torch

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.errors import UsageError
from hpc_resume.journal import read_events
from hpc_resume.run import generators, numerics

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(autouse=True)
def settings_are_left_as_they_were(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = numerics.current()
    yield before
    torch.set_num_threads(before["cpu_threads"])
    for setting in numerics._SETTINGS:
        if setting.name in before and numerics._value(setting) != before[setting.name]:
            setting.put(before[setting.name])
    assert numerics.current() == before
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def events(saved, *, allowed=False):
    return dict(numerics.go_on(saved, allowed=allowed))


def test_the_same_settings_are_no_event():
    saved = numerics.current()
    assert saved["float32_matmul_precision"] == "highest"
    assert saved["default_dtype"] == "float32"
    assert events(saved) == events(None) == events([]) == {}


def test_precision_is_set_again_and_the_choice_of_algorithms_told():
    saved = numerics.current()
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    found = events(saved)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark  # the script's own business
    assert "default_dtype is float32 again (it was set to float64)" in found["numerics_restored"]
    assert found["numerics_restored"].endswith("allow_precision_change: true")
    assert found["numerics_changed"].endswith("taken: cudnn.benchmark was False, is True")
    torch.backends.cudnn.benchmark = False
    assert numerics.current() == saved


def test_another_precision_that_is_allowed_is_told():
    saved = numerics.current()
    torch.set_float32_matmul_precision("high")
    found = events(saved, allowed=True)
    assert found.keys() == {"numerics_changed"}
    assert "float32_matmul_precision was highest, is high" in found["numerics_changed"]
    assert torch.get_float32_matmul_precision() == "high"


def attempt(folder, until, **settings):
    checkpoint = {"every_steps": 1, "every_s": None}
    with hr.Run(folder, checkpoint=checkpoint, **settings) as run:
        run.track(net=torch.nn.Linear(2, 2))
        found = torch.get_float32_matmul_precision()
        for _ in run.steps(range(until), until=until):
            pass
    path = run.directory.attempt(run.attempt) / "events.jsonl"
    return found, {event["event"]: event for event in read_events(path) if "numerics" in event["event"]}


def test_a_run_goes_on_in_its_precision_unless_it_may_change(tmp_path):
    random_states = generators.capture()
    torch.set_float32_matmul_precision("high")
    attempt(tmp_path / "run", 1)
    torch.set_float32_matmul_precision("highest")
    found, told = attempt(tmp_path / "run", 2)
    assert found == "high"
    assert "float32_matmul_precision is high again" in told["numerics_restored"]["why"]
    torch.set_float32_matmul_precision("highest")
    found, told = attempt(tmp_path / "run", 3, allow_precision_change=True)
    assert found == "highest"
    assert told.keys() == {"numerics_changed"}
    assert attempt(tmp_path / "run", 4) == ("highest", {})  # from now on, that is how it is
    generators.restore(random_states)


def probed(folder, until, function):
    checkpoint = {"every_steps": 1, "every_s": None}
    with hr.Run(folder, checkpoint=checkpoint) as run:
        run.probe(function)
        run.track(net=torch.nn.Linear(2, 2, dtype=torch.float32))
        for _ in run.steps(range(until), until=until):
            pass
    events = read_events(run.directory.attempt(run.attempt) / "events.jsonl", {"restored"})
    _, manifest = store.find(run.directory)
    return manifest.health.probe, events


def test_a_probe_runs_in_the_precision_that_is_restored_and_says_so(tmp_path):
    random_states = generators.capture()

    def third():
        return torch.tensor(1 / 3)  # in the default type

    saved, _ = probed(tmp_path / "run", 1, third)
    torch.set_default_dtype(torch.float64)
    again, (restored,) = probed(tmp_path / "run", 2, third)
    assert restored["probed"] == "to the bit"
    assert (again.values, again.numerics) == (saved.values, saved.numerics)
    generators.restore(random_states)


def test_a_probe_may_round_otherwise_where_other_algorithms_are_chosen(tmp_path):
    random_states = generators.capture()

    def rounded():
        return 1.0 if torch.backends.cuda.flash_sdp_enabled() else 1.0 + 1e-7

    probed(tmp_path / "run", 1, rounded)
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    _, (restored,) = probed(tmp_path / "run", 2, rounded)
    assert restored["probed"] == "within 2e-05 (flash_attention True, now False)"
    generators.restore(random_states)


def test_settings_by_their_new_names_are_restored_too():
    code = """
import torch
from hpc_resume.run import numerics
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    saved = numerics.current()
    assert saved["cuda.matmul.fp32_precision"] == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    found = dict(numerics.go_on(saved, allowed=False))
    assert "cuda.matmul.fp32_precision is tf32 again" in found["numerics_restored"], found
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True)  # PyTorch does not forget which names were used


def test_a_manifest_may_say_what_it_will():
    saved = numerics.current()
    for value in ("x", [], None, -1, {}, 10**30, "float99", 1.5):
        assert events({name: value for name in saved if name != "cpu_threads"}) == {}
        events({"cpu_threads": value})
    assert numerics.current() == saved


def test_threads_are_told_and_set_again_only_where_bits_matter():
    torch.set_num_threads(1)
    saved = numerics.current()
    torch.set_num_threads(2)
    assert "cpu_threads was 1, is 2" in events(saved)["numerics_changed"]
    assert torch.get_num_threads() == 2
    numerics.deterministic()
    assert "cpu_threads is 1 again" in events(saved)["numerics_restored"]
    assert torch.get_num_threads() == 1
    saved["cpu_threads"] = 10**6  # more than there are
    assert "cpu_threads" in events(saved)["numerics_changed"]
    assert torch.get_num_threads() == 1


def test_deterministic_sets_what_pytorch_needs_and_says_what_it_costs():
    torch.backends.cudnn.benchmark = True
    cost = numerics.deterministic()
    assert "costs speed" in cost
    assert "24 MiB" in cost
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert numerics.current()["deterministic_algorithms"] is True
    numerics.deterministic()  # again


def test_a_workspace_with_which_cublas_varies_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UsageError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        numerics.deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_deterministic_is_refused_once_something_is_there(self):
        held = torch.ones(3, device="cuda")
        with pytest.raises(UsageError, match="there are tensors on the GPU already"):
            numerics.deterministic()
        assert held.sum() == 3

    def test_sums_are_the_same_each_time(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        numerics.deterministic()
        one, two = (torch.Generator("cuda").manual_seed(seed) for seed in (1, 2))
        index = torch.randint(0, 50, (100_000,), device="cuda", generator=one)
        values = torch.randn(100_000, device="cuda", generator=two)
        sums = [torch.zeros(50, device="cuda").index_add_(0, index, values) for _ in range(20)]
        assert all(torch.equal(sums[0], each) for each in sums)
