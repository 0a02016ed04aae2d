"""Whether these nodes can go on with the run: looked at before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.names import escape
from hpc_resume.checkpoint.state import TrackedState
from hpc_resume.config import Config
from hpc_resume.errors import Declined
from hpc_resume.files import JsonObject
from hpc_resume.policy.nodetypes import (
    Device,
    Footprint,
    configured_type,
    lacking_precision,
    refused_change,
)
from hpc_resume.run.microbatches import Share
from hpc_resume.run.peers import JOIN_S, Peers
from hpc_resume.scheduler.environment import JobEnvironment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Multiplying matrices in fp16 took one core 35 times as long as in fp32 (measured: 512 x 512, torch 2.13): PyTorch
#: computes it on CPUs, and no training would get anywhere. bf16 is as fast as fp32 or faster.
_CPU = Device(name="a CPU", precisions=frozenset({"fp32", "bf16"}))


def describe_device(device: torch.device) -> Device:
    """Describe what a rank computes on."""
    if device.type != "cuda":
        return _CPU
    properties = torch.cuda.get_device_properties(device)
    able = {"fp32", "fp16"}
    with torch.cuda.device(device):
        # PyTorch emulates bf16 on older GPUs, at a small part of their speed.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            able.add("bf16")
    return Device(name=properties.name, precisions=frozenset(able), memory_bytes=properties.total_memory)


class Fitness:
    """What this attempt's nodes can do, against what the run wants of them.

    Parameters
    ----------
    config
        Of the run.
    environment
        Of this process.
    device
        Of this rank.
    found
        Node type by the scheduler's word.
    """

    def __init__(
        self, config: Config, environment: JobEnvironment, device: Device, found: str | None
    ) -> None:
        asked = environment.node_type
        #: Which of the configured ones this is; None if that can't be told.
        self.node_type = node_type = configured_type(config.node_types, found=found, asked=asked)
        #: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        self.precision: str = (node_type and node_type.precision) or "fp32"
        self._matters = any(each.precision is not None for each in config.node_types)
        self._allowed = config.allow_precision_change
        self._device = device
        self._world_size = environment.world_size
        self._own_module_bytes = 0
        self._modules: tuple[str, ...] = ()
        self._micro_batch: int | None = None

    @property
    def limit(self) -> int | None:
        """Most samples in a micro-batch; None if there is no limit."""
        return self.node_type.micro_batch if self.node_type is not None else None

    def look_at(self, state: TrackedState, share: Share | None, peers: Peers) -> None:
        """Take note of what is going to be trained, and of this rank's part of a step.

        Raises
        ------
        Declined
            On all ranks, if one of them can't compute in the precision that is asked for.
        """
        self._own_module_bytes = state.held_bytes()
        self._modules = state.modules
        if share is not None:
            self._micro_batch = min(share.largest, self.limit or share.largest)

        if self._matters:
            self._check_devices(peers)

    def _check_devices(self, peers: Peers) -> None:
        lacking = lacking_precision(self.precision, self._device)
        answers = peers.gather("device", lacking, patience_s=JOIN_S)
        worst = None
        if answers is not None:
            worst = next((answer for answer in answers if answer is not None), None)
        worst = peers.share("device", worst)
        if worst is not None:
            raise Declined(worst)

    def problem(self, manifest: Manifest) -> str | None:
        """Say why a checkpoint can't be continued on this rank, or None."""
        refused = refused_change(self._saved_precision(manifest), self.precision, allowed=self._allowed)
        return refused or self._footprint(manifest).problem(self._device)

    def notes(self, manifest: Manifest) -> Iterator[tuple[str, str]]:
        """Tell what is other than when the checkpoint was taken, as events for the journal."""
        saved = self._saved_precision(manifest)
        if saved not in {None, self.precision}:
            yield "precision_changed", f"precision was {saved}, and is {self.precision} from here on"
        if (why := self._footprint(manifest).warning(self._device)) is not None:
            yield "memory_tight", why

    def recorded(self) -> JsonObject:
        """Give what checkpoints say of it, for the next attempt."""
        found: JsonObject = {}
        if self._matters:
            found["precision"] = self.precision
        if self._micro_batch is not None:
            found["micro_batch"] = self._micro_batch
        return found

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """Compute in the precision of this node type."""
        return torch.autocast(device_type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def _saved_precision(self, manifest: Manifest) -> str | None:
        """Precision that a checkpoint was taken with, if it says so and anybody has asked for one."""
        saved = manifest.environment.get("precision") if self._matters else None
        return saved if saved in DTYPES else None

    def _footprint(self, manifest: Manifest) -> Footprint:
        if self._device.memory_bytes is None:
            return Footprint(state_bytes=0)  # nothing is compared with it
        prefixes = tuple(f"{escape(key)}/" for key in self._modules)
        sizes = {name: record.size_bytes for name, record in manifest.tensors.items()}
        return Footprint.of(
            peak_bytes=_count(manifest.costs.get("gpu_peak_bytes")) or 0,
            state_bytes=sum(sizes.values()),
            module_bytes=sum(size for name, size in sizes.items() if name.startswith(prefixes)),
            own_module_bytes=self._own_module_bytes,
            ranks=(manifest.world_size, self._world_size),
            micro_batches=(_count(manifest.environment.get("micro_batch")), self._micro_batch),
        )


def _count(value: Any) -> int | None:
    """Return a positive integer as it is, anything else as None: a manifest's costs may say what they will."""
    return value if type(value) is int and value > 0 else None
