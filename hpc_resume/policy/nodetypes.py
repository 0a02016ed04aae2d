"""Other node types: which one this is, whether the run can go on on it, and what if it can't."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_resume.policy.decision import Decision
from hpc_resume.settings import NodeType

#: Words of a Slurm constraint such as ``[a100|h100]&ib``.
_WORD = re.compile(r"[\w.:+-]+")
#: Part of a device's memory that is planned with: the rest goes to the CUDA context, NCCL and fragmentation.
_USABLE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a rank computes on.

    Parameters
    ----------
    name
        For people: ``"Tesla V100-SXM2-16GB"``, ``"a CPU"``.
    precisions
        What it has arithmetic for.
    memory_bytes
        Its memory; None where it is not the limit (a CPU).
    """

    name: str
    precisions: frozenset[str]
    memory_bytes: int | None = None


def configured_type(
    node_types: Sequence[NodeType], *, found: str | None, asked: str | None
) -> NodeType | None:
    """Tell which of the configured node types an attempt got.

    Parameters
    ----------
    node_types
        All of the run.
    found
        What the scheduler says of the node: a configured name, or Slurm's ``partition/features``.
    asked
        Name that the job was submitted with; another may have been got since.

    Returns
    -------
    NodeType or None
        None if that can't be told.
    """
    if len(node_types) == 1:
        return node_types[0]
    candidates = list(node_types)
    if found is not None:
        named = [each for each in node_types if each.name == found]
        described = [each for each in node_types if _describes(each, found)]
        candidates = named or described or [each for each in node_types if not _says(each)]
    wanted = [each for each in candidates if each.name == asked]
    return (wanted or candidates)[0] if len(wanted or candidates) == 1 else None


def _says(node_type: NodeType) -> bool:
    """Whether a node type says anything about the nodes that it gets."""
    return node_type.partition is not None or node_type.constraint is not None


def _describes(node_type: NodeType, found: str) -> bool:
    """Whether ``partition/features`` is what a node type asks for."""
    partition, _, features = found.partition("/")
    partitions = set(_WORD.findall(node_type.partition or partition))
    wanted = set(_WORD.findall(node_type.constraint or ""))
    fits = not (wanted and features) or bool(wanted & set(_WORD.findall(features)))
    return _says(node_type) and partition in partitions and fits


def lacking_precision(precision: str, device: Device) -> str | None:
    """Say why a precision can't be had on a device, or None if it can."""
    if precision in device.precisions:
        return None
    able = ", ".join(sorted(device.precisions))
    return (
        f"precision {precision} is asked for, but {device.name} has no arithmetic for it (it has {able}); "
        "set another precision for this node type, and allow_precision_change if the run may go on with it"
    )


