"""TensorBoard: one folder for all attempts; what a resume does again replaces what was there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_resume.run.tracking.trackers import Row, needed


class TensorBoard:
    """Writes events.

    Parameters
    ----------
    log_dir
        Folder of all attempts.
    step
        Completed steps: TensorBoard passes over what earlier attempts wrote from there on.
    options
        Others of ``SummaryWriter``.
    """

    name = "tensorboard"

    def __init__(self, log_dir: Path, step: int, options: dict[str, Any]) -> None:
        needed("tensorboard", self.name)
        module = needed("torch.utils.tensorboard", self.name)
        #: The ``SummaryWriter``.
        self.object = module.SummaryWriter(**{"log_dir": str(log_dir), "purge_step": step, **options})

    def send(self, rows: Sequence[Row]) -> None:
        """Write metrics."""
        for step, time_s, values in rows:
            for name, value in values.items():
                self.object.add_scalar(name, value, global_step=step, walltime=time_s)

    def flush(self) -> None:
        """Write what is buffered."""
        self.object.flush()

    def close(self, outcome: str) -> None:  # noqa: ARG002 - events don't know how a run ends
        """Close the file."""
        self.object.close()

    def end(self, outcome: str) -> None:
        """Nothing is left to do."""
