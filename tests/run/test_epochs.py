"""Loops over epochs: what follows an epoch's last step is done once, wherever the run is interrupted."""

import errno
import os
import signal
import threading

import pytest
import torch

import hpc_resume as hr
from hpc_resume.report.comparison import compare_runs
from tests.ranks import Attempt
from tests.run.training import Samples

EPOCHS = 3
#: 100 samples in batches of 24: epochs of 5, 4 and 4 steps.
BATCH, LAST_STEPS = 24, [4, 8, 12]


def train(*, nested=True, cut=None, epochs=EPOCHS, **settings):
    """Train with a schedule and a validation an epoch; interrupted in a step, or in a validation."""
    with hr.Run(**settings) as run:
        net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        data = run.loader(Samples(), global_batch=BATCH)
        validated = {"at": [], "scores": []}
        run.track(model=net, optimizer=optimizer, scheduler=scheduler, data=data, validated=validated)

        def learn(step, batch):
            if cut == ("step", step):
                os.kill(os.getpid(), signal.SIGUSR2)
            _, x, y = batch
            loss = (net(x).squeeze(-1) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(loss=loss)

        def end_epoch():
            if cut == ("validation", run.step):
                os.kill(os.getpid(), signal.SIGUSR2)
            validated["at"].append(run.step)
            validated["scores"].append(net(torch.ones(16)).item())
            scheduler.step()

        if nested:
            for _ in run.epochs(data, until=epochs):
                for step, batch in run.steps(data):
                    learn(step, batch)
                end_epoch()
        else:
            for step, batch in run.steps(data, until=data.steps_for(epochs)):
                learn(step, batch)
                if data.epoch_ends:
                    end_epoch()
        return validated["at"], run.step


def call(how):
    train(**how)


def test_a_loop_over_epochs_does_what_a_loop_over_steps_does(tmp_path):
    assert train(run_dir=tmp_path / "flat", nested=False) == (LAST_STEPS, 13)
    assert train(run_dir=tmp_path / "nested") == (LAST_STEPS, 13)
    assert compare_runs(tmp_path / "flat", tmp_path / "nested", generators=True).identical


@pytest.mark.parametrize(
    "cut", [("step", 2), ("step", 4), ("validation", 4), ("step", 5), ("validation", 12)], ids=str
)
def test_what_ends_an_epoch_is_done_once(tmp_path, cut):
    train(run_dir=tmp_path / "whole")
    for attempt, codes in enumerate([[75] if cut[1] < 12 else [0], [0]]):
        how = {"cut": cut if attempt == 0 else None}
        assert Attempt(tmp_path / "cut", 1, call, how).wait() == codes
        if codes == [0]:
            break
    found = compare_runs(tmp_path / "whole", tmp_path / "cut", generators=True)
    assert found.identical, found


def test_more_epochs_go_on_after_the_last_one(tmp_path):
    train(run_dir=tmp_path / "run", epochs=1)
    assert train(run_dir=tmp_path / "run") == (LAST_STEPS, 13)


def test_before_an_epochs_first_batch_no_step_is_done(run, monkeypatch):
    data, asked = tracked(run), []
    monkeypatch.setattr(run._session.stopping, "pending", True)
    monkeypatch.setattr(run._session, "breathe", lambda _, __, completed: asked.append(completed))
    for _ in run.epochs(data, until=1):
        run.breathe(step_done=True)  # in a validation that comes first
        for _ in run.steps(data):
            run.breathe(step_done=True)
    run.breathe(step_done=True)
    assert asked == [None, 1, 2, 2]


@pytest.fixture
def run(tmp_path):
    with hr.Run(tmp_path / "run") as run:
        yield run


def tracked(run, **options):
    data = run.loader(Samples(), **{"global_batch": 50, **options})
    run.track(model=torch.nn.Linear(1, 1), data=data)
    return data


def test_an_epoch_that_is_left_before_its_end_is_refused(run):
    data = tracked(run)
    epochs = run.epochs(data, until=2)
    next(epochs)
    next(run.steps(data))
    with pytest.raises(hr.UsageError, match="epoch 0 was left at step 0, before its last one"):
        next(epochs)


def test_the_loop_over_epochs_may_be_left(tmp_path):
    with hr.Run(tmp_path / "run") as run:
        data = tracked(run)
        for _ in run.epochs(data, until=2):
            for _ in run.steps(data):
                pass
            break
    with hr.Checkpoint(tmp_path / "run") as saved:
        assert saved.step == 2  # with the step that the epoch ended with


def leave_at_an_epochs_end(run_dir, change):
    """Leave the loop over epochs at its top, while the step that is its boundary is written in the background."""
    with hr.Run(run_dir, checkpoint={"every_steps": 2, "every_s": None}) as run:
        data = tracked(run)  # of two steps an epoch
        change(run._session.saver)
        for epoch in run.epochs(data, until=3):
            if epoch == 1:
                break
            for _ in run.steps(data):
                pass


def test_a_save_that_is_under_way_when_the_loop_is_left_is_waited_for(tmp_path):
    asked = threading.Event()

    def slow(saver):
        save, write = saver.save, saver._staging.write

        def save_and_ask(*args, wait=False, **options):
            if wait:
                asked.set()
            save(*args, wait=wait, **options)

        def write_when_asked(*args, **options):
            asked.wait(60)
            return write(*args, **options)

        saver.save, saver._staging.write = save_and_ask, write_when_asked

    try:
        leave_at_an_epochs_end(tmp_path / "run", slow)
        with hr.Checkpoint(tmp_path / "run") as saved:
            assert saved.step == 2
    finally:
        asked.set()


def test_a_save_that_fails_when_the_loop_is_left_is_taken_anew(tmp_path):
    def failing(saver):
        write = saver._staging.write

        def fail(*_, **__):
            saver._staging.write = write
            raise OSError(errno.EIO, "Input/output error")

        saver._staging.write = fail

    leave_at_an_epochs_end(tmp_path / "run", failing)
    with hr.Checkpoint(tmp_path / "run") as saved:
        assert saved.step == 2


def test_a_loop_that_goes_past_us_is_told(tmp_path, capsys):
    for through in (False, True):
        with hr.Run(tmp_path / str(through)) as run:
            data = tracked(run)
            next(iter(run.steps(data, until=1) if through else data))
        told = "no step was counted" in capsys.readouterr().err
        assert told != through


def test_until_is_given_once(run):
    data = tracked(run)
    with pytest.raises(hr.UsageError, match="until= is missing"):
        next(run.steps(data))
    for _ in run.epochs(data, until=1):
        with pytest.raises(hr.UsageError, match="leave until= out"):
            next(run.steps(data, until=3))
        for _ in run.steps(data):
            pass


@pytest.mark.parametrize("data", [[1, 2], torch.utils.data.DataLoader(Samples())], ids=["list", "DataLoader"])
def test_epochs_are_those_of_our_loader(run, data):
    run.track(model=torch.nn.Linear(1, 1))
    with pytest.raises(hr.UsageError, match=r"does not say how many steps .* run\.loader"):
        next(run.epochs(data, until=1))


def test_an_epoch_is_no_smaller_than_a_global_batch(run):
    with pytest.raises(hr.UsageError, match="more than the 100 samples"):
        next(run.epochs(tracked(run, global_batch=101), until=1))
