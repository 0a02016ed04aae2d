"""How often the kernel has killed for want of memory: the one fact that tells such a death from any other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.files import JsonObject

#: A cgroup of a whole Slurm job. Source: Slurm's cgroup plugin, version 2: .../job_N/step_M/user/task_R.
_JOB = re.compile(r"job_\d+")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class OomKills:
    """Counts at one moment, and what they count.

    Parameters
    ----------
    boot
        Identity of the node's boot: counts of different ones can't be compared.
    node
        Kills of all processes of the node.
    group, in_group
        File in which a control group of this process counts, and its count; ``None`` where there is none.
    """

    boot: str
    node: int
    group: str | None = None
    in_group: int | None = None

    @classmethod
    def read(cls, root: Path = Path("/")) -> OomKills:
        """Read the counts of this process's node and control group; what can't be read counts as none.

        Source: proc(5), /proc/vmstat; kernel documentation, cgroup-v2, memory.events; cgroup-v1,
        memory.oom_control.
        """
        group = _group(root)
        return cls(
            boot=_boot(root),
            node=_count(root / "proc/vmstat") or 0,
            group=None if group is None else str(group),
            in_group=None if group is None else _count(group),
        )

    @classmethod
    def from_json(cls, record: JsonObject) -> OomKills | None:
        """Read :meth:`to_json`; ``None`` if it is something else."""
        boot, node, group, in_group = (record.get(key) for key in ("boot", "node", "group", "in_group"))
        if not (isinstance(boot, str) and isinstance(node, int)):
            return None
        if not (isinstance(group, str | None) and isinstance(in_group, int | None)):
            return None
        return cls(boot=boot, node=node, group=group, in_group=in_group)

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {"boot": self.boot, "node": self.node, "group": self.group, "in_group": self.in_group}

    def since(self, root: Path = Path("/")) -> int | None:
        """Count again what was counted here; ``None`` if that can't be done on this node.

        Where the control group is still there, it alone counts: what is killed elsewhere on the node may be
        another job's.

        Returns
        -------
        int or None
            Kills since then.
        """
        if not self.boot or self.boot != _boot(root):
            return None
        if self.group is not None and self.in_group is not None:
            again = _count(Path(self.group))
            if again is not None:
                return again - self.in_group
        return (_count(root / "proc/vmstat") or 0) - self.node


def _boot(root: Path) -> str:
    return _text(root / "proc/sys/kernel/random/boot_id").strip()


def _group(root: Path) -> Path | None:
    """Find the file that counts for this process: of version 2 its job's, which counts what is below it, too."""
    for line in sorted(_text(root / "proc/self/cgroup").splitlines()):  # version 2, whose number is 0, first
        number, controllers, path = line.split(":", 2)
        where = path.lstrip("/")
        if number == "0" and not controllers:
            own = root / "sys/fs/cgroup" / where
            folder = next((each for each in (own, *own.parents) if _JOB.fullmatch(each.name)), own)
            file = folder / "memory.events"
        elif "memory" in controllers.split(","):
            file = root / "sys/fs/cgroup/memory" / where / "memory.oom_control"
        else:
            continue
        if _count(file) is not None:
            return file
    return None


def _count(path: Path) -> int | None:
    match = _COUNT.search(_text(path))
    return None if match is None else int(match[1])


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
