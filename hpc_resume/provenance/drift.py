"""How what an attempt runs on differs from what its checkpoint was taken on, and how much that matters.

Three grades. ``harmless``: the same numbers come out, as far as anybody knows. ``look``: they may differ, so a person
should know. ``stop``: the run is not continued unless a person says why it may be.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hpc_resume.files import JsonObject
from hpc_resume.provenance.listing import FileChanges, enumerated

Grade = Literal["harmless", "look", "stop"]
GRADES: tuple[Grade, ...] = ("stop", "look", "harmless")

_NUMBER = re.compile(r"\d+")
#: What is computed depends on it.
_LOOK = {
    "implementation": "Python",
    "gpu": "GPU",
    "cuda": "CUDA",
    "container": "container image",
    "cpu": "CPU",
}
#: What is another one at every attempt, or does not reach what is computed.
_HARMLESS = {
    "hostname": "host",
    "executable": "interpreter",
    "distribution": "operating system",
    "cpus": "CPUs of the node",
    "memory_bytes": "memory of the node",
    "gpus": "GPUs that are seen",
    "driver": "GPU driver",
    "libc": "C library",
}
#: Of PyTorch's build.
_OF_TORCH = {"git": "torch's commit", "cuda": "CUDA", "hip": "ROCm", "cudnn": "cuDNN", "nccl": "NCCL"}
_OF_PRECISION = {
    "matmul": "precision of float32 matmul",
    "cudnn_tf32": "TF32 in cuDNN",
    "deterministic": "deterministic algorithms",
}
#: Variables that change which numbers come out.
_TELLING = re.compile(r"TF32|DETERMINISTIC|WORKSPACE_CONFIG|HASHSEED|NCCL_(ALGO|PROTO)|LD_PRELOAD|CBWR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One thing that is not as it was.

    Parameters
    ----------
    what
        ``"torch"``.
    before, now
        As text; empty where there is none.
    grade
        How much it matters.
    """

    what: str
    before: str
    now: str
    grade: Grade

    def __str__(self) -> str:
        return f"{self.what}: {self.before or 'none'} → {self.now or 'none'}"

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {"what": self.what, "before": self.before, "now": self.now, "grade": self.grade}


def environment_drift(
    before: Mapping[str, Any], now: Mapping[str, Any], *, imported: Collection[str] = ()
) -> list[Drift]:
    """Compare two environments.

    Parameters
    ----------
    before, now
        Records of :func:`~hpc_resume.provenance.environment.describe_environment`; one may hold less, as that of a
        checkpoint does: what one of them does not say is not compared.
    imported
        Packages that the run imports; those of others are harmless.

    Returns
    -------
    list of Drift
        What matters most first.
    """
    found = [*_python(before, now), *_system(before, now)]
    for names, grade in ((_LOOK, "look"), (_HARMLESS, "harmless")):
        found += _fields(before, now, names, grade)  # type: ignore[arg-type] # the two grades above
    found += _packages(_mapping(before, "packages"), _mapping(now, "packages"), imported)
    told_cuda = any(each.what == "CUDA" for each in found)
    of_torch = _fields(_mapping(before, "torch"), _mapping(now, "torch"), _OF_TORCH, "look")
    found += [each for each in of_torch if not (each.what == "CUDA" and told_cuda)]
    found += _fields(_mapping(before, "precision"), _mapping(now, "precision"), _OF_PRECISION, "look")
    if "modules" in before and "modules" in now:
        found += _lists("module", before["modules"], now["modules"])
    if "hostname" in before and "hostname" in now:  # both are whole records
        if "torch" in before and "torch" in now and ("gpu" in before) != ("gpu" in now):
            mine, other = (str(each.get("gpu", "")) for each in (before, now))
            found.append(Drift(what="GPU", before=mine, now=other, grade="look"))
        found += _variables(_mapping(before, "variables"), _mapping(now, "variables"))
        found += _each("", _mapping(before, "slurm"), _mapping(now, "slurm"))
    return in_order(found)


