"""What software and hardware a process runs on, as far as it can be told without asking anybody."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from hpc_resume.files import JsonObject

_PACKAGES = ("hpc_resume", "torch", "numpy", "h5py", "submitit")


def describe_environment() -> JsonObject:
    """Describe this process's environment.

    Returns
    -------
    dict
        Python, operating system, versions of packages, and the GPU if PyTorch is loaded and sees one.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: JsonObject = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": versions,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def gpu_peak_bytes() -> int:
    """Most that PyTorch has had allocated for this process on any one GPU; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max((torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())), default=0)
