"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnkit.record.logger import Logger, finite_part, picture

__all__ = ["wandb"]


def wandb(project: str = "nnkit", *, bins: int = 64, **options: Any) -> Logger:
    """A logger that writes a run of Weights & Biases.

    ``mode="offline"`` needs no account and no network: the run goes into a folder ``wandb/``, and
    ``wandb sync`` sends it later. Histograms are of the finite numbers; where some are not, their count is a
    scalar ``.../not_finite``.

    Args:
      project: its name.
      bins: of histograms.
      options: what else ``wandb.init`` takes: ``name``, ``mode``, ``dir``, ``id`` and ``resume`` ...

    Raises:
      ImportError: wandb is not installed; the message names the extra.

    ::

        logger = record.wandb("digits", name="seed 0", mode="offline")
        train.fit(..., callbacks=record.log_to(logger))
    """
    try:
        import wandb as library  # type: ignore
    except ImportError:
        raise ImportError("runs of Weights & Biases need wandb: pip install nnkit[wandb]") from None
    start: Any = library.init  # type: ignore
    return _Wandb(library, start(project=project, **options), bins)


class _Wandb:
    def __init__(self, library: Any, run: Any, bins: int):
        self._library, self.run, self._bins = library, run, bins

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        self.run.log({name: float(value) for name, value in values.items()}, step=step)

    def histograms(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        found: dict[str, Any] = {}
        for name, array in values.items():
            numbers = finite_part(array)
            if numbers.size:
                counted = np.histogram(numbers, self._bins)
                found[name] = self._library.Histogram(np_histogram=counted)
            if numbers.size < np.size(array):
                found[f"{name}/not_finite"] = np.size(array) - numbers.size
        self.run.log(found, step=step)

    def images(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        pictures = {name: self._library.Image(picture(name, image)) for name, image in values.items()}
        self.run.log(pictures, step=step)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], /) -> None:
        self.run.config.update(dict(settings), allow_val_change=True)
        self.run.summary.update(dict(metrics))

    def close(self) -> None:
        self.run.finish()
