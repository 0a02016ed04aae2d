"""What can be set, group by group; :class:`hpc_resume.config.Config` is all of it.

A new setting is one field and one line below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from hpc_resume.values import AnyWritten

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def _seconds(value: object) -> object:
    """Read Slurm's spellings of a time (``D-HH:MM:SS``, ``HH:MM:SS``, ``MM:SS``); numbers are seconds.

    Source: sbatch(1), ``--time``. A bare number is left to pydantic: our settings are in seconds.
    """
    match = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if match is None or not (match[1] or match[3]):
        return value
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
Lead = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["bf16", "fp16", "fp32"]
Reason = Annotated[str, Field(min_length=3)]


class Settings(BaseModel):
    """Base of all groups: frozen, and an unknown name is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        hide_input_in_errors=True,
    )


class NodeType(Settings):
    """What one allocation consists of."""

    name: str = "default"
    """What the type is called in tables and manifests."""
    ranks: Count = 1
    """Processes; under Slurm ``nodes`` x ``tasks_per_node``, which is filled in."""
    nodes: Count = 1
    tasks_per_node: Count = 1
    cpus_per_task: Count | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of each node."""
    partition: str | None = None
    constraint: str | None = None
    time_limit_s: Seconds | None = None
    """Overrides the run's time limit."""
    wait_limit_s: Seconds | None = None
    """A job that has waited so long for this type asks for the next one; without it, it never does."""
    micro_batch: Count | None = None
    """Samples that a rank takes through the model at once in ``run.micro_batches``; all of its part by default."""
    precision: Precision | None = None
    """What ``run.autocast()`` computes in, ``fp32`` by default; nodes that can't are declined."""
    preempt_after_s: Seconds | None = None
    """Embedded scheduler: preempts the attempt that long after it began."""
    grace_s: Lead = 30.0
    """Embedded scheduler: from the notice of a preemption to the end."""

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in_shape(cls, values: Any, handler: ModelWrapValidatorHandler[NodeType]) -> NodeType:
        """Derive ``ranks`` from the shape, or ``tasks_per_node`` from ``ranks``."""
        if not isinstance(values, Mapping):
            return handler(values)
        filled = cls._filled_in(values)
        made = handler(filled)
        # What follows from the rest follows anew when the rest is replaced.
        made.model_fields_set.difference_update(filled.keys() - values.keys())
        return made

    @staticmethod
    def _filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        try:
            nodes, ranks = int(filled.get("nodes", 1)), int(filled.get("ranks", 0))
            tasks = int(filled.get("tasks_per_node", 0))
        except (TypeError, ValueError):
            return filled  # the fields' own checks say it better
        if "ranks" not in filled:
            filled["ranks"] = nodes * max(tasks, 1)
        elif "tasks_per_node" not in filled and nodes > 0 and ranks > 0 and ranks % nodes == 0:
            filled["tasks_per_node"] = ranks // nodes
        return filled

    @model_validator(mode="after")
    def _check_shape(self) -> NodeType:
        if self.ranks != self.nodes * self.tasks_per_node:
            raise ValueError(
                f"ranks is {self.ranks}, but nodes x tasks_per_node is {self.nodes} x {self.tasks_per_node}; "
                "give nodes and tasks_per_node only, or ranks only"
            )
        return self


#: Source: apptainer-exec(1).
_WITHOUT_ENVIRONMENT = frozenset({"-e", "--cleanenv", "-C", "--containall"})


class ContainerSettings(Settings):
    """The container that the ranks run in; under Slurm only."""

    runtime: Literal["apptainer", "singularity", "pyxis"] = "apptainer"
    """``pyxis`` is Slurm's plugin: srun starts the container; the others stand before the command."""
    image: str | None = None
    """A file, or what the runtime takes for one; without it there is no container."""
    mounts: tuple[str, ...] = ()
    """More of the host, as ``SOURCE:TARGET:OPTIONS`` or one path; the run's and the submitting folder are there."""
    args: tuple[str, ...] = ()
    """More options of the runtime, such as ``--nv`` (Apptainer, for GPUs)."""
    words: tuple[str, ...] = ()
    """For any other runtime, in place of the above: words before the command, ``[shifter, --image=a/b]``."""

    @property
    def used(self) -> bool:
        """Whether there is one."""
        return self.image is not None or bool(self.words)

    @model_validator(mode="before")
    @classmethod
    def _take_list_as_words(cls, values: Any) -> Any:
        return {"words": values} if isinstance(values, (list, tuple)) else values

    @model_validator(mode="after")
    def _check_one_way(self) -> ContainerSettings:
        if self.words and self.image is not None:
            raise ValueError("words are for a runtime that is not known here; give them, or an image")
        if self.image is None and (self.mounts or self.args):
            raise ValueError("mounts and args belong to an image; give the image, too")
        if clean := _WITHOUT_ENVIRONMENT & set(self.args):
            raise ValueError(
                f"args: {min(clean)} keeps the job's variables from the ranks, which need SLURM_* and HPC_RESUME_*; "
                "leave it out, or use --contain, which keeps the files apart"
            )
        return self


