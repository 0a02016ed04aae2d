"""What Slurm says of a site: its settings, partitions and node types, as far as runs depend on them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.command import Runner

_TIMEOUT_S = 30.0
#: Source: slurm.conf(5), AuthInfo, and measured: a requeued job waits that long; less than 5 s counts as unset.
_CRED_EXPIRE_S = 120.0
_LEAST_CRED_EXPIRE_S = 5.0
_FIELD = re.compile(r"(\S+?)=(.*?)(?=\s+\S+?=|\s*$)")
#: What ``scontrol`` prints where there is no value.
_NOTHING = frozenset({"", "(null)", "N/A", "n/a", "NONE", "None", "UNLIMITED", "INFINITE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition.

    Parameters
    ----------
    max_time_s, default_time_s
        Time limits; ``None`` if there is none.
    grace_s
        From the notice of a preemption to the end.
    preempt_mode
        What happens to its jobs when they are preempted: ``"REQUEUE"``, ``"CANCEL"``, ``"SUSPEND"``, ``"OFF"``.
    submit_hosts
        Hosts whose users may submit to it; ``None``: all.
    """

    name: str
    default: bool
    up: bool
    nodes: int
    max_time_s: float | None
    default_time_s: float | None
    grace_s: float
    preempt_mode: str
    submit_hosts: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """Nodes that are alike.

    Parameters
    ----------
    names
        Of the nodes.
    gpu
        Model of the GPUs, as the site calls it.
    gpus, cpus
        Of each node.
    memory_mb
        Of each node, MiB.
    """

    partitions: tuple[str, ...]
    features: tuple[str, ...]
    gpu: str | None
    gpus: int
    cpus: int
    memory_mb: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A cluster.

    Parameters
    ----------
    settings
        ``scontrol show config``, name to value.
    """

    settings: Mapping[str, str]
    partitions: tuple[Partition, ...]
    node_kinds: tuple[NodeKind, ...]

    @property
    def name(self) -> str:
        """The cluster's."""
        return self.settings.get("ClusterName", "cluster")

    @property
    def version(self) -> str:
        """Slurm's."""
        return self.settings.get("SLURM_VERSION", "unknown")

    @property
    def requeue_delay_s(self) -> float:
        """How long a requeued job waits at least, besides the queue."""
        expire_s = float(self.option("AuthInfo", "cred_expire") or 0)
        return expire_s if expire_s >= _LEAST_CRED_EXPIRE_S else _CRED_EXPIRE_S

    @property
    def most_requeues(self) -> int | None:
        """How often a job may be requeued before it is held; ``None`` if Slurm does not say."""
        found = self.setting("MaxBatchRequeue") or self.option("SchedulerParameters", "max_batch_requeue")
        return int(found) if found and found.isdecimal() else None

    @property
    def warns_of_preemption(self) -> bool:
        """Whether a preemption sends the signal that ``--signal`` names, too.

        It stands in SlurmctldParameters of 22.05, and in PreemptParameters of later versions.
        """
        ways = (
            ("SlurmctldParameters", "preempt_send_user_signal"),
            ("PreemptParameters", "send_user_signal"),
        )
        return any(self.option(name, option) is not None for name, option in ways)

    @property
    def accounting(self) -> bool:
        """Whether ``sacct`` can know anything."""
        return self.setting("AccountingStorageType") not in {None, "accounting_storage/none"}

    @property
    def requeue_codes(self) -> tuple[str, ...]:
        """Exit codes of batch scripts that have Slurm requeue the job."""
        return tuple((self.setting("RequeueExit") or "").replace(",", " ").split())

    def setting(self, name: str) -> str | None:
        """Value of a setting; ``None`` if there is none."""
        value = self.settings.get(name, "")
        return None if value in _NOTHING else value

    def number(self, name: str) -> int | None:
        """First number of a setting's value, such as 5 of ``KillWait = 5 sec``."""
        match = re.match(r"\d+", self.settings.get(name, ""))
        return None if match is None else int(match[0])

    def option(self, name: str, option: str) -> str | None:
        """Value of one of a setting's options, empty for a mere word; ``None`` if it is not among them."""
        for each in (self.setting(name) or "").split(","):
            key, _, value = each.strip().partition("=")
            if key.lower() == option:
                return value
        return None

    def partition(self, name: str | None = None) -> Partition:
        """Give a partition, by default the default one.

        Raises
        ------
        SchedulerError
            If there is none of that name.
        """
        for each in self.partitions:
            if each.name == name or (name is None and each.default):
                return each
        if name is None and self.partitions:
            return self.partitions[0]
        known = ", ".join(each.name for each in self.partitions)
        raise SchedulerError(f"{self.name} has no partition {name!r}; it has: {known or 'none'}")


