"""The sbatch script of a run, as text: ``templates/job.sbatch.j2`` filled in."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hpc_resume._version import __version__
from hpc_resume.config import Config
from hpc_resume.errors import UsageError
from hpc_resume.launch.software import container_words, software_lines
from hpc_resume.scheduler.ancestors import torchrun_variables
from hpc_resume.scheduler.notes import NOTES
from hpc_resume.settings import NodeType
from hpc_resume.values import spell

_TEMPLATE = "job.sbatch.j2"
#: What a rank reads of the settings; the rest has served its purpose when the script is written.
_SETTINGS_OF_RANKS = (
    "name",
    "seed",
    "why",
    "allow_config_change",
    "allow_data_change",
    "allow_drift",
    "allow_precision_change",
    "warning_lead_s",
    "warning_signal",
    "continuation",
    "checkpoint",
    "stop",
    "budget",
    "data",
    "validation",
)
#: Source: sbatch(1), --signal.
_LONGEST_LEAD_S = 65535
#: A look at a node takes seconds, and a minute where a busy filesystem gives Python's files.
_CHECK_S = 120
#: The warning comes up to 30 s early (measured), and starting takes its time, too.
_WORTH_IT_S = 60

_WHY = {
    "open-mode": "A requeued job goes on writing to the same log.",
    "signal": "Warns every rank that many seconds before the time limit, or up to 30 earlier.",
    "requeue": "Lets Slurm start the job again after a preemption or a node failure.",
    "array": "Each element goes on from the one before it; one at a time.",
}
#: Told of a node type on the command line, and taken out of the script that is submitted so.
_OF_NODE_TYPE = (
    "partition",
    "constraint",
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-node",
    "mem",
    "time",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunList:
    """The runs of a job array, one for each element.

    Parameters
    ----------
    path
        A list with two lines for each element: its run's folder, and the configuration that is stored there.
    size
        How many elements there are.
    at_once
        How many of them run at the same time at most.
    after
        Id of an array that must be over before.
    """

    path: Path
    size: int
    at_once: int | None = None
    after: str | None = None


def render(
    config: Config,
    *,
    command: Sequence[str] | str,
    run_dir: Path,
    config_path: Path | None = None,
    node_type: int = 0,
    runs: RunList | None = None,
    output: str | None = None,
    rank_output: str | None = None,
    pickles: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Write the sbatch script of a run.

    Parameters
    ----------
    config
        The run's settings.
    command
        What every rank runs: words, or one line of shell.
    run_dir
        The run's folder; the job makes it if need be.
    config_path
        The stored configuration. Without one the script carries the settings that the ranks read, so that it
        can be copied anywhere.
    node_type
        Which of the configured node types is asked for, from 0. A job that goes on from this one may ask for
        another: the script knows them all.
    runs
        For a job array whose elements are runs of their own; ``run_dir`` is then the folder that they are in,
        each writes its ranks' logs into its own, and ``command`` may use ``$HPC_RESUME_RUN_DIR``.
    output
        Slurm's pattern of the log; its folder must exist when the job starts.
    rank_output
        Pattern of a log for each rank, with ``%t`` for the rank; without it they share the job's.
    pickles
        The folder of submitit's files, where the command is submitit's.
    variables
        Exported on top of the configured ones.

    Raises
    ------
    UsageError
        If a value can't be written into a script.
    """
    slurm, asked = config.slurm, config.node_types[node_type]
    several = len(config.node_types) > 1
    exports = dict(config.environment.variables)
    if runs is None:
        exports["HPC_RESUME_RUN_DIR"] = str(run_dir)
        if config_path is not None:
            exports["HPC_RESUME_CONFIG"] = str(config_path)
        else:
            exports.update(_settings_as_variables(config))
    if not several and asked.name != type(asked)().name:
        exports["HPC_RESUME_NODE_TYPE"] = asked.name
    exports.update(variables or {})

    words = ["--kill-on-bad-exit=1"]
    if rank_output is not None:
        words.append(f"--output={rank_output}")
    words += slurm.srun_args
    options, inside = container_words(slurm.container, run_dir)
    line = _one_line("command", command if isinstance(command, str) else shlex.join(command))
    check = [*inside, shlex.quote(job_interpreter(config, line)), "-m", "hpc_resume.cli", "doctor", "--node"]
    if output is None:
        output = "%x-%A_%a.log" if config.continuation == "array" else "%x-%j.log"
    queues = config.continuation in {"chain", "array"}
    return fill_in(
        _TEMPLATE,
        title=f"{'Job of the run' if runs is None else 'Jobs of the runs'} {config.name!r}. "
        f"Written by hpc_resume {__version__}.",
        run_dir=_one_line("run_dir", str(run_dir)),
        runs=None if runs is None else _one_line("run_dir", str(runs.path)),
        notes=shlex.quote(str(run_dir / NOTES)) if runs is None else f"$HPC_RESUME_RUN_DIR/{NOTES}",
        continuation=config.continuation,
        queues=queues,
        remembers=queues or config.continuation == "login",
        submits=config.continuation == "chain" or (several and config.continuation in {"requeue", "exit"}),
        types=[_type_for_script(config, number) for number in range(len(config.node_types))]
        if several
        else [],
        number=node_type,
        type_options="|".join(_OF_NODE_TYPE),
        tasks=asked.tasks_per_node,
        pickles=None if pickles is None else str(pickles),
        directives=job_directives(config, asked, output, runs),
        setup=software_lines(config.environment),
        variables={name: _one_line(name, value) for name, value in exports.items()},
        srun=" ".join([shlex.join(words), *options]),
        command=" ".join([*inside, line]),
        check=" ".join(check) if slurm.check_nodes else None,
        check_options=" ".join(["--ntasks-per-node=1", "--kill-on-bad-exit=0", *options]),
        check_s=_CHECK_S,
        torchrun=torchrun_variables(config.warning_lead_s),
        restarts=config.budget.restarts_in_place,
        max_idle=config.budget.max_idle,
        least_s=math.ceil(config.warning_lead_s) + _WORTH_IT_S,
    )


