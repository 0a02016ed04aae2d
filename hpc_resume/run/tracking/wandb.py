"""Weights & Biases: one run there for all attempts, offline too.

W&B takes no step that is lower than one that it has, and offline it does not even know what it has. So each step is
sent once, under its own number: the offline folders of all attempts can be synced in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_resume.run.tracking.ledger import Ledger
from hpc_resume.run.tracking.trackers import INTERRUPTED, Row, needed

#: Without a connection, uploading at the end of an attempt would wait for ever.
_FINISH_S = 20.0


class Wandb:
    """Sends metrics.

    Parameters
    ----------
    folder
        Where it keeps its files.
    run_id
        Of the run.
    name, config
        Of the run, for people.
    options
        Others of ``wandb.init``.
    """

    name = "wandb"

    def __init__(
        self, folder: Path, run_id: str, name: str, config: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        module = needed("wandb", self.name)
        self._ledger = Ledger(folder / "wandb.json", run_id)
        own_id = options.pop("id", None) or self._ledger.id or run_id
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"resume": "allow", "dir": str(folder), "name": name, "config": dict(config)}
        if "settings" not in options and "finish_timeout" in getattr(module.Settings, "model_fields", ()):
            fields["settings"] = module.Settings(finish_timeout=_FINISH_S)
        #: The ``wandb.Run``.
        self.object = module.init(id=own_id, allow_val_change=True, **{**fields, **options})
        self._ledger.keep(own_id, told=int(self.object.step) - 1)

    def send(self, rows: Sequence[Row]) -> None:
        """Send metrics that were not sent yet."""
        for step, _, values in self._ledger.fresh(rows):
            self.object.log(dict(values), step=step, commit=True)

    def flush(self) -> None:
        """Do nothing: a process of W&B's own writes."""

    def close(self, outcome: str) -> None:
        """Finish the run there, or say that it is continued."""
        if outcome == INTERRUPTED:
            with contextlib.suppress(Exception):  # not every version has it, nor every mode
                self.object.mark_preempting()
        self.object.finish(exit_code=1 if outcome == "failed" else 0)

    def end(self, outcome: str) -> None:
        """Nothing is left to do."""
