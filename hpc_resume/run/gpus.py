"""Whether this node's GPUs can be used: by using them, and by what their driver says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_resume.provenance.finding import Finding

#: Device files of NVIDIA's and AMD's drivers.
_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))
_SIZE = 1024
#: Of a product of two matrices of that size in float32, against float64: far above rounding, far below garbage.
_TOLERANCE = 0.1
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
    found = [check_gpu(torch, number) for number in range(there)]
    return found if pynvml is None or torch.version.cuda is None else [*found, *check_driver(pynvml)]


def check_gpu(torch: Any, number: int) -> Finding:
    """Use one GPU.

    Parameters
    ----------
    torch
        The module.
    number
        As torch counts.
    """
    what = f"GPU {number}"
    free_bytes, total_bytes = torch.cuda.mem_get_info(number)
    if free_bytes < _LEAST_FREE * total_bytes:
        detail = f"only {free_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB are free: another process holds the rest"
        return Finding(what=what, level="bad", detail=detail)
    generator = torch.Generator().manual_seed(number)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    product = (left.to(f"cuda:{number}") @ right.to(f"cuda:{number}")).cpu()
    error = float((product.double() - left.double() @ right.double()).abs().max())
    if not error < _TOLERANCE * _SIZE**0.5:  # a NaN is no number that is less
        return Finding(what=what, level="bad", detail=f"multiplies wrongly: an element is off by {error:g}")
    name = torch.cuda.get_device_name(number)
    return Finding(what=what, level="ok", detail=f"{name}, {free_bytes / 1e9:.0f} GB free, multiplies right")


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