def job_interpreter(config: Config, command: str = "") -> str:
    """Choose the Python of a job's own looks and checks: the ranks', as far as that can be told."""
    first = (command.split() or [""])[0]
    if config.environment.interpreter is not None:
        return config.environment.interpreter
    if re.fullmatch(r"[\w./-]*\bpython[\d.]*", first):
        return first
    return "python3" if config.slurm.container.used else sys.executable


def fill_in(template: str, **values: Any) -> str:
    """Fill in a template of ``templates/``."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - a shell script, quoted by the filter below
    )
    environment.filters["quote"] = shlex.quote
    return environment.from_string(_template(template)).render(**values)


def node_type_options(config: Config, number: int) -> list[str]:
    """Give what sbatch is told of a node type, as words of its command line.

    Parameters
    ----------
    config
        The run's settings.
    number
        Which of its node types, from 0.
    """
    return [
        f"--{name}={_one_line(f'--{name}', str(value))}"
        for name, value in _node_type_values(config, config.node_types[number]).items()
        if value is not None
    ]


def _type_for_script(config: Config, number: int) -> dict[str, Any]:
    node_type = config.node_types[number]
    limit_s = node_type.time_limit_s or config.time_limit_s
    return {
        "name": shlex.quote(node_type.name),
        "tasks": node_type.tasks_per_node,
        "limit_s": 0 if limit_s is None else math.ceil(limit_s),
        "wait_s": None if node_type.wait_limit_s is None else math.ceil(node_type.wait_limit_s),
        "options": shlex.join(node_type_options(config, number)),
    }


def slurm_time(seconds: float) -> str:
    """Write a duration as ``HH:MM:SS``, rounded up; Slurm takes more than 24 hours so, too."""
    whole = math.ceil(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _node_type_values(config: Config, node_type: NodeType) -> dict[str, Any]:
    """Give sbatch's options that say what a node type is."""
    limit_s = node_type.time_limit_s or config.time_limit_s
    return {
        "partition": node_type.partition,
        "constraint": node_type.constraint,
        "nodes": node_type.nodes,
        "ntasks-per-node": node_type.tasks_per_node,
        "cpus-per-task": node_type.cpus_per_task,
        "gpus-per-node": node_type.gpus_per_node or None,
        "mem": None if node_type.mem_gb is None else _memory(node_type.mem_gb),
        "time": None if limit_s is None else slurm_time(limit_s),
    }


