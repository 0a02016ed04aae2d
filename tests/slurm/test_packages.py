"""Getting Slurm without installing it; what happens where it can't be had."""

import packages
import pytest
from packages import SlurmUnavailable, find_slurm


def test_without_slurm_it_says_why_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # neither slurmctld nor apt-get
    monkeypatch.setenv("HPC_RESUME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_SYSTEM_FOLDERS", "")
    with pytest.raises(SlurmUnavailable, match=r"^slurmctld is not on PATH, and without apt-get"):
        find_slurm()


def test_a_failed_download_says_why_in_one_line_and_leaves_no_half(monkeypatch, tmp_path):
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho 'W: first'>&2\necho 'E: no network' >&2\nexit 100\n")
    (tmp_path / "dpkg").write_text("#!/bin/sh\n")
    for name in ("apt-get", "dpkg"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("HPC_RESUME_CACHE", str(tmp_path / "cache with space"))
    monkeypatch.setattr(packages, "_SYSTEM_FOLDERS", "")
    with pytest.raises(
        SlurmUnavailable, match=r"^slurmctld is not on PATH and can't be downloaded: E: no network$"
    ):
        find_slurm()
    assert list((tmp_path / "cache with space/slurm").iterdir()) == []
