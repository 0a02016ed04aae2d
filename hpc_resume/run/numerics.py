"""How PyTorch computes in this process: what changes results without being anybody's state.

Settings that decide the precision are set as they were when the checkpoint was taken, unless the run allows another
one. Those that only choose between algorithms are the script's own business: a difference is told. Together with
versions and hardware they are what the bits of a result depend on besides the state.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc_resume.errors import UsageError
from hpc_resume.files import JsonObject

#: Workspaces of cuBLAS with which it computes alike in each run. Source: NVIDIA, cuBLAS, "Results Reproducibility".
_WORKSPACES = (":4096:8", ":16:8")
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: Where PyTorch 2.9 and later say how they multiply float32: "ieee", "tf32", "bf16", or "none" (as the level above).
_FP32 = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """One setting of PyTorch.

    Parameters
    ----------
    name
        In manifests and messages.
    get, put
        Read it, and set it.
    values
        What it may be.
    decides
        Whether it decides the precision.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any]
    values: tuple[Any, ...]
    decides: bool = False


def _put(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


def _backend(path: str) -> Any:
    found: Any = torch.backends
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _fp32(path: str) -> _Setting:
    return _Setting(
        name=f"{path}.fp32_precision",
        get=lambda: _backend(path).fp32_precision,
        put=lambda value: setattr(_backend(path), "fp32_precision", value),
        values=("none", "ieee", "tf32", "bf16"),
        decides=True,
    )


_FLAGS = (False, True)
_MATMUL = torch.backends.cuda.matmul
_SETTINGS = (
    _Setting(
        name="default_dtype",
        get=lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        put=lambda value: torch.set_default_dtype(_DTYPES[value]),
        values=tuple(_DTYPES),
        decides=True,
    ),
    _Setting(
        name="float32_matmul_precision",
        get=torch.get_float32_matmul_precision,
        put=torch.set_float32_matmul_precision,
        values=("highest", "high", "medium"),
        decides=True,
    ),
    _Setting(
        name="cudnn.allow_tf32",
        get=lambda: torch.backends.cudnn.allow_tf32,
        put=_put(torch.backends.cudnn, "allow_tf32"),
        values=_FLAGS,
        decides=True,
    ),
    # After those two, which set most of them: only what a script has set itself is still to be set.
    *map(_fp32, _FP32),
    *(
        _Setting(
            name=f"cuda.matmul.{name}",
            get=lambda name=name: getattr(_MATMUL, name),  # type: ignore[misc]
            put=_put(_MATMUL, name),
            values=_FLAGS,
            decides=True,
        )
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    ),
    _Setting(
        name="deterministic_algorithms",
        get=torch.are_deterministic_algorithms_enabled,
        put=torch.use_deterministic_algorithms,
        values=_FLAGS,
    ),
    *(
        _Setting(
            name=f"cudnn.{name}",
            get=lambda name=name: getattr(torch.backends.cudnn, name),  # type: ignore[misc]
            put=_put(torch.backends.cudnn, name),
            values=_FLAGS,
        )
        for name in ("benchmark", "deterministic")
    ),
    *(
        _Setting(
            name=f"{name}_attention",
            get=lambda name=name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")(),  # type: ignore[misc]
            put=lambda value, name=name: getattr(torch.backends.cuda, f"enable_{name}_sdp")(value),  # type: ignore[misc]
            values=_FLAGS,
        )
        for name in ("flash", "mem_efficient", "math", "cudnn")
    ),
)
_THREADS = "cpu_threads"
#: What parameters are in, by the names that tolerances have.
_PRECISIONS = {
    torch.float64: "fp64",
    torch.complex128: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.complex64: "fp32",
}


def current() -> JsonObject:
    """Give the settings of this process, for a manifest."""
    found: JsonObject = {_THREADS: torch.get_num_threads()}
    for setting in _SETTINGS:
        value = _value(setting)
        if value is not None:
            found[setting.name] = value
    return found


def surroundings() -> JsonObject:
    """Give all that the bits of a result depend on besides the state: settings, versions and hardware."""
    found: JsonObject = {
        **current(),
        "torch": str(torch.__version__),
        "cpu": _cpu(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return found


def autotuned() -> bool:
    """Whether cuDNN chooses its algorithms by their speed: each process anew, so it may round in another way."""
    return torch.cuda.is_available() and torch.backends.cudnn.benchmark


def precisions_of(modules: Iterable[torch.nn.Module]) -> list[str]:
    """Name the precisions that parameters are in; fp32 on a GPU that rounds it to TF32 is that."""
    kinds = {parameter.dtype for module in modules for parameter in module.parameters()}
    found = {_PRECISIONS.get(kind, "bf16") for kind in kinds if kind.is_floating_point or kind.is_complex}
    if "fp32" in found and torch.cuda.is_available() and _tf32():
        found.add("tf32")
    return sorted(found)


def _tf32() -> bool:
    with contextlib.suppress(RuntimeError):  # settings of the old and of the new kind are mixed
        return torch.get_float32_matmul_precision() != "highest" or torch.backends.cudnn.allow_tf32
    return True


@functools.cache
def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return ""


def _value(setting: _Setting) -> Any:
    """Read a setting; None where PyTorch has none, or where a mix of its old and new names keeps it from telling."""
    try:
        value = setting.get()
    except (AttributeError, RuntimeError):
        return None
    return value if value in setting.values else None


def go_on(saved: Any, *, allowed: bool) -> Iterator[tuple[str, str]]:
    """Compute as when a checkpoint was taken, and tell what is other.

    Parameters
    ----------
    saved
        What :func:`current` gave then, as a manifest has it.
    allowed
        Whether the run may go on in another precision.

    Yields
    ------
    (str, str)
        An event for the journal, and what to say.
    """
    if not isinstance(saved, Mapping):
        return
    restored, differing = [], []
    for setting in _SETTINGS:
        was, now = saved.get(setting.name), _value(setting)
        if now is None or was is None or was == now or was not in setting.values:
            continue
        if setting.decides and not allowed:
            setting.put(was)
            restored.append(f"{setting.name} is {was} again (it was set to {now})")
        else:
            differing.append(f"{setting.name} was {was}, is {now}")
    threads = saved.get(_THREADS)
    now = torch.get_num_threads()
    if type(threads) is int and threads != now:
        # Sums on a CPU depend on how they are cut into threads' parts.
        if torch.are_deterministic_algorithms_enabled() and 0 < threads <= (os.cpu_count() or 1):
            torch.set_num_threads(threads)
            restored.append(f"{_THREADS} is {threads} again (it was {now})")
        else:
            differing.append(f"{_THREADS} was {threads}, is {now}")
    if restored:
        why = "; to change it: allow_precision_change: true"
        yield "numerics_restored", f"computing as when the checkpoint was taken: {'; '.join(restored)}{why}"
    if differing:
        yield (
            "numerics_changed",
            f"computing otherwise than when the checkpoint was taken: {'; '.join(differing)}",
        )


def deterministic() -> str:
    """Have PyTorch compute the same in each run on the same kind of node; returns what it costs, in words.

    Raises
    ------
    UsageError
        If it is too late: something has been computed on the GPU already.
    """
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if workspace not in _WORKSPACES:
        if workspace is not None:
            raise UsageError(
                f"run.deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace!r}, with which cuBLAS may sum in another "
                f"order each time; unset it, or set it to {_WORKSPACES[0]}"
            )
        if torch.cuda.is_available() and torch.cuda.memory_reserved() > 0:
            raise UsageError(
                "run.deterministic: there are tensors on the GPU already, and cuBLAS may have chosen how it sums; call "
                "it first of all inside 'with hr.Run() as run:', or set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the job"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return (
        "deterministic: same bits from the same state on as many ranks of the same kind of node. It costs speed where "
        "PyTorch has a faster kernel that sums in any order (convolutions, scatter, index_add, attention), new memory "
        "is filled before it is used, cuBLAS keeps 24 MiB more a stream, DDP on three ranks or more sums parameter by "
        "parameter, and an operation that has no deterministic kernel is an error that names it"
    )
