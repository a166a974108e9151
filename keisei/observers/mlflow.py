"""MLflowObserver: the figures of each update for MLflow; needs the extra ``mlflow``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from keisei.events import Event, UpdateCompleted
from keisei.observers.background import BackgroundObserver
from keisei.observers.figures import figures_of
from keisei.observers.missing import require

__all__ = ["MLflowObserver"]

_NOT_ALLOWED = re.compile(r"[^\w\-. /:]")


class MLflowObserver(BackgroundObserver):
    """Logs to a run of MLflow, with environment steps as the step.

    A thread imports ``mlflow`` and talks to the tracking server; the loop never waits. It uses a
    client of its own and never the process's active run. Characters that a metric's name may not
    have become "_".

    Args:
        run_id: A run that exists; it is not ended. ``None`` makes one, and ends it.
        experiment: The name of the experiment of a new run; made if there is none.
        run_name: The name of a new run.
        tracking_uri: ``None`` takes MLflow's own setting.
        params: Parameters of a new run.
        max_pending: See ``BackgroundObserver``.

    Raises:
        ImportError: The extra is missing; names the command that installs it.
    """

    wanted = (UpdateCompleted,)

    def __init__(
        self,
        *,
        run_id: str | None = None,
        experiment: str = "Default",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        params: Mapping[str, object] | None = None,
        max_pending: int = 10_000,
    ) -> None:
        require("mlflow", "keisei.observers.mlflow", "mlflow", "mlflow")
        super().__init__(max_pending=max_pending)
        self._given = run_id
        self._experiment = experiment
        self._run_name = run_name
        self._uri = tracking_uri
        self._params = dict(params or {})
        self._client: Any = None
        self._run_id = ""

    @property
    def target(self) -> str:
        """The run."""
        return "MLflow's run"

    def open(self) -> None:
        """Begin a run, or take the given one."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        if self._given is not None:
            self._run_id = client.get_run(self._given).info.run_id
        else:
            found = client.get_experiment_by_name(self._experiment)
            number = (
                client.create_experiment(self._experiment) if found is None else found.experiment_id
            )
            self._run_id = client.create_run(number, run_name=self._run_name).info.run_id
            for name, value in self._params.items():
                client.log_param(self._run_id, name, value)
        self._client = client

    def write(self, event: Event) -> None:
        """Log one update, in one request."""
        from mlflow.entities import Metric

        assert isinstance(event, UpdateCompleted)  # noqa: S101 - what is wanted
        when, step = int(event.time * 1000), event.num_steps
        self._client.log_batch(
            self._run_id,
            metrics=[
                Metric(_NOT_ALLOWED.sub("_", name), value, when, step)
                for name, value in figures_of(event).items()
            ],
        )

    def close(self) -> None:
        """End the run, unless it was given."""
        client, self._client = self._client, None
        if self._given is None and client is not None:
            client.set_terminated(self._run_id)
