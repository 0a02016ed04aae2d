"""The loop over steps, as one rank goes through it: batch, step, boundary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import UsageError
from hpc_resume.run.agreement import NOT_BEGUN
from hpc_resume.run.foreign import ForeignLoader, has_position, is_loader
from hpc_resume.run.loader import ElasticLoader
from hpc_resume.run.microbatches import Share
from hpc_resume.run.rehearsing import Rehearsing
from hpc_resume.run.session import Session


@dataclass(slots=True, kw_only=True)
class Epoch:
    """An epoch that is gone through.

    Parameters
    ----------
    data, batches
        The loader, and what it gives, over all epochs.
    end, total
        Steps of the whole run after it, and after all epochs.
    through
        Whether its last batch was trained on.
    """

    data: ElasticLoader
    batches: Iterator[Any]
    end: int
    total: int
    through: bool = False


class Loop:
    """What is tracked, and which step is being done.

    Parameters
    ----------
    session
        This rank's side of the attempt.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._state: TrackedState | None = None
        self._loader: ElasticLoader | None = None
        self._stepping: ElasticLoader | None = None
        #: Whether the parts of the step that is being done were weighed by their samples.
        self.weighed = False
        self._inside = False
        #: Whether a batch was given for the step that is being done.
        self._given = False
        self._epoch: Epoch | None = None
        self._rehearsing: Rehearsing | None = None
        self._pid = os.getpid()
        #: Whether the script has gone through run.steps or run.epochs.
        self._stepped = False

    @property
    def tracking(self) -> bool:
        """Whether it has been said what is saved."""
        return self._state is not None

    @property
    def share(self) -> Share | None:
        """Part of the step that is being done, if our loader gave it; None else."""
        return self._stepping.share if self._stepping is not None else None

    def check_untracked(self, call: str) -> None:
        """Refuse a call that comes after ``run.track``."""
        if self._state is not None:
            raise UsageError(f"{call}: call it before run.track(…), which looks at it")

    def track(self, items: Mapping[str, Any]) -> None:
        """Name what is saved, and restore it if there is something to restore; see ``Run.track``."""
        if self._state is not None:
            raise UsageError(
                "run.track: call it once, with everything: run.track(model=…, optimizer=…, data=…)"
            )
        place = {"rank": self._session.rank, "world_size": self._session.world_size}
        seed = self._session.config.seed
        tracked = {
            key: ForeignLoader(key, item, seed=seed, **place) if is_loader(item) else item
            for key, item in items.items()
        }
        self._state = TrackedState(tracked, **place)
        self._loader = next((item for item in items.values() if isinstance(item, ElasticLoader)), None)
        self._session.restore(self._state, None if self._loader is None else self._loader.share)

    def epochs(self, data: Any, until: int, frame: FrameType) -> Iterator[int]:
        """Go through the remaining epochs; see ``Run.epochs``. The frame is the script's."""
        if not isinstance(data, ElasticLoader):
            raise UsageError(
                f"run.epochs: a {type(data).__qualname__} does not say how many steps an epoch has; take "
                "run.loader(dataset, global_batch=…), or run.steps(data, until=…) with what ends an epoch in its body"
            )
        if data.global_batch > data.epoch_samples:
            raise UsageError(
                f"run.epochs: a global batch of {data.global_batch} is more than the {data.epoch_samples} samples of an "
                "epoch; take run.steps(data, until=…)"
            )
        session, total = self._session, data.steps_for(until)
        batches = self._begin(data, frame)
        del frame
        while True:
            self._boundary(total)
            if session.step >= total:
                break
            epoch = data.samples // data.epoch_samples
            self._epoch = Epoch(data=data, batches=batches, end=data.steps_for(epoch + 1), total=total)
            self._inside = True  # until what follows the epoch's last step is done, too
            yield epoch
            if not self._epoch.through:
                raise UsageError(
                    f"run.epochs: the loop over the steps of epoch {epoch} was left at step {session.step}, before its "
                    f"last one ({self._epoch.end - 1}); go through all of run.steps(data), or leave the loop over "
                    "epochs, too"
                )
            self._epoch = None
            self._complete()
        self._save("done")

    def steps(self, data: Iterable[Any], until: int | None, frame: FrameType) -> Iterator[tuple[int, Any]]:
        """Go through the remaining steps; see ``Run.steps``. The frame is the script's."""
        epoch = self._epoch
        if until is None:
            if epoch is None or epoch.data is not data:
                raise UsageError(
                    "run.steps: until= is missing: the number of steps of the whole run; without it, it goes through "
                    "an epoch inside of a loop over run.epochs(data, …), with the same data"
                )
            del frame
            yield from self._steps_of(epoch)
            return
        if epoch is not None:
            raise UsageError("run.steps: inside of a loop over run.epochs, leave until= out")
        batches = self._begin(data, frame)
        del frame
        while True:
            self._boundary(until)
            if self._session.step >= until:
                break
            try:
                batch = self._next(data, batches)
            except StopIteration:
                self._inside = False
                self._session.rest()
                break
            yield self._session.step, batch
            self._complete()
        self._save("done")

    def _steps_of(self, epoch: Epoch) -> Iterator[tuple[int, Any]]:
        """Go through the remaining steps of an epoch; the last one is complete when what follows it is done."""
        while not epoch.through:
            batch = self._next(epoch.data, epoch.batches)
            yield self._session.step, batch
            if self._session.step + 1 >= epoch.end:
                epoch.through = True
            else:
                self._complete()
                self._boundary(epoch.total)

    def _begin(self, data: Iterable[Any], frame: FrameType) -> Iterator[Any]:
        """Begin to go through the data; the first that happens in a loop."""
        if self._state is None:
            raise UsageError(
                "run.steps: nothing is tracked, so nothing would be saved; call run.track(…) before the loop"
            )
        batches = self._batches(data)
        self._stepped = True
        self._rehearsing = None
        if "HPC_RESUME_REHEARSAL" in os.environ and self._session.rank == 0:
            self._rehearsing = Rehearsing(self._session.directory.root, frame, self._state.items)
        self._inside = False
        return batches

    def _boundary(self, until: int) -> None:
        """Let happen what happens between steps."""
        assert self._state is not None
        if self._rehearsing is not None:
            self._rehearsing.at(self._session.step)
        self._session.boundary(self._state, self._samples, until)

    def _next(self, data: Iterable[Any], batches: Iterator[Any]) -> Any:
        self._inside = True  # from the batch on: fetching it moves generators and positions
        batch = next(batches)
        self._stepping, self.weighed = (data if data is self._loader else None), False
        self._given = True
        return batch

    def _complete(self) -> None:
        """Count the step that was being done."""
        self._inside = self._given = False
        self._check_weights()
        self._session.step += 1

    def _batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Begin to go through the data, unless its position would be lost."""
        assert self._state is not None
        tracked = self._state.items.values()
        for item in tracked:
            if item is data and isinstance(data, ElasticLoader):
                self._loader = data  # of several that are tracked
                return iter(data)
            if isinstance(item, ForeignLoader) and item.loader is data:
                return iter(item)
        if isinstance(data, ElasticLoader) or has_position(data):
            raise UsageError(
                f"run.steps: this loader ({type(data).__qualname__}) is not tracked, so its position would be lost; "
                "pass it to run.track(data=…) too"
            )
        if isinstance(data, DataLoader):
            raise UsageError(
                "run.steps: a torch.utils.data.DataLoader can't say where it is, so a run that goes on would begin "
                "with the same samples again. Take run.loader(dataset, global_batch=…) with the same options, or "
                "torchdata's StatefulDataLoader, and track it. Where it does not matter which samples come when: "
                "pass iter(loader)"
            )
        if not any(isinstance(item, ElasticLoader | ForeignLoader) for item in tracked):
            self._session.leaving.say(
                f"run.steps: nothing that is tracked says where the data ({type(data).__qualname__}) is; when the run "
                "goes on, it begins at its start"
            )
        return iter(data)

    def breathe(self, *, step_done: bool) -> None:
        """Let a stop happen here; see ``Run.breathe``."""
        if not self._session.stopping.pending or os.getpid() != self._pid:
            return  # a process that was forked, such as a data loader's worker, has no say
        completed: int | None = self._session.step if self._state is not None else NOT_BEGUN
        if self._inside:
            # Without a batch there is no step that could be done: before an epoch's first one.
            completed = self._session.step + 1 if step_done and self._given else None
        self._session.breathe(self._state, self._samples, completed)

    def leave(self) -> None:
        """Save what was done, if the loop was left early, on purpose."""
        if self._state is not None and not self._stepped:
            self._session.leaving.say(
                "no step was counted, and nothing was saved: the script has tracked its state and not gone through "
                "run.steps(data, until=…), which is what the training loop takes its batches from"
            )
        if self._given:  # in the body of a step, whose samples are used
            self._inside = self._given = False
            self._session.step += 1
        saver = self._session.saver
        if self._state is not None and (self._session.step > saver.saved_step or saver.pending):
            self._save("done")  # or wait for the one that is being written, and save anew if that fails

    def _check_weights(self) -> None:
        """Refuse a step whose ranks had unequal parts and weighed them equally."""
        loader, self._stepping = self._stepping, None
        if loader is not None and not (loader.share.even or self.weighed):
            raise UsageError(
                f"step {self._session.step}: global_batch={loader.share.global_batch} is split unevenly over "
                f"{self._session.world_size} ranks, and nothing weighed the parts; go through all of "
                "run.micro_batches(batch, model) in each step, and multiply each loss by its weight"
            )

    @property
    def _samples(self) -> int:
        return self._loader.samples if self._loader is not None else 0

    def _save(self, reason: str) -> None:
        assert self._state is not None
        self._session.save(self._state, self._samples, reason, wait=True)
