"""A checkpoint that is open for reading, outside of a run: names, tensors, parts of tensors, whole states."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from hpc_resume.checkpoint import dtypes, objects
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.into import Loaded, load_into
from hpc_resume.checkpoint.manifest import FULL, MANIFEST, Manifest, read_manifest
from hpc_resume.checkpoint.reader import CheckpointReader, Wanted, tensor_like
from hpc_resume.checkpoint.saved import any_leaf
from hpc_resume.checkpoint.store import all_newest_first, newest_first
from hpc_resume.checkpoint.structure import TensorRecord
from hpc_resume.errors import CheckpointNotFound, IntegrityError, MismatchError, TensorNotFound, UsageError
from hpc_resume.rundir import RunDirectory, checkpoint_step, is_checkpoint_name


class Checkpoint:
    """A committed checkpoint, opened without loading it.

    Only the bytes that are asked for are read, and each is verified before it is handed out.

    Parameters
    ----------
    path
        A run's folder, or the folder of one checkpoint in it.
    step
        Which checkpoint of the run; by default the newest one that holds everything that was tracked, and
        nothing in it that a run could not go on from (NaN).
    threads
        That read.

    Raises
    ------
    CheckpointNotFound
        If there is none.
    IntegrityError
        If its manifest is damaged.

    Examples
    --------
    >>> import hpc_resume as hr
    >>> with hr.Checkpoint("runs/gpt") as ckpt:  # doctest: +SKIP
    ...     ckpt.names("model/*.weight")
    ...     table = ckpt["model/embed.weight"]
    ...     rows = ckpt.read("model/embed.weight", slice(0, 10))
    ...     ckpt.load_into(model)
    """

    def __init__(self, path: str | Path, *, step: int | None = None, threads: int = 2) -> None:
        folder, manifest = _find(Path(path), step)
        #: Reads the bytes; ``reader.bytes_read`` counts them.
        self.reader = CheckpointReader(folder, manifest, threads=threads)
        self._stored = _stored_names(folder, manifest)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.reader.__exit__()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: step {self.step}, {len(self)} tensors>"

    @property
    def path(self) -> Path:
        """Folder of the checkpoint."""
        return self.reader.folder

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint is."""
        return self.reader.manifest

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.manifest.step

    @property
    def keys(self) -> tuple[str, ...]:
        """What was tracked: ``("model", "optimizer")``."""
        return tuple(self.manifest.objects)

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def names(self, pattern: str = "*") -> list[str]:
        """Names of tensors, sorted: the tracked key, then the path in its state (``model/up.weight``).

        Parameters
        ----------
        pattern
            As in a shell: ``model/*``.
        """
        return [name for name in self._stored if fnmatchcase(name, pattern)]

    def record(self, name: str) -> TensorRecord:
        """Shape and element type of a tensor.

        Raises
        ------
        TensorNotFound
            If there is none of this name.
        """
        return self.manifest.structure.tensors[self.stored_as(name)]

    def stored_as(self, name: str) -> str:
        """Name under which a tensor's bytes are stored: another one than its own if it is tied to that one.

        Raises
        ------
        TensorNotFound
            If there is none of this name.
        """
        if name not in self._stored:
            near = difflib.get_close_matches(name, self._stored, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "names() lists all"
            raise TensorNotFound(f"{self.path}: no tensor {name}; {hint}")
        return self._stored[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Load one tensor to the CPU."""
        return self.load_names([name])[name]

    def load(
        self,
        pattern: str = "*",
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, torch.Tensor]:
        """Load tensors.

        Parameters
        ----------
        pattern
            Of their names.
        dtype
            For floating-point tensors; integers, flags and complex numbers keep their own.
        device
            Where they go.

        Returns
        -------
        dict
            By name; tied tensors are one tensor.

        Raises
        ------
        TensorNotFound
            If no name fits.
        IntegrityError
            If bytes are damaged.
        """
        names = self.names(pattern)
        if not names:
            raise TensorNotFound(f"{self.path}: no tensor's name fits {pattern!r}; names() lists all")
        return self.load_names(names, dtype=dtype, device=device)

    def load_names(
        self,
        names: Iterable[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, torch.Tensor]:
        """Load tensors by their names; see :meth:`load`."""
        made: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        for name in names:
            stored = self.stored_as(name)
            if stored not in made:
                record = self.record(name)
                self.reader.check_size(stored)
                made[stored] = tensor_like(record, dtype=target_dtype(record, dtype), device=str(device))
            found[name] = made[stored]
        self.reader.read_all(Wanted(name, Box.whole(out.shape), out) for name, out in made.items())
        return found

    def read(
        self,
        name: str,
        part: Box | slice | int | Sequence[slice | int],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Load a part of a tensor.

        Parameters
        ----------
        name
            Of the tensor.
        part
            A box, or slices and indices as for a tensor: ``slice(0, 10)``, ``(slice(None), 3)``. No steps.
        dtype, device
            As in :meth:`load`.

        Raises
        ------
        TensorNotFound
            If there is none of this name.
        UsageError
            If it has no such part.
        """
        record = self.record(name)
        box, dropped = _box(name, part, record.shape)
        shaped = TensorRecord(box.size, record.dtype, None, ((0, Box.whole(box.size)),))
        out = tensor_like(shaped, dtype=target_dtype(record, dtype), device=str(device))
        self.reader.read(self.stored_as(name), box, out)
        return out[tuple(0 if dim in dropped else slice(None) for dim in range(out.ndim))]

    def state(self, key: str) -> Any:
        """Load the state of one tracked item as it was saved: nested, with tensors and everything else.

        State that differed from rank to rank is rank 0's.

        Raises
        ------
        MismatchError
            If nothing was tracked under this key.
        """
        node = self.node(key)
        loaded = self.load_names(objects.tensor_names(node))
        return objects.decode(node, lambda tag, name: any_leaf(tag, loaded[name]))

    def load_into(
        self,
        target: torch.nn.Module | Mapping[str, Any],
        *,
        key: str = "model",
        pattern: str = "*",
        strict: bool = True,
    ) -> Loaded:
        """Load into the tensors of a module or a state dict, in place; DTensors get their own part.

        No rank waits for another. Floating-point tensors are converted to what the target's are; any other
        difference of type, and every difference of shape, is an error.

        Parameters
        ----------
        target
            A module (also under DDP or FSDP2), or a nested state dict.
        key
            The tracked item to load from.
        pattern
            Of names within it (``encoder.*``): nothing else is looked at, neither here nor there.
        strict
            Whether missing and unexpected names are errors.

        Raises
        ------
        MismatchError
            If it does not fit; lists every difference, and nothing was changed.
        IntegrityError
            If bytes are damaged; the target is then partly overwritten.
        """
        return load_into(self, target, key=key, pattern=pattern, strict=strict)

    def node(self, key: str) -> Any:
        """Return the typed JSON of one tracked item; see :meth:`state`."""
        if key not in self.manifest.objects:
            raise MismatchError(
                f"{self.path}: nothing was tracked under {key!r}; there are: {', '.join(self.keys) or 'none'}"
            )
        return self.manifest.objects[key]


def target_dtype(record: TensorRecord, dtype: torch.dtype | str | None) -> torch.dtype:
    """Element type that a tensor is loaded as: the one asked for if it is a floating-point tensor."""
    own = dtypes.torch_dtype(record.dtype)
    if dtype is None or not own.is_floating_point:
        return own
    if isinstance(dtype, str):
        if dtype not in dtypes.ITEM_BYTES:
            near = difflib.get_close_matches(dtype, dtypes.ITEM_BYTES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(dtypes.ITEM_BYTES)}"
            raise UsageError(f"no element type {dtype!r}; {hint}")
        dtype = dtypes.torch_dtype(dtype)
    if not dtype.is_floating_point:
        raise UsageError(
            f"{dtype} is no floating-point type, so floating-point tensors can't be loaded as it"
        )
    return dtype


def _find(path: Path, step: int | None) -> tuple[Path, Manifest]:
    """Find the folder of a checkpoint."""
    resolved = path.resolve()
    if is_checkpoint_name(resolved.name) and (resolved / MANIFEST).exists():
        if step is not None and step != checkpoint_step(resolved.name):
            raise UsageError(
                f"{path}: is the checkpoint of step {checkpoint_step(resolved.name)}, not {step}"
            )
        return resolved, read_manifest(resolved)
    run = RunDirectory(resolved)
    if not run.checkpoints.is_dir():
        raise CheckpointNotFound(
            f"{path}: neither a run's folder nor a checkpoint's: there is no checkpoints/ in it"
        )
    there: list[str] = []
    damaged: IntegrityError | None = None
    for name, manifest in newest_first(run) if step is None else all_newest_first(run):
        if step is not None and checkpoint_step(name) != step:
            there.append(str(checkpoint_step(name)))
        elif isinstance(manifest, IntegrityError):
            damaged = damaged or manifest
        elif step is None and not manifest.resumable:
            why = f"only the {manifest.content}" if manifest.content != FULL else "not finite"
            there.append(f"{manifest.step} ({why})")
        elif damaged is not None:
            raise IntegrityError(
                f"{damaged}; the next older whole one is step {manifest.step}: ask for it with step={manifest.step}"
            )
        else:
            return run.checkpoints / name, manifest
    if damaged is not None:
        raise damaged
    wanted = "a full checkpoint" if step is None else f"a checkpoint of step {step}"
    raise CheckpointNotFound(
        f"{path}: there is no {wanted.removeprefix('a ')}; there are: {', '.join(there) or 'none'}"
    )


def _stored_names(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Every tensor's name, sorted, with the name under which it is stored."""
    if not isinstance(manifest.objects, dict):
        raise IntegrityError(f"{folder}: its non-tensor state is no mapping")
    names = objects.tensor_names(manifest.objects)
    for name, stored in names.items():
        if stored not in manifest.structure.tensors:
            raise IntegrityError(f"{folder}: {name} stands in the state but has no bytes")
    names.update({name: name for name in manifest.structure.tensors})
    return dict(sorted(names.items()))


def _box(
    name: str, part: Box | slice | int | Sequence[slice | int], shape: Sequence[int]
) -> tuple[Box, set[int]]:
    """Turn slices and indices into a box, and the dimensions that indices drop."""
    if isinstance(part, Box):
        if not part.within(shape):
            raise UsageError(f"{name}: {part} is not within its shape {list(shape)}")
        return part, set()
    given = [part] if isinstance(part, slice | int) else list(part)
    if len(given) > len(shape):
        raise UsageError(f"{name}: {len(given)} indices for a shape of {list(shape)}")
    given += [slice(None)] * (len(shape) - len(given))
    start, size, dropped = [], [], set()
    for dim, (index, extent) in enumerate(zip(given, shape, strict=True)):
        if isinstance(index, int):
            if not -extent <= index < extent:
                raise UsageError(f"{name}: index {index} in a dimension of {extent}")
            first, last = index % extent, index % extent + 1
            dropped.add(dim)
        else:
            first, last, step = index.indices(extent)
            if step != 1:
                raise UsageError(
                    f"{name}: a slice with a step of {step}; read it whole and take the step then"
                )
        start.append(first)
        size.append(max(last - first, 0))
    return Box(tuple(start), tuple(size)), dropped
