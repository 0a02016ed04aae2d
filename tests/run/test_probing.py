"""The probe: it changes nothing, compares what it should, and tells a bad checkpoint from a changed world."""

import os
import signal
import time

import pytest
import torch

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.fork import apply_fork, plan_fork
from hpc_resume.checkpoint.health import Probed
from hpc_resume.checkpoint.opened import Checkpoint
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import IntegrityError, UsageError
from hpc_resume.journal import read_events
from hpc_resume.run.fixedbatch import keep_batch, load_batch
from hpc_resume.run.outcome import Part
from hpc_resume.run.probing import OTHER, SAME, UNKNOWN, Probing, judge
from hpc_resume.rundir import RunDirectory
from hpc_resume.settings import ToleranceSettings, ValidationSettings
from tests.ranks import Attempt
from tests.run.probed import FIXED, train


def events(run_dir, attempt, kind):
    found = read_events(run_dir / "attempts" / f"{attempt:04d}" / "events.jsonl")
    return [event for event in found if event["event"] == kind]


def plain(steps):
    train(steps, probed=False)


def scaled(steps, scale, *, settings=None):
    train(steps, scale=scale, **(settings or {}))


def test_training_is_the_same_to_the_bit_with_a_probe_and_without(tmp_path):
    probed, bare = tmp_path / "probed", tmp_path / "bare"
    for run_dir, function in ((probed, train), (bare, plain)):
        for steps in (5, 10):  # a restore in the middle
            attempt = Attempt(run_dir, 2, function, steps)
            assert attempt.wait() == [0, 0], attempt.log.read_text()
    with Checkpoint(probed) as one, Checkpoint(bare) as other:
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one.manifest.health.probe is not None
        assert other.manifest.health.probe is None
        generators = [
            each.reader.private(rank, f"ranks/{rank:05d}/") for each in (one, other) for rank in (0, 1)
        ]
    for ours, theirs in zip(generators[:2], generators[2:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("rng/"))
    (restored,) = events(probed, 2, "restored")
    assert restored["probed"] == "to the bit"


def test_on_other_ranks_a_tolerance_holds(tmp_path):
    assert Attempt(tmp_path, 2, train, 3).wait() == [0, 0]
    attempt = Attempt(tmp_path, 1, train, 4)
    assert attempt.wait() == [0], attempt.log.read_text()
    (restored,) = events(tmp_path, 2, "restored")
    assert restored["probed"].startswith("within 2e-05 (node_type cpu-2, now cpu-1")


def fsdp(steps):
    train(steps, kind="fsdp")


def test_sharded_models_are_probed_too(tmp_path):
    for steps in (3, 5):
        attempt = Attempt(tmp_path, 2, fsdp, steps)
        assert attempt.wait() == [0, 0], attempt.log.read_text()
    assert events(tmp_path, 2, "restored")[0]["probed"] == "to the bit"


def test_a_changed_model_blames_no_checkpoint(tmp_path):
    """What nobody tracks is another: each checkpoint gives something else, so none is set aside."""
    assert Attempt(tmp_path, 1, train, 8).wait() == [0]
    names = RunDirectory(tmp_path).checkpoint_names()
    attempt = Attempt(tmp_path, 1, scaled, 10, 1.01)
    assert attempt.wait() == [1]
    log = attempt.log.read_text()
    assert "with each of 3 checkpoints" in log
    assert "nothing was set aside" in log
    assert "the model's code" in log
    assert RunDirectory(tmp_path).checkpoint_names() == names
    assert list((tmp_path / "quarantine").iterdir()) == []
    assert [event["checkpoint"] for event in events(tmp_path, 2, "probe_differs")] == names[:-4:-1]
    attempt = Attempt(tmp_path, 1, telling, 10)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert "going on all the same" in attempt.log.read_text()


def telling(steps):
    train(steps, scale=1.01, validation={"mismatch": "tell"})


def spoilt_save(steps, *, spoilt_from=6, told=lambda step: None):
    """Change a weight between the probe and the copy, as a stray thread might."""
    from hpc_resume.checkpoint.state import TrackedState

    capture = TrackedState.capture
    now = {}

    def spoiling(self, *args):
        net = self.items["model"]
        if now.get("step", 0) >= spoilt_from:
            with torch.no_grad():
                next(net.parameters()).add_(0.5)
        return capture(self, *args)

    def note(*, step, **_):
        now["step"] = step + 1
        told(step + 1)

    TrackedState.capture = spoiling
    train(steps, before_step=note)


def test_a_checkpoint_that_is_not_what_was_probed_is_set_aside(tmp_path):
    assert Attempt(tmp_path, 2, spoilt_save, 7).wait() == [0, 0]
    names = RunDirectory(tmp_path).checkpoint_names()  # 2, 4; and 6, 7, which are spoilt
    attempt = Attempt(tmp_path, 2, train, 8)
    assert attempt.wait() == [0, 0], attempt.log.read_text()
    (restored,) = events(tmp_path, 2, "restored")
    assert (restored["step"], restored["probed"]) == (4, "to the bit")
    assert [event["checkpoint"] for event in events(tmp_path, 2, "quarantined")] == [names[3], names[2]]
    assert "is set aside" in attempt.log.read_text()
    assert len(list((tmp_path / "quarantine").glob("*/manifest.json"))) == 2  # kept, whole
    assert verify_run(tmp_path) == []


def without_value_at(steps, unprobed, spoilt_from=99):
    """Let no probe have a value at some steps."""
    from hpc_resume.run.probing import Probing

    before_save = Probing.before_save

    def seldom(self, part, **options):
        if unprobed["now"] in unprobed["steps"]:
            return options["left_s"]
        return before_save(self, part, **options)

    Probing.before_save = seldom
    spoilt_save(steps, spoilt_from=spoilt_from, told=lambda step: unprobed.update(now=step))


def test_a_checkpoint_without_a_value_is_restored_and_said_to_be(tmp_path):
    assert Attempt(tmp_path, 1, without_value_at, 4, {"steps": [4]}).wait() == [0]
    attempt = Attempt(tmp_path, 1, train, 5)
    assert attempt.wait() == [0], attempt.log.read_text()
    (restored,) = events(tmp_path, 2, "restored")
    assert (restored["step"], restored["probed"]) == (4, "it was saved without a probe's value")


def test_what_has_no_value_is_trusted_once_an_older_one_vouches_for_the_rest(tmp_path):
    """7 is spoilt, 6 has no value, 4 gives what it gave: so 7 goes, and 6 is taken."""
    assert Attempt(tmp_path, 1, without_value_at, 7, {"steps": [6]}, 7).wait() == [0]
    names = RunDirectory(tmp_path).checkpoint_names()
    attempt = Attempt(tmp_path, 1, train, 8)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert events(tmp_path, 2, "restored")[0]["step"] == 6
    assert [event["checkpoint"] for event in events(tmp_path, 2, "quarantined")] == [names[-1]]


def with_another_batch(steps):
    train(steps, batch={"x": torch.ones(1, 16), "y": torch.ones(1)})


def test_a_fork_is_probed_on_its_parents_batch(tmp_path):
    assert Attempt(tmp_path / "parent", 1, train, 4).wait() == [0]
    plan = plan_fork(RunDirectory(tmp_path / "parent"), 4)
    apply_fork(plan, tmp_path / "fork", name="fork")
    attempt = Attempt(tmp_path / "fork", 1, with_another_batch, 5)
    assert attempt.wait() == [0], attempt.log.read_text()
    assert "another batch than the stored one was given" in attempt.log.read_text()
    assert events(tmp_path / "fork", 1, "restored")[0]["probed"] == "to the bit"


def changing(net):
    def probe(_):
        next(net.parameters()).mul_(1.0)
        return 1.0

    return probe


def failing(net):
    def probe(_):
        if torch.distributed.get_rank() == 1:
            raise KeyError("no such thing")
        return 1.0

    return probe


def many(net):
    return lambda _: torch.zeros(3)


def broken(steps, how):
    train(steps, broken=how)


@pytest.mark.parametrize(
    ("how", "words"),
    [(changing, "it changes module.0.weight"), (failing, "rank 1: KeyError"), (many, "give one number")],
)
def test_a_probe_that_is_none_ends_the_run_before_its_first_step(tmp_path, how, words):
    attempt = Attempt(tmp_path, 2, broken, 4, how)
    assert attempt.wait() == [2, 2], attempt.log.read_text()
    assert words in attempt.log.read_text()
    assert RunDirectory(tmp_path).checkpoint_names() == []


def stopping(steps, slow_s):
    def act(*, run, step, **_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    if slow_s:
        from hpc_resume.run import probing

        probing.probe_fits = lambda left_s, probe_s, save_s, real=probing.probe_fits: real(
            left_s, slow_s, save_s
        )
    train(steps, every_steps=None, before_step=act, checkpoint={"every_s": None})


@pytest.mark.parametrize("slow_s", [0, 60])
def test_before_a_stop_it_runs_only_if_there_is_time(tmp_path, slow_s):
    assert Attempt(tmp_path, 1, stopping, 50, slow_s).wait() == [75]
    _, manifest = store.find(RunDirectory(tmp_path))
    assert (manifest.health.probe is None) == bool(slow_s)
    (saved,) = events(tmp_path, 1, "saved")
    assert ("probe" in saved) == bool(slow_s)


class Alone:
    """The other ranks of the only rank."""

    def gather(self, _, value, **__):
        return [value]

    def share(self, _, value=None, **__):
        return value

    settle = share


def probing(function, said, noted=None, **settings):
    net = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout(0.5))
    return Probing(
        lambda: function(net),
        (),
        None,
        settings=ValidationSettings(**settings),
        state=TrackedState({"model": net}, rank=0, world_size=1),
        peers=Alone(),
        rank=0,
        world_size=1,
        node_type=None,
        precision="fp32",
        say=said.append,
        note=lambda kind, **_: None if noted is None else noted.append(kind),
    )


def saved(probe, reason="cadence", last=False, left_s=None, saves_s=()):
    part = Part(number=0, details={"reason": reason})
    left_s = probe.before_save(part, last=last, left_s=left_s, saves_s=saves_s)
    return part.known.probed, left_s


def test_a_probe_that_fails_costs_no_save_and_is_told_once():
    said, noted, answers = [], [], iter([1.0, 1.0])
    probe = probing(lambda _: next(answers), said, noted)
    probe.try_out()
    assert saved(probe) == saved(probe) == (None, None)
    assert noted == ["probe_failed"]
    assert "the probe FAILED" in said[0]


def test_modes_gradients_and_generators_are_put_back():
    seen = {}

    def look(net):
        seen.update(training=[part.training for part in net.modules()], grad=torch.is_grad_enabled())
        return torch.rand(1)

    probe = probing(look, [])
    net = probe._modules[0]
    net[1].eval()
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    probe.try_out()
    assert torch.equal(torch.rand(1), first)
    assert seen == {"training": [False] * 3, "grad": False}
    assert [part.training for part in net.modules()] == [True, True, False]
    assert saved(probe)[0].repeats  # a generator that is put back gives the same again


def test_what_does_not_repeat_itself_says_so():
    numbers = iter(range(9))
    probe = probing(lambda _: next(numbers), [])
    probe.try_out()
    assert not saved(probe)[0].repeats


def test_when_it_runs_is_a_setting():
    probe = probing(lambda _: 1.0, [], probe="stop")
    probe.try_out()
    assert saved(probe)[0] is None
    assert saved(probe, last=True, reason="done")[0] is not None
    known, left_s = saved(probe, last=True, reason="stop", left_s=50.0, saves_s=(1.0,))
    assert known is not None
    assert 49 < left_s < 50
    assert saved(probe, last=True, reason="stop", left_s=50.0, saves_s=(40.0,)) == (None, 50.0)


def test_a_dear_probe_is_told_once():
    said = []
    probe = probing(lambda _: time.sleep(0.11) or 1.0, said)
    saved(probe, saves_s=(1.0,))
    assert said == []
    saved(probe, saves_s=(0.2,))
    saved(probe, saves_s=(0.2,))
    assert len(said) == 1
    assert "validation: {probe: stop}" in said[0]


def record(*values, repeats=True, batch=None, precision="fp32", **numerics):
    return Probed(
        values=values,
        numerics={"world_size": 2, **numerics},
        precision=precision,
        repeats=repeats,
        batch=batch,
    )


def judged(before, *now):
    return judge(before, now, tolerances=ToleranceSettings())


def test_any_rank_counts():
    before = record({"loss": 1.0}, {"loss": 2.0})
    assert judged(before, record({"loss": 1.0}), record({"loss": 2.0})) == (SAME, "to the bit")
    kind, why = judged(before, record({"loss": 1.0}), record({"loss": 2.5}))
    assert (kind, why) == (OTHER, "rank 1: loss was 2.0 and is 2.5; it should be the same to the bit")


def test_where_something_differs_a_tolerance_by_precision_holds():
    near = {"loss": 1.001}
    assert judged(record({"loss": 1.0}), record(near), record(near))[0] == OTHER
    now = record(near, gpu="B", precision="bf16")
    assert judged(record({"loss": 1.0}, gpu="A", precision="bf16"), now, now) == (
        SAME,
        "within 0.02 (gpu A, now B)",
    )
    now = record(near, gpu="B")
    assert judged(record({"loss": 1.0}, gpu="A"), now, now)[0] == OTHER
    vague = record({"loss": 1.00001}, repeats=False)
    assert judged(record({"loss": 1.0}), vague, vague)[0] == SAME


def test_other_numbers_of_ranks_are_compared_by_their_means():
    now = Probed(values=({"loss": 1.5},), numerics={"world_size": 1}, precision="fp32", repeats=True)
    assert judged(record({"loss": 1.0}, {"loss": 2.0}), now)[0] == SAME
    assert judged(record({"loss": 1.0}, {"loss": 3.0}), now)[0] == OTHER
    assert judged(record({"loss": 1.0}, {}), now)[0] == OTHER


def test_what_can_not_be_compared_is_not():
    assert judged(None, record({"loss": 1.0}))[0] == UNKNOWN
    assert judged(record({"loss": 1.0}, batch="a"), record({"loss": 2.0}, batch="b"))[0] == UNKNOWN


def test_probed_values_survive_json():
    record_ = record({"a": 0.1, "b": float("nan"), "c": float("-inf")}, {"a": 1e-300})
    assert repr(Probed.from_json(record_.to_json())) == repr(record_)


def test_the_batch_is_stored_once_and_read_back_as_it_was(tmp_path):
    run = RunDirectory(tmp_path)
    batch = {"x": torch.randn(3, 2).to(torch.bfloat16), "more": [torch.arange(3), 2, ("a", None)]}
    digest, same = keep_batch(run, batch)
    assert same
    found = load_batch(run, digest, torch.device("cpu"))
    assert torch.equal(found["x"], batch["x"])
    assert torch.equal(found["more"][0], batch["more"][0])
    assert found["more"][1:] == [2, ("a", None)]
    assert keep_batch(run, batch) == (digest, True)
    assert keep_batch(run, FIXED) == (digest, False)
    (path,) = run.probe.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="its digest is not its name"):
        load_batch(run, digest, torch.device("cpu"))


def test_the_batch_is_what_the_safetensors_package_reads(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    keep_batch(RunDirectory(tmp_path), FIXED)
    (path,) = RunDirectory(tmp_path).probe.iterdir()
    found = safetensors.load_file(path)
    assert torch.equal(found["batch/x"], FIXED["x"])


def test_a_batch_that_can_not_be_stored_is_refused(tmp_path):
    with pytest.raises(UsageError, match="complex128"):
        keep_batch(RunDirectory(tmp_path), torch.zeros(2, dtype=torch.complex128))