def read_site(run: Runner) -> Site:
    """Ask Slurm what kind of site this is.

    Parameters
    ----------
    run
        Runs a command.

    Raises
    ------
    SchedulerError
        If Slurm does not answer.
    FileNotFoundError
        If there is no ``scontrol`` here.
    """
    config, partitions, nodes = (_ask(run, what) for what in ("config", "partition", "node"))
    return Site(
        settings=parse_config(config),
        partitions=tuple(parse_partitions(partitions)),
        node_kinds=tuple(parse_nodes(nodes)),
    )


def _ask(run: Runner, what: str) -> str:
    try:
        done = run(["scontrol", "show", what], _TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SchedulerError(
            f"scontrol show {what}: no answer within {_TIMEOUT_S:g} s; is slurmctld up?"
        ) from None
    if done.code != 0:
        raise SchedulerError(f"scontrol show {what}: {done.complaint}")
    return done.out


def parse_config(text: str) -> dict[str, str]:
    """Read ``scontrol show config``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_partitions(text: str) -> Iterator[Partition]:
    """Read ``scontrol show partition``."""
    for fields in _blocks(text, "PartitionName"):
        yield Partition(
            name=fields["PartitionName"],
            default=fields.get("Default") == "YES",
            up=fields.get("State", "UP") == "UP",
            nodes=_int(fields.get("TotalNodes")),
            max_time_s=_time_s(fields.get("MaxTime", "")),
            default_time_s=_time_s(fields.get("DefaultTime", "")),
            grace_s=float(_int(fields.get("GraceTime"))),
            preempt_mode=fields.get("PreemptMode", "OFF").upper(),
            submit_hosts=None if fields.get("AllocNodes", "ALL") == "ALL" else fields["AllocNodes"],
        )


def parse_nodes(text: str) -> Iterator[NodeKind]:
    """Read ``scontrol show node``; nodes that are alike come together, in the order of the first of each."""
    kinds: dict[NodeKind, list[str]] = {}
    for fields in _blocks(text, "NodeName"):
        gpu, gpus = _gpus(fields.get("Gres", ""))
        kind = NodeKind(
            partitions=_words(fields.get("Partitions", "")),
            features=_words(fields.get("ActiveFeatures") or fields.get("AvailableFeatures") or ""),
            gpu=gpu,
            gpus=gpus,
            cpus=_int(fields.get("CPUTot")),
            memory_mb=_int(fields.get("RealMemory")),
            names=(),
        )
        kinds.setdefault(kind, []).append(fields["NodeName"])
    for kind, names in kinds.items():
        yield replace(kind, names=tuple(names))


def _blocks(text: str, first: str) -> Iterator[dict[str, str]]:
    """Give the fields of each block that a line ``FIRST=…`` begins."""
    for block in re.split(rf"^(?={first}=)", text, flags=re.MULTILINE):
        if block.startswith(f"{first}="):
            yield {
                match[1]: match[2].strip()
                for line in block.splitlines()
                for match in _FIELD.finditer(line.strip())
            }


def _gpus(gres: str) -> tuple[str | None, int]:
    """``("a100", 4)`` from ``gpu:a100:4(S:0-1),craynetwork:2``; a node with several models gives the first."""
    found: list[tuple[str | None, int]] = []
    for each in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = each.split(":")
        if kind == "gpu":
            model = rest[0] if rest and not rest[0].isdecimal() else None
            found.append((model, int(rest[-1]) if rest and rest[-1].isdecimal() else 1))
    return (found[0][0], sum(count for _, count in found)) if found else (None, 0)


def _time_s(text: str) -> float | None:
    """Read ``D-HH:MM:SS``; words mean no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word not in _NOTHING)


def _int(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
