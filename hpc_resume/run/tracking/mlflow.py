"""MLflow: one run there for all attempts, and each step once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_resume.run.tracking.ledger import Ledger
from hpc_resume.run.tracking.trackers import DONE, INTERRUPTED, Row, needed

#: Metrics of one request. Source: MLflow's REST API, Log Batch.
_BATCH = 1000
_STATES = {DONE: "FINISHED", INTERRUPTED: "SCHEDULED"}


class Mlflow:
    """Sends metrics.

    Parameters
    ----------
    folder
        Where the run's id there is kept.
    run_id
        Of the run.
    name, params
        Of the run, for people; parameters are logged once.
    options
        ``tracking_uri``, ``experiment``, and others of ``mlflow.start_run``.
    """

    name = "mlflow"

    def __init__(
        self, folder: Path, run_id: str, name: str, params: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        self._mlflow = needed("mlflow", self.name)
        if (uri := options.pop("tracking_uri", None)) is not None:
            self._mlflow.set_tracking_uri(uri)
        if (experiment := options.pop("experiment", None)) is not None:
            self._mlflow.set_experiment(experiment)
        self._ledger = Ledger(folder / "mlflow.json", run_id)
        known = self._ledger.id
        if known is not None:
            #: The ``mlflow.ActiveRun``.
            self.object = self._mlflow.start_run(run_id=known)
        else:
            tags = {"hpc_resume.run_id": run_id, **options.pop("tags", {})}
            self.object = self._mlflow.start_run(**{"run_name": name, "tags": tags, **options})
            if params:
                self._mlflow.log_params(dict(params))
        self._id = self.object.info.run_id
        self._ledger.keep(self._id)
        self._client = self._mlflow.MlflowClient()

    def send(self, rows: Sequence[Row]) -> None:
        """Send metrics that were not sent yet."""
        kind = self._mlflow.entities.Metric
        metrics = [
            kind(name, value, round(1000 * time_s), step)
            for step, time_s, values in self._ledger.fresh(rows)
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _BATCH])

    def flush(self) -> None:
        """Do nothing: what was sent is there."""

    def close(self, outcome: str) -> None:
        """Do nothing: a run ends on the thread that it was started on."""

    def end(self, outcome: str) -> None:
        """Finish the run there, or say that it is continued."""
        self._mlflow.end_run(_STATES.get(outcome, "FAILED"))
