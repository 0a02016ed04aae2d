"""A run that goes from node type to node type: other ranks, other micro-batches, other precisions."""

import os
import signal
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr
from hpc_resume.checkpoint import store
from hpc_resume.journal import read_events
from hpc_resume.report.metrics import read_metrics
from hpc_resume.report.status import status
from hpc_resume.rundir import RunDirectory
from tests.ranks import Attempt

GLOBAL_BATCH = 10


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        return {"x": x, "y": x.sum().sin()}


def train(steps, node_types=(), *, uneven=True, weigh=True, until=None, **settings):
    """Train on micro-batches; with ``until``, ask to stop there, as a warning before the time limit does."""
    if node_types:
        settings["node_types"] = node_types
    with hr.Run(**settings) as run:
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        model = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        data = run.loader(Samples(), global_batch=GLOBAL_BATCH, uneven=uneven)
        run.track(model=model, optimizer=optimizer, data=data)
        for step, batch in run.steps(data, until=steps):
            if until is not None:
                ask_to_stop(run, step, at=until)
            total = pieces = 0
            parts = run.micro_batches(batch, model) if weigh else [(batch, 1.0)]
            for micro, weight in parts:
                with run.autocast():
                    out = model(micro["x"]).squeeze(-1)
                loss = (out - micro["y"]).square().mean() * weight
                loss.backward()
                total, pieces = total + loss.item(), pieces + 1
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=total, pieces=pieces, bits=torch.finfo(run.precision).bits)


def ask_to_stop(run, step, *, at):
    if step == at and run.rank == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
    if step >= at:
        time.sleep(0.2)  # the ranks agree on a step while they go on


def types(*fields):
    return [{"name": f"cpu-{each['ranks']}", **each} for each in fields]


