"""The probe: a user's function on fixed data that runs before a save and after a restore, and changes nothing.

Checksums tell that the bytes that were saved are those that are loaded. They can't tell that the model computes
with them what it did: code, libraries, drivers and GPUs may have changed, or something was not tracked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from hpc_resume.checkpoint.health import Probed
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.placement import local_of
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.errors import HpcResumeError, RendezvousError, UsageError
from hpc_resume.files import JsonObject
from hpc_resume.policy.validation import coarsest, differences, other_numerics, probe_fits
from hpc_resume.run import generators, numerics
from hpc_resume.run.outcome import Part
from hpc_resume.run.peers import Peers
from hpc_resume.settings import ToleranceSettings, ValidationSettings

#: Other ranks may take so long for their part of a probe.
_PROBE_S = 3600.0
#: Its time is told if it is more than this part of a save's, and more than so many seconds.
_DEAR = 0.25
_DEAR_FROM_S = 0.1
#: For rank 0's word whether there is time for it.
_WORD_S = 30.0
#: How a restored state compares with what was saved.
SAME, OTHER, UNKNOWN = "same", "other", "unknown"

#: What users give: returns a number, a one-element tensor, or a dict of those.
Function = Callable[..., Any]


class Probing:
    """Runs a probe on one rank; all ranks do it at the same place.

    Parameters
    ----------
    function, arguments
        The user's, and what it is called with.
    batch
        Digest of the stored batch, if that is among the arguments.
    settings
        Of the run.
    state
        What is tracked.
    peers, rank, world_size
        The other ranks, and this process's place.
    node_type, precision
        Where it runs, and what ``run.autocast()`` computes in.
    say, note
        Into the log; into the journal.
    """

    def __init__(
        self,
        function: Function,
        arguments: tuple[Any, ...],
        batch: str | None,
        *,
        settings: ValidationSettings,
        state: TrackedState,
        peers: Peers,
        rank: int,
        world_size: int,
        node_type: str | None,
        precision: str,
        say: Callable[[str], None],
        note: Callable[..., None],
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._batch = batch
        self.settings = settings
        self._modules = [item for item in state.items.values() if isinstance(item, torch.nn.Module)]
        self._peers = peers
        self._rank = rank
        self._say = say
        self._note = note
        self._where = {"node_type": node_type, "world_size": world_size}
        self._autocast = [precision] if precision != "fp32" else []
        self._repeats = False
        self._failed = self._told = False
        #: What running it took the last time, in seconds.
        self.took_s = 0.0

    # ---------------------------------------------------------------- before a save

    def before_save(
        self, part: Part, *, last: bool, left_s: float | None, saves_s: Sequence[float]
    ) -> float | None:
        """Run it, if it is due and there is time; a failure costs no save, but is told.

        Parameters
        ----------
        part
            This rank's part of the save; gets what the probe gives.
        last
            Whether it is the attempt's last.
        left_s
            On rank 0: seconds until the job is killed, if that is known.
        saves_s
            What the last saves took.

        Returns
        -------
        float or None
            Seconds that are left then.
        """
        settings = self.settings
        if not (settings.probe == "every_save" or (settings.probe == "stop" and last)):
            return left_s
        usual_s = median(saves_s) if saves_s else None
        if part.details["reason"] == "stop":
            fits = probe_fits(left_s, self.took_s, usual_s)
            if not self._agree(f"probe/at/{part.number}", fits):
                part.details["probe"] = "there was no time for it"
                return left_s
        try:
            part.known = dataclasses.replace(part.known, probed=self._record(self._run()))
        except Exception as error:  # noqa: BLE001 - it is the user's function
            if not self._failed:
                self._say(f"the probe FAILED, so checkpoints have no value of it: {_summary(error)}")
                self._note("probe_failed", why=_summary(error))
            self._failed = True
        part.details["probe_s"] = round(self.took_s, 4)
        self._tell_cost(usual_s)
        return None if left_s is None else max(left_s - self.took_s, 0.0)

    def _agree(self, key: str, fits: bool) -> bool:
        """Take rank 0's word, all ranks or none; without it, rank 0 is gone, and nothing may wait for it."""
        if self._rank != 0:
            fits = False
            with contextlib.suppress(RendezvousError):
                fits = self._peers.get(key, _WORD_S)
        with contextlib.suppress(RendezvousError):
            fits = self._peers.settle(key, fits)
        return fits

    def _tell_cost(self, save_s: float | None) -> None:
        """Say once that it takes a good part of a save, if it does."""
        if not self._told and save_s is not None and self.took_s > max(_DEAR * save_s, _DEAR_FROM_S):
            self._told = True
            self._say(
                f"the probe takes {self.took_s:.2g} s, and a save {save_s:.2g} s; with validation: {{probe: stop}} it "
                "runs before the last save of an attempt alone"
            )

    # ---------------------------------------------------------------- when an attempt begins

    def try_out(self) -> None:
        """Run it in a new run, to learn of its mistakes before anything is trained, and what it takes.

        Raises
        ------
        UsageError
            On all ranks, if it fails on one or changes what is trained.
        """
        self._all("first")

    def compare(self, manifest: Manifest, turn: int) -> tuple[str, str]:
        """Compare what it gives with what it gave before a checkpoint was saved; all ranks get the same answer.

        Parameters
        ----------
        manifest
            Of the checkpoint, which all ranks have restored.
        turn
            Number of the try.

        Returns
        -------
        (str, str)
            ``SAME``, ``OTHER`` or ``UNKNOWN``, and in words what was compared.

        Raises
        ------
        UsageError
            As :meth:`try_out`.
        """
        answers = self._all(str(turn))
        found: Any = None
        if answers is not None:
            now = [Probed.from_json(each) for each in answers]
            found = judge(manifest.health.probe, now, tolerances=self.settings.tolerance)
        kind, why = self._peers.share(f"probe/verdict/{turn}", found, patience_s=_PROBE_S)
        return kind, why

    def _all(self, turn: str) -> list[Any] | None:
        """Run it on all ranks, twice; on rank 0 returns what each got."""
        record, error = self._twice()
        answer = record if error is None else {"error": f"rank {self._rank}: {_summary(error)}"}
        answers = self._peers.gather(f"probe/{turn}", answer, patience_s=_PROBE_S)
        told = None
        if answers is not None:
            told = next((each["error"] for each in answers if "error" in each), None)
        told = self._peers.share(f"probe/error/{turn}", told, patience_s=_PROBE_S)
        if told is not None:
            raise UsageError(
                f"run.probe: {told}; the function takes the stored batch, or nothing, gives a number, a one-element "
                "tensor or a dict of those, and changes nothing"
            ) from error
        return answers

    def _twice(self) -> tuple[JsonObject, Exception | None]:
        """Run it twice, to see whether it repeats itself, and that it leaves the model as it is."""
        before = self._versions()
        try:
            first = self._record(self._run()).to_json()
            record = self._record(self._run()).to_json()
            if changed := [name for name, version in self._versions().items() if before[name] != version]:
                raise UsageError(f"it changes {', '.join(changed[:3])}")
        except Exception as error:  # noqa: BLE001 - it is the user's function
            return {}, error
        # What tunes itself chooses anew in each process, and may then round in another way.
        self._repeats = first["values"] == record["values"] and not numerics.autotuned()
        return {**record, "repeats": self._repeats}, None

    def _versions(self) -> dict[str, int]:
        """Count the changes in place of each tensor that no probe may change.

        Buffers on rank 0 alone: DDP copies rank 0's to the others before each forward pass.
        """
        found: dict[str, int] = {}
        for number, module in enumerate(self._modules):
            named = [*module.named_parameters(), *(module.named_buffers() if self._rank == 0 else ())]
            found |= {f"{number or ''}{name}": _changes(tensor) for name, tensor in named}
        return found

    def _run(self) -> dict[str, float]:
        began = time.monotonic()
        with undisturbed(self._modules):
            values = _numbers(self._function(*self._arguments))
        self.took_s = time.monotonic() - began
        return values

    def _record(self, values: Mapping[str, float]) -> Probed:
        return Probed(
            values=(values,),
            # As it is now: a restore sets some of it, and so may the script.
            numerics={**numerics.surroundings(), **self._where},
            precision=coarsest(numerics.precisions_of(self._modules) + self._autocast),
            repeats=self._repeats,
            batch=self._batch,
        )


