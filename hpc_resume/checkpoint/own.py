"""What of a state is in no object's state: gradients still to be used, who is frozen, users' random generators.

It stands in the shards under each rank's own names, but for gradients that say how they are spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hpc_resume.checkpoint import dtypes, objects, streams
from hpc_resume.checkpoint.fit import Target
from hpc_resume.checkpoint.gradients import GRADIENTS, Gradients, merged
from hpc_resume.checkpoint.names import escape, unescape
from hpc_resume.checkpoint.placement import wrapped_by_ddp
from hpc_resume.checkpoint.plan import RANKS
from hpc_resume.checkpoint.reader import CheckpointReader
from hpc_resume.errors import IntegrityError, MismatchError

_STREAMS = "streams"
_RECORD = "parameters"
#: The record of parameters takes a whole number of these.
_RECORD_BYTES = 512
#: Generators that were at the same place on so many ranks were so on all.
_LOOKED_AT = 64


class Own:
    """What a rank has besides the states of the tracked objects.

    Parameters
    ----------
    modules, optimizers, generators
        All that are tracked, by key.
    rank, world_size
        This process's place.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        optimizers: Iterable[torch.optim.Optimizer],
        generators: Mapping[str, streams.Stream],
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._modules = modules
        self._gradients = Gradients(modules, optimizers)
        self._streams = generators
        self._rank = rank
        self._world_size = world_size

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Take it: this rank's own tensors, and those that are spread over ranks, by name."""
        own = {f"{_STREAMS}/{escape(key)}": streams.take(key, each) for key, each in self._streams.items()}
        if not self._modules:
            return own, {}
        accumulated = self._gradients.accumulated()
        record = {
            "frozen": [name for name, each in self._gradients.parameters() if not each.requires_grad],
            "zeros": list(accumulated.zeros),
        }
        data = objects.dump(record)
        data = data.ljust(-(-len(data) // _RECORD_BYTES) * _RECORD_BYTES)
        own[_RECORD] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        own.update(accumulated.own)
        return own, dict(accumulated.shared)

    # ---------------------------------------------------------------- restore

    def problems(self, reader: CheckpointReader) -> list[str]:
        """List what is tracked now and was not then, or the other way round."""
        saved = {unescape(name) for name in private(reader, self._source(reader), f"{_STREAMS}/")}
        found = [f"{key}: tracked now, not in the checkpoint" for key in self._streams.keys() - saved]
        found += [f"{key}: in the checkpoint, not tracked now" for key in saved - self._streams.keys()]
        parameters = dict(self._gradients.parameters())
        for name in self._shared(reader):
            record = reader.manifest.structure.tensors[name]
            mine = parameters.get(name)
            if mine is None or tuple(mine.shape) != record.shape:
                found.append(f"{name}: in the checkpoint, and no parameter of this shape in what is tracked")
        for name in self._thawed(reader):
            found.append(
                f"{name}: frozen now, trained in the checkpoint, and DistributedDataParallel leaves out what was "
                "frozen when it wrapped it: set requires_grad before"
            )
        return found

    def targets(self, reader: CheckpointReader) -> dict[str, Target]:
        """Tensors to read gradients into that are spread over ranks, by name."""
        parameters = dict(self._gradients.parameters())
        found = {}
        for name in self._shared(reader):
            dtype = dtypes.torch_dtype(reader.manifest.structure.tensors[name].dtype)
            found[name] = name, torch.empty_like(parameters[name], dtype=dtype, requires_grad=False)
        return found

    def restore(self, reader: CheckpointReader, shared: Mapping[str, torch.Tensor]) -> list[str]:
        """Put it back, but for generators; returns what to tell people.

        Parameters
        ----------
        reader
            Of the checkpoint.
        shared
            Gradients that were read into the :meth:`targets`, by name.

        Raises
        ------
        IntegrityError
            If something in it is damaged, or was lost with a rank.
        """
        self._gradients.reset()
        record = self._record(reader)
        if record is None:  # an older checkpoint, or one that was imported
            return []
        notes = self._freeze(set(record["frozen"]))
        own = self._own_gradients(reader)
        try:
            self._gradients.set({**own, **shared}, record["zeros"], self._rank)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise IntegrityError(f"{reader.folder}: no gradients: {error!s:.200}") from error
        count = len(own) + len(shared)
        if count:
            notes.append(f"gradients of {count} parameters that were still to be used were restored")
            if own and reader.manifest.world_size != self._world_size:
                notes[-1] += (
                    f"; they were summed up on {reader.manifest.world_size} ranks, and their mean over ranks was kept"
                )
        return notes

    def restore_streams(self, reader: CheckpointReader) -> list[str]:
        """Set this rank's generators to where they were; returns the keys of those that it can't tell that of.

        On as many ranks, each gets its own back. On another number, one that was at the same place on all ranks goes
        on from there.
        """
        if not self._streams:
            return []
        ranks = [self._rank] if self._same(reader) else self._some_ranks(reader)
        saved = [private(reader, rank, f"{_STREAMS}/") for rank in ranks]
        lost = []
        for key, stream in self._streams.items():
            states = [each[escape(key)] for each in saved if escape(key) in each]
            if len(states) < len(saved):
                raise IntegrityError(f"{reader.folder}: {key}: not all ranks have a state of this generator")
            if all(torch.equal(states[0], state) for state in states[1:]):
                streams.put(key, stream, states[0])
            else:
                lost.append(key)
        return lost

    def _some_ranks(self, reader: CheckpointReader) -> list[int]:
        """Ranks whose generators tell whether all were at the same place."""
        manifest = reader.manifest
        there = [rank for rank in range(manifest.world_size) if rank not in manifest.missing_ranks]
        return there[:: -(-len(there) // _LOOKED_AT)]

    def _same(self, reader: CheckpointReader) -> bool:
        """Whether this rank was there, on as many ranks as now."""
        manifest = reader.manifest
        return manifest.world_size == self._world_size and self._rank not in manifest.missing_ranks

    def _source(self, reader: CheckpointReader) -> int:
        """Rank to take from what all should have alike: this one, if it was there."""
        return self._rank if self._same(reader) else self._some_ranks(reader)[0]

    def _shared(self, reader: CheckpointReader) -> list[str]:
        return [name for name in reader.manifest.structure.tensors if name.startswith(f"{GRADIENTS}/")]

    def _record(self, reader: CheckpointReader) -> dict[str, list[str]] | None:
        saved = private(reader, self._source(reader), _RECORD).get("") if self._modules else None
        if saved is None:
            return None
        record: Any = objects.parse(saved.numpy().tobytes()) if saved.dtype == torch.uint8 else None
        for key in ("frozen", "zeros"):
            names = record.get(key) if isinstance(record, dict) else None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise IntegrityError(f"{reader.folder}: no record of parameters")
        assert isinstance(record, dict)
        return record

    def _thawed(self, reader: CheckpointReader) -> list[str]:
        """Parameters under DDP that were trained, and are frozen now."""
        record = self._record(reader)
        if record is None:
            return []
        wrapped = wrapped_by_ddp(self._modules.values())
        frozen = set(record["frozen"])
        return [
            name.removeprefix(f"{GRADIENTS}/")
            for name, parameter in self._gradients.parameters()
            if parameter in wrapped and not parameter.requires_grad and name not in frozen
        ]

    def _freeze(self, frozen: set[str]) -> list[str]:
        """Freeze and train the parameters that were; returns what to tell."""
        changed: dict[bool, list[str]] = {True: [], False: []}
        for name, parameter in self._gradients.parameters():
            trained = name not in frozen
            if parameter.requires_grad != trained:
                try:
                    parameter.requires_grad_(trained)
                except RuntimeError as error:
                    raise MismatchError(
                        f"{name}: requires_grad can't be set to {trained}: {error}"
                    ) from error
                changed[trained].append(name.removeprefix(f"{GRADIENTS}/"))
        words = {
            True: "are trained, as when the checkpoint was taken",
            False: "are frozen, as they were then",
        }
        return [f"{_few(names)} {words[trained]}" for trained, names in changed.items() if names]

    def _own_gradients(self, reader: CheckpointReader) -> dict[str, torch.Tensor]:
        """Gradients that were ranks' own, as this rank goes on with them."""
        manifest = reader.manifest
        if not private(reader, self._source(reader), f"{GRADIENTS}/"):
            return {}
        if manifest.missing_ranks:
            raise IntegrityError(
                f"{reader.folder}: was taken between two micro-batches, and the gradients of rank "
                f"{manifest.missing_ranks[0]}, which had died, are not in it"
            )
        parameters = dict(self._gradients.parameters())
        sharded = any(hasattr(parameter, "device_mesh") for parameter in parameters.values())
        same = manifest.world_size == self._world_size and not sharded
        ranks = [self._rank] if same else range(manifest.world_size)
        saved: list[Mapping[str, torch.Tensor]] = [
            {f"{GRADIENTS}/{name}": each for name, each in private(reader, rank, f"{GRADIENTS}/").items()}
            for rank in ranks
        ]
        if unknown := {name for each in saved for name in each} - parameters.keys():
            raise MismatchError(
                f"{reader.folder}: {min(unknown)}: a gradient of no parameter that is tracked"
            )
        return dict(saved[0]) if same else merged(saved, parameters, self._rank, self._world_size)


def private(reader: CheckpointReader, rank: int, under: str = "") -> dict[str, torch.Tensor]:
    """Read what a rank had for itself, by the rest of the name."""
    return reader.private(rank, f"{RANKS}/{rank:05d}/{under}")


def _few(names: list[str]) -> str:
    more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
    return ", ".join(names[:3]) + more
