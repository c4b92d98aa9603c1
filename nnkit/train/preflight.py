"""What a run makes sure of on the host before it starts, since compiled code cannot raise."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from nnkit.data import Splits, check_batch_size, check_data
from nnkit.optim import report
from nnkit.optim.plateau import monitors
from nnkit.types import PyTree, Trainer, TrainState

__all__ = [
    "arrays_of",
    "check_monitored",
    "check_steps",
    "check_suited",
    "checked_batch_size",
    "checked_data",
    "number_of_examples",
    "specs",
    "whole",
]

RESERVED = frozenset({"epoch", "step", "seconds"})
"""What a row of the history has beside the metrics."""


def checked_data(trainer: Trainer, ts: TrainState, data: Any, name: str) -> PyTree:
    """The arrays of ``data``, if they can be trained on and their targets suit the trainer's loss."""
    arrays = arrays_of(data, name)
    check_suited(trainer, ts, arrays, name)
    return arrays


def check_suited(trainer: Trainer, ts: TrainState, arrays: PyTree, name: str) -> None:
    """Calls the trainer's own check, and says of which data it speaks."""
    try:
        trainer.check(ts, arrays)
    except (TypeError, ValueError) as error:
        error.add_note(f"in {name}")
        raise


def arrays_of(data: Any, name: str) -> PyTree:
    """The arrays of ``data`` after the checks that need no trainer."""
    if isinstance(data, Splits):
        raise TypeError(
            f"{name} are all the splits of a data set: pass one of them, splits.train for instance"
        )
    arrays = getattr(data, "arrays", data)
    if isinstance(arrays, list):
        arrays = tuple(arrays)
    if isinstance(arrays, tuple) and len(arrays) == 2:
        check_data(arrays[0], arrays[1], name=name)
    else:
        check_data(arrays, name=name)
    return arrays


def number_of_examples(arrays: PyTree) -> int:
    """The length of the arrays' common leading axis."""
    lengths = {a.shape[0] if getattr(a, "ndim", 0) else 0 for a in jax.tree.leaves(arrays)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"data must be arrays with one common, non-empty leading axis, got lengths {sorted(lengths)}"
        )
    return lengths.pop()


def whole(value: Any, what: str, least: int = 1) -> int:
    """``value`` as an int of at least ``least``, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def checked_batch_size(batch_size: int, n: int) -> int:
    """``batch_size``, or ``n`` where there are fewer examples than that."""
    check_batch_size(batch_size, max(n, batch_size) if isinstance(batch_size, int | np.integer) else n)
    return min(int(batch_size), n)


def specs(arrays: PyTree, batch_size: int) -> PyTree:
    """What a batch of the arrays looks like on the device."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype)),
        arrays,
    )


def check_steps(
    trainer: Trainer, ts: TrainState, arrays: PyTree, batch_size: int, tail: int
) -> dict[str, Any]:
    """Traces a full and an uneven last step, so that what is wrong with either is said now.

    Returns the shapes of a step's metrics by name.
    """
    _, metrics = jax.eval_shape(trainer.step, ts, specs(arrays, batch_size))
    _check_metrics(metrics)
    if tail:
        try:
            jax.eval_shape(trainer.step, ts, specs(arrays, tail))
        except ValueError as error:
            error.add_note(
                f"in the last batch of each epoch, which has {tail} of {batch_size} examples: pass "
                "drop_last=True to leave it out, or another batch_size"
            )
            raise
    return metrics


def check_monitored(
    trainer: Trainer, ts: TrainState, metrics: dict[str, Any], held_out: PyTree | None
) -> dict[str, Any]:
    """Tries a report of the metrics that an epoch will have, so that a plateau's monitor is found now.

    Returns the shapes of those metrics by name, the validation metrics among them.
    """
    if held_out is not None:
        n = min(number_of_examples(held_out), 1000)
        found = jax.eval_shape(trainer.evaluate, ts, specs(held_out, n))
        metrics = metrics | {f"val_{name}": value for name, value in found.items()}
    if monitors(ts.opt_state):
        jax.eval_shape(report, ts.opt_state, metrics)
    return metrics


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, dict) or "loss" not in metrics:
        got = sorted(metrics) if isinstance(metrics, dict) else type(metrics).__name__
        raise ValueError(f"trainer.step must return metrics as a dict with 'loss' in it, got {got}")
    taken = sorted(RESERVED & set(metrics))
    if taken:
        raise ValueError(f"the metrics {taken} have names that the history needs: choose others")
    for name, metric in metrics.items():
        if metric.shape:
            raise ValueError(
                f"the metric {name!r} has shape {metric.shape} and must be one number: return its mean, or "
                "each entry under a name of its own"
            )
