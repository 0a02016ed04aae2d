import errno
import os
import time
from pathlib import Path

import pytest

from hpc_resume.files import Filesystem
from hpc_resume.provenance.filesystem import (
    Mount,
    check_calls,
    check_space,
    check_writing,
    existing,
    mount_of,
)
from hpc_resume.provenance.finding import Finding, patiently

MOUNTS = (
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    "23 22 0:5 / /scratch rw - lustre 10.0.0.1@o2ib:/scratch rw\n"
    "24 22 0:6 / /scratch/my\\040place rw master:1 - nfs4 server:/x rw\n"
)


class Broken(Filesystem):
    """Refuses one call."""

    def __init__(self, name, number=errno.EIO):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        setattr(self, name, refuse)


def levels(findings):
    return {each.what: each.level for each in findings}


@pytest.mark.parametrize(
    ("path", "mount", "shared"),
    [
        ("/home/eve", Mount(point="/", kind="ext4"), False),
        ("/scratch/eve", Mount(point="/scratch", kind="lustre"), True),
        ("/scratch/my place/a", Mount(point="/scratch/my place", kind="nfs4"), True),
        ("/scratch2", Mount(point="/", kind="ext4"), False),
    ],
)
def test_the_mount_that_is_nearest(path, mount, shared):
    found = mount_of(Path(path), mountinfo=MOUNTS)
    assert (found, found.shared) == (mount, shared)
    assert Mount(point="/", kind="fuse.something").shared is None


def test_the_kernels_own_list_is_read():
    assert mount_of(Path("/proc/self")).kind == "proc"


def test_a_good_folder_is_left_as_it_was(tmp_path):
    found = [*check_writing(tmp_path), *check_calls(tmp_path), *check_space(tmp_path, need_bytes=1)]
    assert {each.what for each in found} == {
        "writing", "clock", "hard links", "locks", "O_DIRECT", "free space", "free inodes",
    }  # fmt: skip
    assert "bad" not in levels(found).values()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename"])
def test_a_folder_that_can_not_be_written(tmp_path, call):
    (found,) = check_writing(tmp_path, fs=Broken(call))
    assert (found.what, found.level) == ("writing", "bad")
    assert "Input/output error" in found.detail
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_that_loses_bytes(tmp_path):
    class Forgetful(Filesystem):
        def write_file(self, path, data):
            super().write_file(path, bytes(len(data)))

    (found,) = check_writing(tmp_path, fs=Forgetful())
    assert found.level == "bad"
    assert "other bytes" in found.detail


def test_a_filesystem_without_hard_links(tmp_path):
    found = check_calls(tmp_path, fs=Broken("link", errno.EPERM))
    assert levels(found)["hard links"] == "bad"


@pytest.mark.parametrize(("off_s", "level"), [(0, "ok"), (30, "note"), (-30, "note"), (3600, "bad")])
def test_a_clock_that_is_off(tmp_path, off_s, level):
    found = check_writing(tmp_path, clock=lambda: time.time() + off_s)
    assert levels(found)["clock"] == level


def test_too_little_space(tmp_path):
    assert levels(check_space(tmp_path, need_bytes=1 << 62))["free space"] == "bad"


def test_the_folder_that_is_there(tmp_path):
    assert existing(tmp_path / "a/b/c") == tmp_path


def test_what_hangs_or_fails_is_a_finding_too():
    def hang():
        time.sleep(60)

    def fail():
        raise RuntimeError("CUDA error")

    fine = Finding(what="x", level="ok", detail="y")
    assert patiently("a", lambda: [fine], patience_s=10, hint="h") == [fine]
    (hung,) = patiently("a", hang, patience_s=0.01, hint="a GPU hangs")
    assert (hung.level, hung.detail) == ("bad", "no answer within 0.01 s: a GPU hangs")
    (failed,) = patiently("a", fail, patience_s=10, hint="h")
    assert (failed.level, failed.detail) == ("bad", "RuntimeError: CUDA error")
