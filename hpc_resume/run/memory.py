"""How often the kernel has killed for want of memory: the one fact that tells such a death from any other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import JsonObject

#: A cgroup of a whole Slurm job. Source: Slurm's cgroup plugins (v1: .../job_N/step_M, v2: .../job_N/step_M/user).
_JOB = re.compile(r"job_\d+")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OomKills:
    """Counts at one moment.

    Parameters
    ----------
    boot
        Identity of the node's boot: counts of different ones can't be compared.
    node
        Of all processes of the node.
    job
        Of the job's own, where control groups count them.
    """

    boot: str
    node: int
    job: int | None

    @classmethod
    def read(cls, root: Path = Path("/")) -> OomKills:
        """Read this node's counts; what can't be read counts as none.

        Source: proc(5), /proc/vmstat; kernel documentation, cgroup-v2, memory.events; cgroup-v1,
        memory.oom_control.
        """
        boot = _text(root / "proc/sys/kernel/random/boot_id").strip()
        return cls(boot=boot, node=_count(root / "proc/vmstat") or 0, job=_count_of_job(root))

    @classmethod
    def from_json(cls, record: JsonObject) -> OomKills | None:
        """Read :meth:`to_json`; ``None`` if it is something else."""
        boot, node, job = (record.get(key) for key in ("boot", "node", "job"))
        if not isinstance(boot, str) or not isinstance(node, int) or not isinstance(job, int | None):
            return None
        return cls(boot=boot, node=node, job=job)

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {"boot": self.boot, "node": self.node, "job": self.job}

    def since(self, earlier: OomKills) -> int | None:
        """How many processes were killed on the node since an earlier count; ``None`` if that can't be told."""
        return self.node - earlier.node if self.boot and self.boot == earlier.boot else None

    def evidence_since(self, earlier: OomKills) -> str | None:
        """Tell of kills of the job's own processes, or where its own are not counted, of the node's."""
        if self.job is not None and earlier.job is not None:
            return _words(self.job - earlier.job, "of this job")
        return _words(self.since(earlier) or 0, "on this node")


def _words(kills: int, whose: str) -> str | None:
    if kills <= 0:
        return None
    return (
        f"the kernel killed {kills} process{'' if kills == 1 else 'es'} {whose} for want of memory meanwhile"
    )


def _count_of_job(root: Path) -> int | None:
    """Count in the job's control group: version 2 counts what its descendants do, too."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" or controllers:
            continue
        folder = root / "sys/fs/cgroup" / path.lstrip("/")
        for each in (folder, *folder.parents):
            if _JOB.fullmatch(each.name):
                return _count(each / "memory.events")
    return None


def _count(path: Path) -> int | None:
    match = _COUNT.search(_text(path))
    return None if match is None else int(match[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
