import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.provenance.environment import (
    describe_environment,
    environment_digest,
    essentials,
    nvidia_version,
)
from hpc_resume.provenance.packages import imported_packages, installed_packages, normalized


def test_every_installed_package_is_found_with_its_version():
    expected = {normalized(each.name): each.version for each in metadata.distributions() if each.name}
    found = installed_packages().versions
    assert found == expected


def test_it_takes_no_time_and_loads_nothing():
    code = (
        "import sys, time\n"
        "from hpc_resume.provenance.environment import describe_environment\n"
        "describe_environment()\n"
        "print([m for m in ('torch', 'numpy', 'subprocess') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
    best = min(_seconds() for _ in range(5))
    assert best < 0.25


def _seconds():
    began = time.perf_counter()
    describe_environment()
    return time.perf_counter() - began


def test_packages_that_are_installed_in_place_are_known():
    assert installed_packages().editable["hpc-resume"] == str(Path(__file__).parents[2])


def test_what_comes_first_on_the_path_counts(tmp_path):
    for place, version in (("a", "2.0"), ("b", "1.0")):
        (tmp_path / place / f"Some_Thing-{version}.dist-info").mkdir(parents=True)
    (tmp_path / "b" / "old-0.1-py3.10.egg-info").touch()
    (tmp_path / "b" / "broken.dist-info").touch()
    found = installed_packages([str(tmp_path / "nowhere"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.versions == {"old": "0.1", "some-thing": "2.0"}


def test_which_packages_are_imported():
    import yaml

    assert yaml
    assert imported_packages({"pyyaml", "pytest", "no-such-package"}) == {"pyyaml", "pytest"}


@given(
    st.sampled_from(["CUDA_", "NCCL_", "SLURM_", "TORCH_", "OMP_"]),
    st.sampled_from(["API_KEY", "TOKEN", "Secret", "PASSWORD", "AUTH"]),
)
def test_secrets_are_never_read(prefix, word):
    described = describe_environment({f"{prefix}{word}": "hunter2", "WANDB_API_KEY": "hunter2"})
    assert "hunter2" not in json.dumps(described)


def test_what_a_job_says_of_itself():
    described = describe_environment(
        {
            "LOADEDMODULES": "gcc/13:cuda/12.4",
            "APPTAINER_CONTAINER": "/images/torch.sif",
            "SLURM_JOB_ID": "7",
            "SLURM_SOMETHING_ELSE": "x",
            "OMP_NUM_THREADS": "4",
            "HOME": "/home/eve",
            "NCCL_DEBUG": "y" * 10_000,
        }
    )
    assert described["modules"] == ["gcc/13", "cuda/12.4"]
    assert described["container"] == "/images/torch.sif"
    assert described["slurm"] == {"SLURM_JOB_ID": "7"}
    assert described["variables"]["OMP_NUM_THREADS"] == "4"
    assert len(described["variables"]["NCCL_DEBUG"]) == 4096
    assert "HOME" not in described["variables"]
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["hostname"]


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
            "535.129.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (x)",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86  Release Build", "570.86"),
        ("", None),
        ("something else 1.2.3", None),
    ],
)
def test_the_version_of_the_driver(line, version):
    assert nvidia_version(line) == version


def test_pytorch_is_described_if_it_is_loaded():
    import torch

    described = describe_environment()
    assert described["torch"]["version"] == str(torch.__version__)
    assert described["torch"]["git"] == torch.version.git_version
    assert described["precision"]["matmul"] == torch.get_float32_matmul_precision()


def test_checkpoints_say_the_essentials_and_which_record_has_the_rest():
    described = describe_environment()
    short = essentials(described)
    assert short["python"] == described["python"]
    assert set(short["packages"]) <= {"hpc-resume", "torch", "numpy", "h5py", "submitit"}
    assert len(json.dumps(short)) < 1000
    assert short["digest"] == environment_digest(described)
    assert environment_digest({**described, "hostname": "other", "slurm": {"a": "b"}}) == short["digest"]
    assert environment_digest({**described, "python": "2.7"}) != short["digest"]