def refused_change(saved: str | None, now: str, *, allowed: bool) -> str | None:
    """Say why a checkpoint may not be continued in another precision, or None if it may.

    Parameters
    ----------
    saved
        Precision that the checkpoint was taken with; None if it does not say.
    now
        Precision of this attempt.
    allowed
        Whether the settings allow a change.
    """
    if saved is None or saved == now or allowed:
        return None
    return (
        f"the checkpoint was taken with precision {saved}, and this node type has {now}: losses would no longer "
        "be those of one training; set allow_precision_change: true if that is all right"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The least that a rank needs of its device's memory, from what was measured before the checkpoint.

    Parameters
    ----------
    state_bytes
        Parameters, optimizer state and whatever else is tracked.
    work_bytes
        Activations, gradients and the rest, with micro-batches of ``micro_batch`` samples.
    micro_batch
        Samples in a forward pass; None if it is not known, and then ``work_bytes`` is 0.
    """

    state_bytes: int
    work_bytes: int = 0
    micro_batch: int | None = None

    @classmethod
    def of(
        cls,
        *,
        peak_bytes: int,
        state_bytes: int,
        module_bytes: int,
        own_module_bytes: int,
        ranks: tuple[int, int],
        micro_batches: tuple[int | None, int | None],
    ) -> Footprint:
        """Transfer a measured peak to this attempt; all that is not known is taken to cost nothing.

        Parameters
        ----------
        peak_bytes
            Most that a rank had allocated up to the checkpoint; 0 if that was not measured.
        state_bytes, module_bytes
            Of all tensors in the checkpoint, and of those of its modules; each counted once.
        own_module_bytes
            Of the modules, what this rank now holds: all of it under DDP, a part under FSDP.
        ranks, micro_batches
            Of the attempt that took the checkpoint, and of this one.
        """
        before, now = ranks
        whole = state_bytes / module_bytes if module_bytes else 0.0
        own_state = own_module_bytes * whole
        # Of what is sharded, a rank held the more the fewer ranks there were. On one rank now it can't be told
        # what was sharded: then all of it was held, for all we know.
        held = own_module_bytes / module_bytes if module_bytes else 1.0
        sharded = (1 - held) / (1 - 1 / now) if now > 1 else 0.0
        state_before = state_bytes * (1 - sharded + sharded / before)
        old, new = micro_batches
        if not peak_bytes or old is None or new is None:
            return cls(state_bytes=round(own_state))
        work = max(peak_bytes - state_before, 0.0) * min(new / old, 1.0)
        return cls(state_bytes=round(own_state), work_bytes=round(work), micro_batch=new)

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.state_bytes + self.work_bytes

    def fitting_micro_batch(self, memory_bytes: int) -> int:
        """Largest micro-batch, up to the present one, with which it should fit; 0 if none does."""
        if self.micro_batch is None:
            return 0
        room = memory_bytes * _USABLE - self.state_bytes
        if room <= 0:
            return 0
        return min(int(room / self.work_bytes * self.micro_batch), self.micro_batch) if self.work_bytes else 1

    def problem(self, device: Device) -> str | None:
        """Say why it can't fit into a device's memory, or None if it can."""
        if device.memory_bytes is None or self.total_bytes <= device.memory_bytes:
            return None
        return f"{self._needs(device)}; {self._remedy(device.memory_bytes)}"

    def warning(self, device: Device) -> str | None:
        """Say that it will be tight, or None if there is room."""
        if device.memory_bytes is None or self.total_bytes <= device.memory_bytes * _USABLE:
            return None
        return f"{self._needs(device)}: that will be tight; {self._remedy(device.memory_bytes)}"

    def _needs(self, device: Device) -> str:
        assert device.memory_bytes is not None
        work = (
            ""
            if self.micro_batch is None
            else (f" and {_gb(self.work_bytes)} of work (measured, with micro-batches of {self.micro_batch})")
        )
        return (
            f"a rank needs {_gb(self.state_bytes)} of state{work}, at least, and {device.name} has "
            f"{_gb(device.memory_bytes)}"
        )

    def _remedy(self, memory_bytes: int) -> str:
        if fitting := self.fitting_micro_batch(memory_bytes):
            return f"micro_batch: {fitting} should fit (with run.micro_batches)"
        return "no micro_batch helps: shard the state (FSDP) or take more ranks"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def after_decline(declined: Sequence[str], configured: Sequence[str], *, patience: int) -> Decision:
    """Decide how a run goes on that could not go on on what it got.

    Parameters
    ----------
    declined
        Node types of the attempts in a row that were declined, this one last.
    configured
        Names of all node types of the run.
    patience
        How often the scheduler may give again what was declined before.
    """
    left = [name for name in configured if name not in declined]
    if not left:
        others = f"; so were {', '.join(dict.fromkeys(declined[:-1]))}" if len(configured) > 1 else ""
        return Decision(action="stop", why=f"no node type of this run is left{others}")
    repeated = len(declined) - len(set(declined))
    if repeated >= patience:
        return Decision(
            action="stop",
            why=f"the scheduler gave {declined[-1]} again and again, and not {' or '.join(left)}",
        )
    return Decision(action="continue", why=f"on to another node type: {' or '.join(left)}", move_on=True)
