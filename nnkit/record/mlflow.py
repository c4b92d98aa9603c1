"""MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnkit.record.logger import Logger, finite_part, picture

__all__ = ["mlflow"]

_QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
_MOST = 1000
"""Metrics in one request; MLflow refuses more."""


def mlflow(
    experiment: str = "nnkit",
    *,
    name: str | None = None,
    uri: str | None = None,
    run_id: str | None = None,
) -> Logger:
    """A logger that writes a run of MLflow.

    Metrics are exact. MLflow has no histograms: of each array its ``min``, ``q25``, ``median``, ``q75``, ``max``
    are metrics ``histogram/.../median``, of the finite numbers, and ``not_finite`` counts the others. Images
    are PNG artifacts ``images/NAME/STEP.png``. Settings are parameters; one that changed since an earlier
    part of the same run is refused by MLflow.

    Args:
      experiment: its name; made where there is none.
      name: the run's.
      uri: of the tracking server or store; by default MLflow's own, that is ``MLFLOW_TRACKING_URI``.
      run_id: of a run to go on with, instead of a new one.

    Raises:
      ImportError: mlflow is not installed; the message names the extra.

    ::

        logger = record.mlflow("digits", name="seed 0", uri="http://localhost:5000")
        train.fit(..., callbacks=record.log_to(logger))
    """
    try:
        from mlflow.tracking import MlflowClient  # type: ignore
    except ImportError:
        raise ImportError("runs of MLflow need mlflow: pip install nnkit[mlflow]") from None
    client = MlflowClient(uri)
    if run_id is None:
        found = client.get_experiment_by_name(experiment)
        home = client.create_experiment(experiment) if found is None else found.experiment_id
        started = client.create_run(home, run_name=name).info.run_id
    else:
        client.update_run(run_id, status="RUNNING")
        started = run_id
    return _MLflow(client, started)


class _MLflow:
    def __init__(self, client: Any, run_id: str):
        self._client, self.run_id = client, run_id

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        from mlflow.entities import Metric  # type: ignore

        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), float(value), now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MOST):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _MOST])

    def histograms(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        found: dict[str, float] = {}
        for name, array in values.items():
            numbers = finite_part(array)
            if numbers.size:
                quantiles = np.quantile(numbers, list(_QUANTILES.values()))
                found |= {f"histogram/{name}/{q}": v for q, v in zip(_QUANTILES, quantiles, strict=True)}
            if numbers.size < np.size(array):
                found[f"histogram/{name}/not_finite"] = np.size(array) - numbers.size
        self.scalars(step, found)

    def images(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        for name, image in values.items():
            file = f"images/{os.path.normpath('/' + _name(name)).lstrip('/')}/{step}.png"
            self._client.log_image(self.run_id, picture(name, image), file)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], /) -> None:
        from mlflow.entities import Param  # type: ignore

        if not metrics:  # at the end they would be the same
            self._client.log_batch(
                self.run_id, params=[Param(_name(name), str(value)) for name, value in settings.items()]
            )

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


def _name(name: str) -> str:
    """A name with nothing in it that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name)
