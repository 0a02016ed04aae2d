"""What software and hardware a process runs on, as far as it can be told without asking anybody.

No command is run, nothing that is not imported is imported, and no variable is read whose name may be a secret's.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_resume.files import JsonObject
from hpc_resume.provenance.packages import installed_packages

#: What checkpoints say of packages; an attempt's record lists all.
_ESSENTIAL = ("hpc-resume", "torch", "numpy", "h5py", "submitit")
#: Source: sbatch(1), srun(1), output environment variables.
_SLURM = tuple(
    f"SLURM_{name}"
    for name in [
        "ARRAY_JOB_ID",
        "ARRAY_TASK_ID",
        "CLUSTER_NAME",
        "CPUS_ON_NODE",
        "CPUS_PER_TASK",
        "CPU_BIND",
        "GPUS_ON_NODE",
        "GPUS_PER_NODE",
        "JOB_ACCOUNT",
        "JOB_CONSTRAINTS",
        "JOB_GPUS",
        "JOB_ID",
        "JOB_NAME",
        "JOB_NODELIST",
        "JOB_NUM_NODES",
        "JOB_PARTITION",
        "JOB_QOS",
        "MEM_PER_CPU",
        "MEM_PER_GPU",
        "MEM_PER_NODE",
        "NTASKS",
        "NTASKS_PER_NODE",
        "RESTART_COUNT",
        "SUBMIT_DIR",
        "SUBMIT_HOST",
        "TASKS_PER_NODE",
        "THREADS_PER_CORE",
    ]
)
#: Variables that change what is computed, or how fast.
_PREFIXES = (
    "CUBLAS_",
    "CUDA_",
    "CUDNN_",
    "FI_",
    "GLOO_",
    "HIP_",
    "HSA_",
    "KMP_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "OPENBLAS_",
    "PYTORCH_",
    "RCCL_",
    "ROCR_",
    "TORCHINDUCTOR_",
    "TORCH_",
    "TRITON_",
    "UCX_",
)
_NAMES = frozenset(
    [
        "CONDA_DEFAULT_ENV",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "NVIDIA_TF32_OVERRIDE",
        "PYTHONHASHSEED",
        "PYTHONPATH",
        "VIRTUAL_ENV",
    ]
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|COOKIE|AUTH", re.IGNORECASE)
_LONGEST_VALUE = 4096
#: What is another one at every attempt, so that no digest of it would ever be the same.
_OF_THE_MOMENT = ("hostname", "slurm", "variables", "memory_bytes")


def describe_environment(environ: Mapping[str, str] | None = None) -> JsonObject:
    """Describe this process's environment.

    Parameters
    ----------
    environ
        Its variables.

    Returns
    -------
    dict
        Python, operating system, all packages with their versions, PyTorch's build and the GPUs if it is loaded,
        the driver, modules, container, host, what Slurm says of the job, and variables that matter.
    """
    environ = os.environ if environ is None else environ
    packages = installed_packages()
    found: JsonObject = {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": _distribution(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "hostname": platform.node(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "packages": packages.versions,
        "editable": packages.editable,
        "driver": _driver(),
        "modules": [name for name in environ.get("LOADEDMODULES", "").split(":") if name],
        "container": _container(environ),
        "slurm": {name: environ[name] for name in _SLURM if name in environ},
        "variables": _variables(environ),
        **_torch(),
    }
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}


def essentials(described: JsonObject) -> JsonObject:
    """Give what checkpoints say of an environment: what a reader asks first, and the digest of the rest.

    Parameters
    ----------
    described
        See :func:`describe_environment`.
    """
    versions = described.get("packages", {})
    keys = ("python", "system", "cpus", "gpu", "gpus", "cuda", "driver", "container")
    torch = described.get("torch", {})
    found = {key: described[key] for key in keys if key in described}
    found |= {key: torch[key] for key in ("cuda", "hip") if torch.get(key)}
    found["packages"] = {name: versions[name] for name in _ESSENTIAL if name in versions}
    found["digest"] = environment_digest(described)
    return found


def environment_digest(described: JsonObject) -> str:
    """First 16 hex digits of the SHA-256 of what stays the same in all attempts of one environment on one node type."""
    lasting = {key: value for key, value in described.items() if key not in _OF_THE_MOMENT}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()[:16]


def nvidia_version(line: str) -> str | None:
    """Read the first line of ``/proc/driver/nvidia/version``."""
    match = re.search(r"Kernel Module\D*(?:x86_64|aarch64)?\s+(\d+(?:\.\d+)+)", line)
    return None if match is None else match[1]


def gpu_peak_bytes() -> int:
    """Most that PyTorch has had allocated for this process on any one GPU; 0 without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return max((torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count())), default=0)


def _torch() -> JsonObject:
    """Describe PyTorch and its GPUs, if it is loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {}
    build = {
        "version": str(torch.__version__),
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    found: JsonObject = {
        "torch": build,
        "precision": {
            "matmul": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
    }
    if torch.cuda.is_available():
        build["cudnn"] = torch.backends.cudnn.version()
        build["nccl"] = _nccl(torch)
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    found["torch"] = {key: value for key, value in build.items() if value is not None}
    return found


def _nccl(torch: Any) -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError, TypeError):
        return None


def _variables(environ: Mapping[str, str]) -> JsonObject:
    return {
        name: value[:_LONGEST_VALUE]
        for name, value in sorted(environ.items())
        if (name.startswith(_PREFIXES) or name in _NAMES) and not _SECRET.search(name)
    }


def _container(environ: Mapping[str, str]) -> str | None:
    """Name the container's image, if this is one. Source: what Apptainer, Singularity and enroot set in it."""
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_CONTAINER", "ENROOT_ROOTFS"):
        if environ.get(name):
            return environ[name]
    for mark in ("/run/.containerenv", "/.dockerenv"):
        if Path(mark).exists():
            return "without a name"
    return None


def _driver() -> str | None:
    """Version of the GPUs' kernel driver."""
    if (version := nvidia_version(_first_line("/proc/driver/nvidia/version"))) is not None:
        return f"nvidia {version}"
    amd = _first_line("/sys/module/amdgpu/version")
    return f"amdgpu {amd}" if amd else None


def _cpu_model() -> str | None:
    try:
        with Path("/proc/cpuinfo").open(errors="replace") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None
            )
    except OSError:
        return None


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _first_line(path: str) -> str:
    try:
        with Path(path).open(errors="replace") as lines:
            return lines.readline().strip()
    except OSError:
        return ""
