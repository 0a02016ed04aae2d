"""Whether this node's GPUs can be used: by using them, and by what their driver says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_resume.provenance.finding import Finding

#: Device files of NVIDIA's and AMD's drivers.
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
_SIZE = 1024
#: Of an element of a product of two such matrices, which are of the order of 32: far above rounding (1e-4, with
#: TF32 0.1), far below garbage.
_TOLERANCE = 0.5
#: Of a GPU's memory that must be free before the ranks start: what is taken is another job's remains.
_LEAST_FREE = 0.5


def expected_gpus(environ: Mapping[str, str]) -> int:
    """Tell how many GPUs this node's part of the job was given."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdecimal():
        return int(given)
    return 0 if visible in {"", "-1", "NoDevFiles"} else len(visible.split(","))


def check_gpus(environ: Mapping[str, str]) -> list[Finding]:
    """Allocate memory on each GPU, multiply matrices, and compare with the processor's result."""
    expected = expected_gpus(environ)
    if not expected and not any(device.exists() for device in _DEVICES):
        return [Finding(what="GPUs", level="ok", detail="none were asked for")]
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there < expected or (there == 0 and expected == 0):
        build = torch.version.cuda or torch.version.hip or "the CPU only"
        return [
            Finding(
                what="GPUs",
                level="bad" if expected else "note",
                detail=f"torch (built for {build}) sees {there}; the job was given {expected}",
            )
        ]
    try:
        import pynvml
    except ImportError:
        pynvml = None
    found = []
    for number in range(there):
        free_bytes, total_bytes = torch.cuda.mem_get_info(number)
        found.append(
            judge_gpu(
                number,
                torch.cuda.get_device_name(number),
                free_bytes=free_bytes,
                total_bytes=total_bytes,
                error=worst_error(f"cuda:{number}", seed=number),
            )
        )
    return found if pynvml is None or torch.version.cuda is None else [*found, *check_driver(pynvml)]


def worst_error(device: str, *, seed: int) -> float:
    """Multiply two matrices on a device in float32; the largest difference from the float64 product."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    product = (left.to(device) @ right.to(device)).cpu()
    return float((product.double() - left.double() @ right.double()).abs().max())


def judge_gpu(number: int, name: str, *, free_bytes: int, total_bytes: int, error: float) -> Finding:
    """Say what one GPU's memory and arithmetic mean; ``error`` as :func:`worst_error` gives it."""
    what, free_gb = f"GPU {number}", free_bytes / 1e9
    if free_bytes < _LEAST_FREE * total_bytes:
        detail = f"only {free_gb:.1f} of {total_bytes / 1e9:.1f} GB are free: another process holds the rest"
        return Finding(what=what, level="bad", detail=detail)
    if not error < _TOLERANCE:  # a NaN is no number that is less
        return Finding(what=what, level="bad", detail=f"multiplies wrongly: an element is off by {error:g}")
    return Finding(what=what, level="ok", detail=f"{name}, {free_gb:.0f} GB free, multiplies right")


def check_driver(pynvml: Any) -> list[Finding]:
    """Ask NVIDIA's driver for memory errors; ``pynvml`` is the module of nvidia-ml-py.

    A row that waits to be remapped, or could not be, needs an administrator. An error that was corrected by
    another row since is past.

    Notes
    -----
    Source: NVML API Reference, nvmlDeviceGetRemappedRows and nvmlDeviceGetTotalEccErrors. Xid errors are told
    in the kernel's log only, which users can't read.
    """
    found = []
    pynvml.nvmlInit()
    try:
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            what = f"memory of GPU {number}"
            try:
                _, _, pending, failed = pynvml.nvmlDeviceGetRemappedRows(device)
                errors = pynvml.nvmlDeviceGetTotalEccErrors(
                    device, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
                )
            except pynvml.NVMLError as error:
                found.append(Finding(what=what, level="ok", detail=f"the driver does not say ({error})"))
                continue
            if pending or failed:
                state = "could not be remapped" if failed else "waits to be remapped (the GPU must be reset)"
                found.append(
                    Finding(what=what, level="bad", detail=f"a broken row {state}; tell the administrators")
                )
            else:
                found.append(
                    Finding(
                        what=what,
                        level="note" if errors else "ok",
                        detail=f"{errors} uncorrected errors since the last boot",
                    )
                )
    finally:
        pynvml.nvmlShutdown()
    return found
