"""There is no GPU here: the arithmetic is tried on the processor, and the driver is a stand-in."""

import pytest
import torch

from hpc_resume.run.gpus import check_driver, check_gpus, expected_gpus, judge_gpu, worst_error


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e,GPU-3d"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
    ],
)
def test_what_the_job_was_given(environ, count):
    assert expected_gpus(environ) == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_gpus_that_torch_does_not_see():
    (found,) = check_gpus({"SLURM_GPUS_ON_NODE": "2"})
    assert (found.level, found.detail.endswith("sees 0; the job was given 2")) == ("bad", True)
    (none,) = check_gpus({})
    assert none.level == "ok"


def judge(**given):
    return judge_gpu(1, "H100", **{"free_bytes": int(72e9), "total_bytes": int(80e9), "error": 1e-4, **given})


def test_a_processor_multiplies_right():
    error = worst_error("cpu", seed=0)
    assert 0 < error < 1e-3
    assert judge(error=error).detail == "H100, 72 GB free, multiplies right"


@pytest.mark.parametrize("error", [0.6, float("nan"), float("inf")])
def test_a_gpu_that_multiplies_wrongly(error):
    found = judge(error=error)
    assert (found.level, "multiplies wrongly" in found.detail) == ("bad", True)


def test_a_gpu_that_another_process_holds():
    found = judge(free_bytes=int(24e9))
    assert (found.level, found.detail) == (
        "bad",
        "only 24.0 of 80.0 GB are free: another process holds the rest",
    )


class Driver:
    """The functions of nvidia-ml-py that are called."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0

    class NVMLError(Exception):
        pass

    def __init__(self, *, rows=(0, 0, 0, 0), errors=0, knows=True):
        self.rows, self.errors, self.knows, self.open = rows, errors, knows, 0

    def nvmlInit(self):  # noqa: N802 - NVML's names
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, number):  # noqa: N802
        return number

    def nvmlDeviceGetRemappedRows(self, device):  # noqa: N802
        if not self.knows:
            raise self.NVMLError("Not Supported")
        return self.rows

    def nvmlDeviceGetTotalEccErrors(self, device, kind, counter):  # noqa: N802
        return self.errors


@pytest.mark.parametrize(
    ("driver", "level", "words"),
    [
        (Driver(), "ok", "0 uncorrected errors"),
        (Driver(errors=3), "note", "3 uncorrected errors"),
        (Driver(rows=(1, 0, 1, 0)), "bad", "waits to be remapped"),
        (Driver(rows=(1, 0, 0, 1)), "bad", "could not be remapped"),
        (Driver(knows=False), "ok", "does not say (Not Supported)"),
    ],
)
def test_what_the_driver_says_of_the_memory(driver, level, words):
    (found,) = check_driver(driver)
    assert (found.level, words in found.detail) == (level, True), found
    assert driver.open == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_real_gpus_are_fit():
    found = check_gpus({})
    assert found
    assert {each.level for each in found} <= {"ok", "note"}, found
