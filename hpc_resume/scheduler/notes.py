"""What the jobs of a run tell each other: small files in ``RUN_DIR/continuation``.

The batch script of each job (``templates/job.sbatch.j2``) reads and writes them, too, so each is one line of
text. ``NAME-ID`` says something of job ``ID``. Jobs that go on from each other are a *chain*, whose id is that
of the first one.

========== ======= ==============================================================================
note       of      what it says
========== ======= ==============================================================================
script     chain   what is submitted to go on
folder     chain   where it was submitted
latest     chain   the job that has begun last
over       chain   no job comes after this one, and why
from       chain   number of the first node type that is still asked for
vain       chain   how many jobs in a row have ended before their ranks had begun or restored
after      job     jobs that wait to go on from it
taken      job     a link: the job that has gone on from it
type       job     number of its node type, where it was changed in the queue
delay      job     what comes next begins no sooner than so many seconds after it
exclude    job     nodes that what comes next must not get
========== ======= ==============================================================================
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import DISK, Filesystem
from hpc_resume.untrusted import read_regular

#: Folder of the notes in a run directory.
NOTES = "continuation"
#: A longer note is none.
_LONGEST_BYTES = 1 << 16
_ID = re.compile(r"[0-9]+(_[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of one run.

    Parameters
    ----------
    root
        The run directory.
    fs
        The filesystem.
    """

    root: Path
    fs: Filesystem = DISK

    def path(self, name: str, job_id: str) -> Path:
        """Where a note is.

        Raises
        ------
        ValueError
            If that is no job id.
        """
        if _ID.fullmatch(job_id) is None:
            raise ValueError(f"{job_id!r} is no job id")
        return self.root / NOTES / f"{name}-{job_id}"

    def read(self, name: str, job_id: str) -> str:
        """Read a note; one that is not there is empty."""
        try:
            data = read_regular(self.path(name, job_id), longest_bytes=_LONGEST_BYTES)
        except (OSError, ValueError):
            return ""
        return data.decode(errors="replace").strip()

    def write(self, name: str, job_id: str, text: str) -> None:
        """Replace a note, all or nothing."""
        path = self.path(name, job_id)
        self.fs.make_dirs(path.parent)
        self.fs.write_file(path, f"{text}\n".encode())

    def claim(self, name: str, job_id: str) -> bool:
        """Make an empty note; of several processes that try, one is told ``True``."""
        path = self.path(name, job_id)
        self.fs.make_dirs(path.parent)
        try:
            self.fs.close(self.fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def drop(self, name: str, job_id: str) -> bool:
        """Remove a note; of several processes that try, one is told ``True``."""
        path = self.path(name, job_id)
        dropped = path.with_name(f".{path.name}.{os.getpid()}.dropped")
        try:
            path.rename(dropped)
        except FileNotFoundError:
            return False
        dropped.unlink()
        return True

    def age_s(self, name: str, job_id: str, now_s: float) -> float:
        """How long ago a note was written; 0 if it is not there."""
        try:
            return now_s - self.path(name, job_id).stat().st_mtime
        except OSError:
            return 0.0

    def after(self, job_id: str) -> list[str]:
        """Ids of the jobs that wait to go on from a job."""
        return [word for word in self.read("after", job_id).split() if _ID.fullmatch(word)]

    def latest(self, chain: str) -> str:
        """Id of the job of a chain that has begun last; the first one if none has."""
        latest = self.read("latest", chain)
        return latest if _ID.fullmatch(latest) else chain

    def first_type(self, chain: str) -> int:
        """Give the number of the first node type that a chain still asks for."""
        number = self.read("from", chain)
        return int(number) if number.isdecimal() else 0