class SlurmSettings(Settings):
    """What ``sbatch`` and ``srun`` are told besides the node type."""

    account: str | None = None
    qos: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    gres: str | None = None
    requeue: bool = True
    """Submit with ``--requeue``; off where PreemptMode=CANCEL makes it pointless."""
    array_elements: Annotated[int, Field(ge=2)] = 20
    """With ``continuation: array``: the most attempts that one submission gives."""
    additional_parameters: dict[str, AnyWritten] = Field(default_factory=dict)
    """Any other ``#SBATCH`` line, as name: value, without the dashes."""
    srun_args: tuple[str, ...] = ()
    container: ContainerSettings = ContainerSettings()
    """A container, or a list of words before the command on srun's line: ``[apptainer, exec, image.sif]``."""
    check_nodes: bool = False
    """Look at every node before the ranks start (``hpc-resume doctor --node``), and leave those that are unfit."""


class EnvironmentSettings(Settings):
    """How the processes of a job find their software: modules, then an environment, then any other line."""

    modules: tuple[str, ...] = ()
    """Environment modules to load, in order: ``[gcc/13, cuda/12.4]``."""
    activate: str | None = None
    """A venv's or conda environment's folder, or a conda environment's name."""
    setup: tuple[str, ...] = ()
    """Shell lines after these, before the processes start."""
    python: str | None = None
    """Interpreter of the job; without it the activated environment's, else the one that submits."""
    variables: dict[str, str] = Field(default_factory=dict)
    source: Literal["snapshot", "live"] = "snapshot"
    """What a submitted job runs: the code as it was submitted, or as it is when an attempt begins."""

    @property
    def interpreter(self) -> str | None:
        """The job's interpreter; ``None``: the one that submits."""
        return self.python or ("python" if self.activate is not None else None)


class CheckpointSettings(Settings):
    """When a checkpoint is taken, and how it is written."""

    every_steps: Count | None = None
    every_s: Seconds | None = 600.0
    threads: Count = 2
    """Writing threads of each rank."""
    asynchronous: bool = True
    """Periodic checkpoints are copied aside and written while training goes on."""
    host_memory_gb: Annotated[float, Field(ge=0)] | None = None
    """For the copy of one rank, else a quarter of the node's for all; a larger state makes training wait."""
    direct: bool = True
    """Write past the page cache (O_DIRECT) where the filesystem can."""
    longest_chain: Annotated[int, Field(ge=0)] = 8
    """How many older checkpoints one may refer to for bytes that have not changed; 0: each one is whole."""
    dead_after_s: Seconds = 30.0
    """A rank whose part of the last save comes this long after another's counts as dead: others write it."""


Tolerance = Annotated[float, Field(gt=0, lt=1)]


class ToleranceSettings(Settings):
    """Relative difference that a probe's values may have on other hardware, by what was computed in."""

    fp64: Tolerance = 1e-12
    fp32: Tolerance = 2e-5
    tf32: Tolerance = 2e-3
    fp16: Tolerance = 2e-3
    bf16: Tolerance = 2e-2


