"""Before a job is submitted: whether its time limit, warning, grace time and KillWait suffice for a save."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hpc_resume.checkpoint.manifest import read_manifest
from hpc_resume.config import Config
from hpc_resume.errors import IntegrityError, UsageError
from hpc_resume.policy.coverage import Given, Savings, shortfalls
from hpc_resume.policy.saving import told_s
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.command import Runner, run_command
from hpc_resume.scheduler.site import Partition, parse_config, parse_partitions
from hpc_resume.settings import NodeType

#: So many of the newest checkpoints tell what a save takes.
_CHECKPOINTS = 5
#: Submission does not wait longer for Slurm's settings.
_TIMEOUT_S = 10.0
#: Source: slurm.conf(5), KillWait.
_KILL_WAIT_S = 30.0
#: Under preempt/partition_prio, jobs of a partition are preempted by those of one with a higher tier.
_TIER = re.compile(
    r"^PartitionName=(\S+)(?:(?!^PartitionName=).)*?\bPriorityTier=(\d+)", re.MULTILINE | re.DOTALL
)


def check_times(config: Config, *, runner: Runner | None = None) -> list[str]:
    """Find what can't cover a save.

    Parameters
    ----------
    config
        Settings of the run; what its checkpoints say of earlier saves counts, if it has any.
    runner
        Runs a command of Slurm's.

    Returns
    -------
    list of str
        Warnings, with the numbers.

    Raises
    ------
    UsageError
        If no attempt could ever save anything.
    """
    saves = _measured(config.run_directory())
    found = [each for given in _given(config, runner or run_command) for each in shortfalls(given, saves)]
    for each in found:
        if each.hopeless:
            raise UsageError(each.text)
    return list(dict.fromkeys(each.text for each in found))


def _measured(root: Path) -> Savings | None:
    """Read what the run's newest checkpoints took."""
    run = RunDirectory(root)
    steps, seconds = [], []
    for name in reversed(run.checkpoint_names()[-_CHECKPOINTS:]):
        try:
            manifest = read_manifest(run.checkpoints / name)
        except (IntegrityError, FileNotFoundError):
            continue
        for each in told_s(manifest.costs):
            steps.append(manifest.step)
            seconds.append(each)
    return Savings(step=steps[0], seconds=tuple(seconds)) if seconds else None


def _given(config: Config, runner: Runner) -> Iterator[Given]:
    if config.scheduler == "local":
        for node_type in config.node_types:
            grace_s = node_type.grace_s if node_type.preempt_after_s is not None else None
            yield _times(config, node_type, f"node type {node_type.name}", grace_s, config.stop.kill_wait_s)
        return
    settings, listed = _ask(runner, "config"), _ask(runner, "partition")
    if settings is None or listed is None:
        return  # sbatch will say what is wrong
    kill_wait = parse_config(settings).get("KillWait", "").partition(" ")[0]
    kill_wait_s = float(kill_wait) if kill_wait.isdecimal() else _KILL_WAIT_S
    by_partition = "partition_prio" in parse_config(settings).get("PreemptType", "")
    tiers = {name: int(tier) for name, tier in _TIER.findall(listed)}
    for partition in parse_partitions(listed):
        preempted = by_partition and tiers.get(partition.name, 0) < max(tiers.values(), default=0)
        preempted = preempted and "OFF" not in partition.preempt_mode
        grace_s = partition.grace_s if preempted else None
        for node_type in config.node_types:
            if _may_get(node_type, partition):
                yield _times(config, node_type, f"partition {partition.name}", grace_s, kill_wait_s)


def _times(
    config: Config, node_type: NodeType, where: str, grace_s: float | None, kill_wait_s: float
) -> Given:
    return Given(
        where=where,
        time_limit_s=node_type.time_limit_s or config.time_limit_s,
        warning_lead_s=config.warning_lead_s,
        lead_is_meant=config.origin("warning_lead_s") != "default",
        grace_s=grace_s,
        kill_wait_s=kill_wait_s,
        every_s=config.checkpoint.every_s,
        every_steps=config.checkpoint.every_steps,
    )


def _may_get(node_type: NodeType, partition: Partition) -> bool:
    """Whether a job may run in a partition: of a list, any; without a name, the default one."""
    return (
        partition.default if node_type.partition is None else partition.name in node_type.partition.split(",")
    )


def _ask(runner: Runner, what: str) -> str | None:
    """Ask Slurm; None where it does not answer."""
    try:
        done = runner(["scontrol", "show", what], _TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.out if done.code == 0 else None