def judge(before: Probed | None, now: Sequence[Probed], *, tolerances: ToleranceSettings) -> tuple[str, str]:
    """Compare what a probe gives on all ranks with what it gave before the save.

    Parameters
    ----------
    before
        What stands in the checkpoint.
    now
        Of each rank.
    tolerances
        Where hardware or software differ.

    Returns
    -------
    (str, str)
        ``SAME``, ``OTHER`` or ``UNKNOWN``, and why.
    """
    if before is None:
        return UNKNOWN, "it was saved without a probe's value"
    if before.batch != now[0].batch:
        return UNKNOWN, "the probe ran on other data"
    others = other_numerics(before.numerics, now[0].numerics)
    repeats = before.repeats and all(each.repeats for each in now)
    tolerance = None
    if others or not repeats:
        precision = coarsest([before.precision, *(each.precision for each in now)])
        tolerance = getattr(tolerances, precision)
    unlike: list[str] = []
    if before.numerics.get("world_size") == now[0].numerics.get("world_size"):
        for rank, each in enumerate(now):
            values = before.of_rank(rank)
            if values:  # a rank that had died had none
                whose = f"rank {rank}: " if len(before.values) > 1 else ""
                unlike += [
                    f"{whose}{text}" for text in differences(values, each.values[0], tolerance=tolerance)
                ]
    else:
        means = _mean(before.values), _mean([each.values[0] for each in now])
        unlike += differences(*means, tolerance=tolerance)
    how = "to the bit" if tolerance is None else f"within {tolerance:g}"
    if others:
        how += f" ({'; '.join(others[:4])})"
    elif not repeats:
        how += " (it does not repeat itself to the bit)"
    if not unlike:
        return SAME, how
    return OTHER, f"{'; '.join(dict.fromkeys(unlike))}; it should be the same {how}"


