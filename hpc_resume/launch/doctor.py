"""Is this site fit for runs, and how are they continued best? Everything that can be found out from a login node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError
from hpc_resume.files import JsonObject
from hpc_resume.launch.doctorfiles import file_findings
from hpc_resume.launch.doctorpython import python_findings
from hpc_resume.launch.doctorslurm import node_findings, partition_findings, slurm_findings, wish_findings
from hpc_resume.launch.probe import Probe, send_probe
from hpc_resume.launch.sitefile import write_site_file
from hpc_resume.policy.recommendation import Abilities, Recommendation, recommend
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.command import Runner, run_command
from hpc_resume.scheduler.site import Site, read_site


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Parameters
    ----------
    findings
        By area, in the order of the looks.
    site
        The cluster; ``None`` if there is no Slurm here.
    advice
        How runs are continued best; ``None`` as above: the embedded scheduler continues them by itself.
    """

    findings: tuple[tuple[str, Finding], ...]
    site: Site | None
    advice: Recommendation | None

    @property
    def fit(self) -> bool:
        """Whether nothing is bad."""
        return all(finding.level != "bad" for _, finding in self.findings)

    def to_json(self) -> JsonObject:
        """JSON form."""
        return {
            "fit": self.fit,
            "findings": [{"area": area, **dataclasses.asdict(finding)} for area, finding in self.findings],
            "continuation": None if self.advice is None else dataclasses.asdict(self.advice),
            "site": None if self.site is None else dataclasses.asdict(self.site),
        }

    def write(self, path: Path, partition: str | None) -> None:
        """Write a site file; see :func:`~hpc_resume.launch.sitefile.site_file`.

        Raises
        ------
        SchedulerError
            If there is no Slurm here, or no such partition.
        UsageError
            If the file is there already, or can't be written.
        """
        if self.site is None or self.advice is None:
            raise SchedulerError(
                f"{path}: not written: there is no Slurm here to describe; configs/local.yaml is for the embedded "
                "scheduler"
            )
        write_site_file(path, self.site, self.advice, partition)


def examine(
    config: Config,
    *,
    probe: bool = False,
    partition: str | None = None,
    patience_s: float = 300.0,
    machine: Callable[[], Sequence[Finding]] = tuple,
    run: Runner = run_command,
) -> Diagnosis:
    """Find out what can be found out.

    Parameters
    ----------
    config
        Its run directory, node types and environment are looked at.
    probe
        Ask a compute node, too, by a tiny job.
    partition
        Where runs are to be; by default that of the first node type, else the default one.
    patience_s
        How long the tiny job may take.
    machine
        Looks at this machine, on which runs work where there is no Slurm.
    run
        Runs a command.

    Raises
    ------
    SchedulerError
        If there is no such partition, or the tiny job is refused or does not start in time.
    """
    found: list[tuple[str, Finding]] = []
    site = advice = told = None
    try:
        site = read_site(run)
    except FileNotFoundError:
        detail = (
            "not here; runs can use the embedded scheduler (scheduler: local), which continues them by itself"
        )
        level = "bad" if config.scheduler == "slurm" or probe else "note"
        found.append(
            ("Slurm", Finding(what="scontrol", level="bad" if level == "bad" else "note", detail=detail))
        )
    except SchedulerError as error:
        found.append(("Slurm", Finding(what="scontrol", level="bad", detail=str(error))))
    if site is not None:
        chosen = partition or config.node_types[0].partition
        if probe:
            told = send_probe(_in_partition(config, chosen), run=run, patience_s=patience_s)
        found += [("Slurm", each) for each in slurm_findings(site)]
        found += [("partition", each) for each in partition_findings(site)]
        found += [("nodes", each) for each in node_findings(site)]
        if config.scheduler == "slurm":
            found += [("settings", each) for each in wish_findings(site, config)]
        advice = recommend(abilities(site, told, site.partition(chosen).preempt_mode))
    alone = site is None
    if alone:
        found += [("this machine", each) for each in machine()]
    visible = None if told is None else told.visible
    found += [("files", each) for each in file_findings(config, visible=visible, one_machine=alone, run=run)]
    starts = None if told is None or not told.visible else "executable" in told.answers.get("python", "")
    found += [
        ("Python", each) for each in python_findings(config, visible=starts, one_machine=alone, run=run)
    ]
    if told is not None:
        found += [("compute node", each) for each in told.findings()]
    return Diagnosis(findings=tuple(found), site=site, advice=advice)


def abilities(site: Site, told: Probe | None, preempt_mode: str) -> Abilities:
    """Put together what Slurm's settings and a compute node say."""
    size = site.number("MaxArraySize")
    return Abilities(
        scontrol_on_nodes=None if told is None else told.can("scontrol"),
        sbatch_on_nodes=None if told is None else told.can("sbatch"),
        scontrol_for_ranks=None if told is None else told.can("rank_scontrol"),
        requeues_75="75" in site.requeue_codes,
        preempt_mode=preempt_mode,
        longest_array=0 if size is None else size,
    )


def _in_partition(config: Config, partition: str | None) -> Config:
    first, *rest = (node_type.model_dump() for node_type in config.node_types)
    return config.replace(node_types=[{**first, "partition": partition}, *rest])