def source_drift(
    before: Mapping[str, Any], now: Mapping[str, Any], changes: FileChanges | None = None
) -> list[Drift]:
    """Compare the sources of two attempts.

    Parameters
    ----------
    before, now
        Records of :func:`~hpc_resume.provenance.running.describe_source`.
    changes
        How their files differ, if that is known.
    """
    found = []
    mine, other = before.get("digest"), now.get("digest")
    if mine and other and mine != other:
        told = f"{other} ({changes.text()})" if changes else str(other)
        found.append(Drift(what="source", before=str(mine), now=told, grade="look"))
    for key, what in (("altered", "not what was kept"), ("live", "not from the snapshot")):
        if isinstance(files := now.get(key), list) and files:
            told = f"{what}: {enumerated(map(str, files))}"
            found.append(Drift(what="source", before=str(other), now=told, grade="look"))
    commits = [str(_mapping(each, "git").get("commit") or "") for each in (before, now)]
    if all(commits) and commits[0] != commits[1]:
        found.append(Drift(what="commit", before=commits[0][:12], now=commits[1][:12], grade="harmless"))
    return found


def in_order(found: Collection[Drift]) -> list[Drift]:
    """Put what matters most first."""
    return sorted(found, key=lambda each: GRADES.index(each.grade))


def changed_packages(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Name the packages whose version is another one, or that one of two environments lacks."""
    mine, other = _mapping(before, "packages"), _mapping(now, "packages")
    return {name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)}


def _python(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    mine, other = before.get("python"), now.get("python")
    if mine and other and mine != other:
        level = _level(str(mine), str(other))
        grade: Grade = "stop" if level == 0 else "look" if level == 1 else "harmless"
        yield Drift(what="Python", before=str(mine), now=str(other), grade=grade)


def _system(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    """Compare ``"Linux 5.14.0 x86_64"``: only the machine's kind matters."""
    mine, other = str(before.get("system") or ""), str(now.get("system") or "")
    if mine and other and mine != other:
        same = mine.rsplit(maxsplit=1)[-1] == other.rsplit(maxsplit=1)[-1]
        yield Drift(what="kernel", before=mine, now=other, grade="harmless" if same else "look")


def _packages(
    before: Mapping[str, Any], now: Mapping[str, Any], imported: Collection[str]
) -> Iterator[Drift]:
    whole = min(len(before), len(now)) > 8  # a checkpoint names a few
    for name in sorted(before.keys() | now.keys()):
        mine, other = before.get(name), now.get(name)
        if mine == other or not (whole or (mine and other)):
            continue
        grade: Grade = "look" if name in imported else "harmless"
        if name == "torch" and mine and other:
            level = _level(str(mine), str(other))
            grade = "stop" if level == 0 else "look"
        elif name in imported and mine and other and _level(str(mine), str(other)) >= 2 and name != "numpy":
            grade = "harmless"  # a patch
        yield Drift(what=name, before=str(mine or ""), now=str(other or ""), grade=grade)


def _variables(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    for each in _each("", before, now):
        grade: Grade = "look" if _TELLING.search(each.what) else "harmless"
        yield Drift(what=each.what, before=each.before, now=each.now, grade=grade)


def _fields(
    before: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str], grade: Grade
) -> list[Drift]:
    return [
        Drift(what=what, before=str(before[key]), now=str(now[key]), grade=grade)
        for key, what in names.items()
        if key in before and key in now and before[key] != now[key]
    ]


def _each(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Drift]:
    for name in sorted(before.keys() | now.keys()):
        mine, other = before.get(name), now.get(name)
        if mine != other:
            yield Drift(
                what=f"{prefix}{name}",
                before="" if mine is None else str(mine),
                now="" if other is None else str(other),
                grade="harmless",
            )


def _lists(what: str, before: Any, now: Any) -> Iterator[Drift]:
    mine, other = (
        [str(each) for each in named] if isinstance(named, list) else [] for named in (before, now)
    )
    for name in sorted({*mine, *other}):
        if name not in other:
            yield Drift(what=f"{what} {name}", before="loaded", now="", grade="look")
        elif name not in mine:
            yield Drift(what=f"{what} {name}", before="", now="loaded", grade="look")


def _level(one: str, two: str) -> int:
    """Tell which number of two versions is the first to differ: 0 is the major one."""
    mine, other = (_NUMBER.findall(version.partition("+")[0]) for version in (one, two))
    for place, (left, right) in enumerate(zip(mine, other, strict=False)):
        if left != right:
            return place
    return min(len(mine), len(other))


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}
