"""Where the private cluster's Slurm comes from.

The installed one, if ``slurmctld`` is on PATH. Otherwise Debian's or Ubuntu's packages are downloaded once and
unpacked, not installed, into the folder ``slurm`` of ``$HPC_RESUME_CACHE`` (``.cache`` of the checkout).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")
#: Where daemons are installed, though an ordinary user's PATH may lack it.
_SYSTEM_FOLDERS = ":/usr/sbin:/sbin"


class SlurmUnavailable(Exception):  # noqa: N818 - a state of the machine
    """No Slurm here, and none to be had; the message is one line that says why."""


def search_path(path: str) -> str:
    """Add the folders of daemons to a PATH."""
    return path + _SYSTEM_FOLDERS


def find_slurm() -> Path | None:
    """Return the folder that Slurm is unpacked in; ``None``: it is installed.

    Raises
    ------
    SlurmUnavailable
        If it is not installed and can't be downloaded.
    """
    if shutil.which("slurmctld", path=search_path(os.environ["PATH"])):
        return None
    cache = Path(os.environ.get("HPC_RESUME_CACHE") or Path(__file__).parents[2] / ".cache").absolute()
    prefix = cache / "slurm" / f"{_release()}-{platform.machine()}"
    if not prefix.is_dir():
        _fetch(prefix)
    return prefix


def _release() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
    return "unknown"


def _fetch(prefix: Path) -> None:
    """Download the packages and unpack them; the folder appears when it is complete."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise SlurmUnavailable("slurmctld is not on PATH, and without apt-get it can't be downloaded")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent) as name:
        work = Path(name)
        debs, root, lists = work / "debs", work / "root", work / "lists"
        for folder in (debs, root, lists / "partial", work / "archives/partial"):
            folder.mkdir(parents=True)
        # A cache of our own: apt leaves out of its plan what lies in the machine's.
        own_cache = ["-o", f"Dir::Cache={work}", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
        own_lists = [*own_cache, "-o", f"Dir::State::Lists={lists}"]
        try:
            _download(debs, own_cache)  # by the package lists of this machine
        except subprocess.SubprocessError:
            try:  # they are missing or stale: by new ones
                _apt(debs, [*own_lists, "update"])
                _download(debs, own_lists)
            except subprocess.SubprocessError as error:
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise SlurmUnavailable(
                    f"slurmctld is not on PATH and can't be downloaded: {said[-1]}"
                ) from error
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg", "-x", deb, root], check=True, timeout=60)
        for daemon in ("slurmctld", "slurmd", "slurmstepd"):  # links that installing would make
            link = root / "usr/sbin" / daemon
            if not link.exists():
                link.symlink_to(f"{daemon}-wlm")
        with contextlib.suppress(OSError):  # another process was faster: its copy is as good
            root.rename(prefix)


def _apt(folder: Path, words: list[str]) -> str:
    return subprocess.run(
        ["apt-get", *words], cwd=folder, check=True, timeout=180, capture_output=True, text=True
    ).stdout


def _download(folder: Path, options: list[str]) -> None:
    """Download Slurm and those of its dependencies that this machine lacks."""
    plan = _apt(folder, [*options, "install", "--print-uris", "--yes", "--no-install-recommends", *_PACKAGES])
    names = re.findall(r"^'\S+' ([^_\s]+)_", plan, re.MULTILINE)
    _apt(folder, [*options, "download", *names])


def plugin_folder(prefix: Path) -> Path:
    """Where the plugins of an unpacked Slurm lie."""
    return next(itertools.chain(prefix.glob("usr/lib/*/slurm-wlm"), prefix.glob("usr/lib/*/slurm")))


def library_folder(prefix: Path) -> Path:
    """Where the libraries of an unpacked Slurm lie."""
    return plugin_folder(prefix).parent