class ValidationSettings(Settings):
    """How a state is looked at when it is saved, and again when it has been restored."""

    probe: Literal["every_save", "stop", "never"] = "every_save"
    """Before which saves ``run.probe``'s function runs; ``stop``: before the last one of an attempt alone."""
    mismatch: Literal["refuse", "tell"] = "refuse"
    """A probe that gives something else after the restore: try older checkpoints, or only say so and go on."""
    tolerance: ToleranceSettings = ToleranceSettings()
    nonfinite: Literal["hold_back", "stop", "ignore"] = "hold_back"
    """NaN or Inf in parameters or optimizers' state: keep the checkpoint, but resume from older ones; end the run
    at once; or resume from it all the same."""
    nonfinite_in_a_row: Count | None = 3
    """With ``hold_back``, so many such checkpoints in a row end the run; none: never."""
    norm_factor: Annotated[float, Field(gt=1)] | None = 4.0
    """A module's norm that differs by more than this factor from the last few checkpoints' is told; none: never."""
    norm_jump: Literal["tell", "hold_back"] = "tell"
    """``hold_back``: such a checkpoint is not resumed from."""


class StopSettings(Settings):
    """How long a stop may take."""

    agreement_s: Seconds = 30.0
    """For all ranks to agree on the last step."""
    watchdog_s: Seconds = 60.0
    """From the request to stop until it gives up waiting for a step boundary."""
    kill_wait_s: Seconds = 30.0
    """Embedded scheduler: from SIGTERM to SIGKILL."""


class BudgetSettings(Settings):
    """How often a run is continued."""

    max_idle: Count = 3
    """Attempts in a row without progress after which the run is not continued, those aside that others ended."""
    crashes: Count | None = None
    """Of those, how many may have crashed. This budget and the next are renewed by progress; none: no limit."""
    hangs: Count | None = None
    """How many may have hung."""
    out_of_memory: Count | None = 2
    """How many may have run out of memory on the last node type; on the others the next one is tried at once."""
    node_failures: Count | None = 5
    """How many may have been ended by failing nodes."""
    preemptions: Count | None = None
    """How many may have been preempted or requeued by others."""
    node_faults: Count | None = 2
    """A node that has failed the run so often is avoided; none: never."""
    backoff_s: Lead = 30.0
    """Wait before the next attempt once two in a row have saved nothing; twice as long each further time."""
    longest_backoff_s: Lead = 1800.0
    restarts_in_place: Annotated[int, Field(ge=0)] = 2
    """Crashed ranks are started again in the same allocation so often in a row without a new checkpoint."""


def _off(value: object) -> object:
    """Take what YAML makes of a plain ``off`` for the word."""
    return "off" if value is False else value


Paths = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


class DataSettings(Settings):
    """What a run trains on, so that a change in it is seen before the first step; see docs/data-snapshot.md."""

    paths: Paths = ()
    """Folders and files that are trained on; ``$VARIABLES`` are filled in on the node."""
    validation: Paths = ()
    """Those that are validated on: a change is told, and stops nothing."""
    preprocessing: str | None = None
    """A version of what is done with the data before the model sees it; it changes when the result does."""
    check: Annotated[Literal["contents", "sizes", "off"], BeforeValidator(_off)] = "contents"
    """What is compared: every byte (what is known from before is not read again), names and sizes, or nothing."""
    inside: bool = True
    """HDF5 files are looked into, to tell which dataset in them has changed; that reads them twice."""
    ignore: tuple[str, ...] = (".nfs*", "__pycache__", ".DS_Store", "cache-*.arrow")
    """Patterns of names of files and folders that do not count."""
    threads: Count = 8
    """How many files rank 0 reads at once."""

    def anchored(self, folder: Path) -> DataSettings:
        """Let relative paths begin at a folder, wherever the script will run; what begins with $ or ~ stays."""
        names = ("paths", "validation")
        found = {
            name: tuple(
                path if path.startswith(("$", "~")) else str(folder / path) for path in getattr(self, name)
            )
            for name in names
        }
        return self.model_copy(update=found)


class SiteSettings(Settings):
    """What only the site's documentation says."""

    purge_after_days: Annotated[float, Field(gt=0)] | None = None
    """Files below ``run_dir`` that nobody has touched for so long are deleted by the site."""


class ArraySettings(Settings):
    """How the runs of an array share the machines."""

    at_once: Count | None = None
    """How many of them run at the same time at most; without it Slurm decides, and the embedded one takes 1."""


class EntrySettings(Settings):
    """What is run; recorded by submit."""

    target: str | None = None
    """``file.py:function`` or ``package.module:function``."""
    command: tuple[str, ...] = ()
    kwargs: dict[str, Any] = Field(default_factory=dict)