@contextlib.contextmanager
def undisturbed(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluate something without traces: no gradients, modules in evaluation mode, generators put back."""
    states = generators.capture()
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in flags:
            part.training = False  # not .eval(): some modules do more than that
        with torch.no_grad():
            yield
    finally:
        for part, training in flags:
            part.training = training
            reshard = getattr(part, "reshard", None)
            if reshard is not None and hasattr(
                part, "unshard"
            ):  # FSDP2 keeps what a forward pass has gathered
                reshard()
        generators.restore(states)


def _changes(tensor: torch.Tensor) -> int:
    return local_of(tensor)._version  # noqa: SLF001 - autograd's own count of changes in place


def _numbers(result: Any) -> dict[str, float]:
    """Read what a probe has given."""
    values = result if isinstance(result, Mapping) else {"value": result}
    if not values:
        raise UsageError("it gives an empty dict")
    found = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise UsageError(
                f"its {name} is a tensor of shape {list(value.shape)}; give one number, such as .mean()"
            )
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"its {name} is a {type(value).__name__}, and no number") from None
    return found


def _mean(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    told = [each for each in ranks if each]
    names = dict.fromkeys(name for each in told for name in each)
    return {
        name: sum(each[name] for each in told if name in each) / sum(name in each for each in told)
        for name in names
    }


def _summary(error: BaseException) -> str:
    return str(error) if isinstance(error, HpcResumeError) else f"{type(error).__name__}: {error!s:.300}"