def events(run_dir, attempt, kind):
    found = read_events(run_dir / "attempts" / f"{attempt:04d}" / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def test_the_global_batch_stays_while_ranks_and_micro_batches_change(tmp_path):
    """10 samples on 1, 3 and 2 ranks, in micro-batches of 3, 2 and all at once: the same training."""
    one, run_dir = tmp_path / "one", tmp_path / "run"
    assert Attempt(one, 1, train, 12).wait() == [0]
    shapes = types({"ranks": 1, "micro_batch": 3}, {"ranks": 3, "micro_batch": 2}, {"ranks": 2})
    for size, until in ((1, 3), (3, 7)):
        attempt = Attempt(run_dir, size, stop_at, 12, shapes, until)
        assert attempt.wait() == [75] * size, attempt.log.read_text()
    attempt = Attempt(run_dir, 2, train, 12, shapes)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    expected, found = read_metrics(one), read_metrics(run_dir)
    assert [row.step for row in found] == list(range(12))
    assert {row.values["pieces"] for row in found[:3]} == {4.0}
    assert {row.values["pieces"] for row in found[5:7]} == {2.0}
    assert {row.values["pieces"] for row in found[9:]} == {1.0}
    np.testing.assert_allclose(
        [row.values["loss"] for row in found], [row.values["loss"] for row in expected], rtol=1e-11
    )
    _, manifest = store.find(RunDirectory(run_dir))
    assert (manifest.samples, manifest.environment["micro_batch"]) == (120, 5)
    assert "precision" not in manifest.environment  # nobody asked for one


def stop_at(steps, node_types, until):
    train(steps, node_types, until=until)


def evenly(steps, node_types):
    train(steps, node_types, uneven=False)


def test_ranks_that_do_not_divide_the_batch_are_declined_and_the_run_moves_on(tmp_path):
    shapes = types({"ranks": 2}, {"ranks": 3})
    assert Attempt(tmp_path, 2, stop_at, 8, shapes, 2).wait() == [75, 75]
    attempt = Attempt(tmp_path, 3, evenly, 8, shapes)
    assert attempt.wait() == [75] * 3, attempt.log.read_text()
    assert "can't be split evenly over 3 ranks" in attempt.log.read_text()
    (ended,) = events(tmp_path, 2, "ended")
    assert (ended["cause"], ended["decision"], ended["move_on"]) == ("declined", "continue", True)
    assert events(tmp_path, 2, "restored") == []  # nothing was loaded
    assert Attempt(tmp_path, 2, evenly, 8, shapes).wait() == [0, 0]
    causes = [attempt.cause for attempt in status(tmp_path).attempts]
    assert causes[1:] == ["declined", "done"]


def test_declined_attempts_are_none_without_progress(tmp_path):
    shapes = [*types({"ranks": 1, "precision": "fp16"}), {"name": "another", "ranks": 2}]
    for _ in range(3):
        assert Attempt(tmp_path, 1, train, 4, shapes).wait() == [75]
    attempt = Attempt(tmp_path, 2, train, 4, [*types({"ranks": 2}), shapes[0]])
    assert attempt.wait() == [0, 0], attempt.log.read_text()


def test_without_another_node_type_the_run_stops_and_says_so(tmp_path):
    shapes = types({"ranks": 1, "precision": "fp16"}, {"ranks": 2, "precision": "fp16"})
    assert Attempt(tmp_path, 1, train, 4, shapes).wait() == [75]
    attempt = Attempt(tmp_path, 2, train, 4, shapes)
    assert attempt.wait() == [1, 1], attempt.log.read_text()
    assert "a CPU has no arithmetic for it" in attempt.log.read_text()
    (ended,) = events(tmp_path, 2, "ended")
    assert (ended["cause"], ended["decision"]) == ("declined", "stop")
    assert "no node type of this run is left; so were cpu-1" in ended["why"]


def allowing_another_precision(steps, node_types):
    train(steps, node_types, allow_precision_change=True)


def test_another_precision_is_declined_unless_the_settings_allow_it(tmp_path):
    shapes = types({"ranks": 1, "precision": "bf16"}, {"ranks": 2, "precision": "fp32"})
    assert Attempt(tmp_path, 1, stop_at, 6, shapes, 2).wait() == [75]
    _, manifest = store.find(RunDirectory(tmp_path))
    assert manifest.environment["precision"] == "bf16"
    attempt = Attempt(tmp_path, 2, train, 6, shapes)
    assert attempt.wait() == [75, 75]
    assert "taken with precision bf16, and this node type has fp32" in attempt.log.read_text()
    attempt = Attempt(tmp_path, 2, allowing_another_precision, 6, shapes)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (changed,) = events(tmp_path, 3, "precision_changed")
    assert changed["why"] == "precision was bf16, and is fp32 from here on"
    assert [row.values["bits"] for row in read_metrics(tmp_path)][::5] == [16, 32]


def on_a_small_gpu(steps, node_types, memory_bytes, until=None):
    """The same on what says it is a GPU: this machine has none."""
    from hpc_resume.checkpoint import staging
    from hpc_resume.policy.nodetypes import Device
    from hpc_resume.run import session

    gpu = Device(name="Toy 1", precisions=frozenset({"fp32"}), memory_bytes=memory_bytes)
    session.describe_device = lambda _: gpu
    staging.gpu_peak_bytes = lambda: 12_000
    train(steps, node_types, until=until)


def test_too_little_memory_is_declined_with_the_micro_batch_that_would_fit(tmp_path):
    """161 parameters in float64 and as many of momentum are 2,576 bytes; the rest is work for 10 samples."""
    large, small = {"name": "large", "ranks": 1}, {"name": "cpu-1", "ranks": 1}
    assert Attempt(tmp_path, 1, on_a_small_gpu, 6, [large], 20_000, 2).wait() == [75]
    attempt = Attempt(tmp_path, 1, on_a_small_gpu, 6, [small, large], 8_000)
    assert attempt.wait() == [75], attempt.log.read_text()
    (ended,) = events(tmp_path, 2, "ended")
    assert "Toy 1 has 0.0 GB; micro_batch: 4 should fit" in ended["why"]
    attempt = Attempt(tmp_path, 1, on_a_small_gpu, 6, [{**small, "micro_batch": 5}, large], 8_000)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert "that will be tight" in events(tmp_path, 3, "memory_tight")[0]["why"]


def forgetting_weights(steps):
    train(steps, weigh=False)


def test_uneven_parts_that_nothing_weighs_are_refused_before_anything_is_saved(tmp_path):
    attempt = Attempt(tmp_path, 3, forgetting_weights, 4)
    assert attempt.wait() == [2] * 3, attempt.log.read_text()
    assert "split unevenly over 3 ranks, and nothing weighed the parts" in attempt.log.read_text()
    assert RunDirectory(tmp_path).checkpoint_names() == []


def test_the_embedded_scheduler_goes_on_to_the_next_node_type_and_round(tmp_path):
    shapes = [{"name": "fits", "ranks": 1}, {"name": "fp16", "ranks": 1, "precision": "fp16"}]
    job = hr.submit(interrupting_itself, config={"node_types": shapes}, run_dir=tmp_path / "run")
    assert job.wait(100) == "COMPLETED", job.log()
    found = [(attempt.node_type, attempt.cause) for attempt in job.status().attempts]
    assert found == [("fits", "signal"), ("fp16", "declined"), ("fits", "done")]


def interrupting_itself():
    with hr.Run() as run:
        data = run.loader(torch.zeros(10, 2), global_batch=2)
        run.track(net=torch.nn.Linear(2, 1), data=data)
        for step, _ in run.steps(data, until=8):
            if run.attempt == 1:
                ask_to_stop(run, step, at=3)