def job_directives(
    config: Config, node_type: NodeType, output: str, runs: RunList | None = None
) -> list[tuple[str | None, str]]:
    """Give the lines after ``#SBATCH``, each with the comment above it."""
    slurm = config.slurm
    asked = _node_type_values(config, node_type)
    lead_s = min(math.ceil(config.warning_lead_s), _LONGEST_LEAD_S)
    # A job of a chain or an array is followed by another one; were it requeued as well, there would be two.
    requeue = slurm.requeue and config.continuation not in {"chain", "array"}
    options: dict[str, Any] = {
        "job-name": config.name,
        "output": output,
        "open-mode": "append",
        "time": asked.get("time"),
        "signal": f"{config.warning_signal}@{lead_s}" if lead_s else None,
        "requeue" if requeue else "no-requeue": True,
        "array": f"1-{slurm.array_elements}%1" if config.continuation == "array" else None,
        "partition": asked.get("partition"),
        "constraint": asked.get("constraint"),
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": asked.get("nodes"),
        "ntasks-per-node": asked.get("ntasks-per-node"),
        "cpus-per-task": asked.get("cpus-per-task"),
        "gpus-per-node": asked.get("gpus-per-node"),
        "gres": slurm.gres,
        "mem": asked.get("mem"),
        "exclude": slurm.exclude,
        "nodelist": slurm.nodelist,
    }
    added = {name.replace("_", "-"): value for name, value in slurm.additional_parameters.items()}
    why = dict(_WHY)
    if runs is not None:
        added |= _array_options(runs, added)
        why["array"] = "One element for each run."
    options |= added
    return [
        (why.get(name), f"--{name}" if value is True else f"--{name}={_directive_value(name, value)}")
        for name, value in options.items()
        if value is not None and value is not False
    ]


def _array_options(runs: RunList, added: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an array of runs, put together with those that the user has added."""
    limit = "" if runs.at_once is None else f"%{runs.at_once}"
    options: dict[str, Any] = {"array": f"0-{runs.size - 1}{limit}"}
    if runs.after is not None:
        options["dependency"] = ",".join(
            filter(None, (f"afterany:{runs.after}", str(added.get("dependency") or "")))
        )
    return options


def _memory(size_gb: float) -> str:
    return f"{size_gb:.0f}G" if size_gb == int(size_gb) else f"{math.ceil(size_gb * 1024)}M"


def _directive_value(name: str, value: Any) -> str:
    return shlex.quote(_one_line(f"--{name}", str(value)))


def _one_line(name: str, value: str) -> str:
    if "\n" in value or "\r" in value:
        raise UsageError(
            f"{name}: {value!r} has a line break, which can't stand in an sbatch script; remove it"
        )
    return value


def _settings_as_variables(config: Config) -> dict[str, str]:
    """Give the settings that ranks read and that are not their defaults as ``HPC_RESUME_*`` variables."""
    actual, default = config.model_dump(mode="json"), Config().model_dump(mode="json")
    several = len(config.node_types) > 1
    if not several:
        actual["time_limit_s"] = config.node_types[0].time_limit_s or config.time_limit_s
    found: dict[str, str] = {}

    def collect(at: str, value: Any, usual: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{at}__{key}", inner, usual[key])
        elif value != usual:
            found[f"HPC_RESUME_{at.upper()}"] = _scalar(value)

    for key in (*_SETTINGS_OF_RANKS, "time_limit_s", *(["node_types"] if several else [])):
        collect(key, actual[key], default[key])
    return found


def _scalar(value: Any) -> str:
    """Write a value as the environment variable that is read back as that value."""
    return spell(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def _template(name: str) -> str:
    try:
        folder = resources.files("hpc_resume.templates")
    except ModuleNotFoundError:  # a checkout that is not installed: setup.cfg maps the folder
        return (Path(__file__).parents[2] / "templates" / name).read_text()
    return (folder / name).read_text()
