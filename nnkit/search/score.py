"""A trial's metric and health, read off its history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from nnkit.checks import unknown_name

__all__ = ["health", "score"]


def score(
    history: Mapping[str, Any],
    metric: str,
    at: Literal["last", "best"] = "last",
    mode: Literal["min", "max"] = "min",
    *,
    axes: int = 1,
    stopped: int | None = None,
) -> np.ndarray:
    """The metric of each member of a trial.

    Args:
      history: arrays (seeds, [folds,] epochs), or (seeds, [folds]) of what is no curve.
      metric: its name.
      at: "last", after the last epoch that was trained; "best", of the best of them, NaN and inf left aside.
        An epoch was trained if ``step`` went on in it, or ``epoch`` where the history has no steps.
      mode: whether a low or a high value is the best.
      axes: how many axes number the members: 1, with folds 2.
      stopped: the epochs that were trained where a pruner stopped the trial.

    Returns:
      (seeds, [folds]) of float64; NaN where nothing was trained, or nothing was finite.

    Raises:
      ValueError: the history has no such metric, or it has another shape.

    >>> history = {"step": np.array([[5, 10, 10]]), "val_loss": np.array([[0.3, 0.4, np.nan]])}
    >>> search.score(history, "val_loss").tolist(), search.score(history, "val_loss", "best").tolist()
    ([0.4], [0.3])
    """
    if metric not in history:
        raise unknown_name("metric", metric, history)
    found = np.asarray(history[metric], dtype=np.float64)
    if found.ndim not in (axes, axes + 1):
        raise ValueError(
            f"the metric {metric!r} has shape {found.shape}: a member's metric is a number, or one number an epoch"
        )
    if found.ndim == axes:
        return found
    mask = _trained(history, found.shape, stopped)
    if at == "best":
        worst = math.inf if mode == "min" else -math.inf
        usable = mask & np.isfinite(found)
        found = np.where(usable, found, worst)
        best = found.min(-1) if mode == "min" else found.max(-1)
        return np.where(usable.any(-1), best, np.nan)
    last = mask.shape[-1] - 1 - np.argmax(mask[..., ::-1], axis=-1)
    value = np.take_along_axis(found, last[..., None], axis=-1)[..., 0]
    return np.where(mask.any(-1), value, np.nan)


def health(history: Mapping[str, Any], *, axes: int = 1, stopped: int | None = None) -> dict[str, Any]:
    """How a trial went: the epochs each member had, and where its numbers ceased to be finite.

    Returns:
      ``finite``; ``epochs``, nested as the members are; and ``nonfinite``, by metric the first epoch, from 1
      on, in which a member's was inf or NaN (None for a member without), of the metrics that have one. A
      number that is no curve counts as an epoch.

    >>> search.health({"loss": np.array([[0.3, np.nan], [0.2, 0.1]])})
    {'finite': False, 'epochs': [2, 2], 'nonfinite': {'loss': [2, None]}}
    """
    curves = {name: a for name, a in history.items() if np.ndim(a) == axes + 1}
    shape = next((np.shape(a) for a in curves.values()), None)
    mask = None if shape is None else _trained(history, shape, stopped)
    nonfinite = {}
    for name, a in history.items():
        bad = ~np.isfinite(np.asarray(a, dtype=np.float64))
        if name in curves and mask is not None and bad.shape == mask.shape:
            bad = bad & mask
        if bad.any():
            nonfinite[name] = _first(bad if name in curves else bad[..., None])
    epochs = None if mask is None else mask.sum(-1).tolist()
    return {"finite": not nonfinite, "epochs": epochs, "nonfinite": nonfinite}


def _first(bad: np.ndarray) -> list[Any]:
    """The epoch, from 1 on, of the first True on the last axis; None where there is none."""
    epochs = (1 + bad.argmax(-1)).astype(object)
    epochs[~bad.any(-1)] = None
    return epochs.tolist()


def _trained(history: Mapping[str, Any], shape: tuple[int, ...], stopped: int | None) -> np.ndarray:
    """Which epochs each member was trained in, of ``shape``."""
    mask = np.ones(shape, dtype=bool)
    count = history.get("step", history.get("epoch"))
    if count is not None and np.shape(count) == shape:
        count = np.asarray(count, dtype=np.float64)
        mask = np.diff(count, axis=-1, prepend=-1) > 0
        if "step" in history:  # all 0: no step was made; else they may be counted from 0 on
            mask &= count[..., -1:] > 0
    if stopped is not None:
        mask = mask & (np.arange(shape[-1]) < stopped)
    return mask
