"""Targets looked at before a run: values, which compiled code cannot refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nnkit.losses import binary, cross_entropy, inputs, regression, similarity
from nnkit.types import Spec

__all__ = ["check_targets"]


def check_targets(loss: Callable[..., Any], predictions: Spec, targets: Any) -> None:
    """Raises if ``targets`` are not what ``loss`` takes: for the training loop to call before a run.

    Knows the losses of :mod:`nnkit.losses`, also inside ``functools.partial`` and ``jax.jit``, with
    the options given there; any other function passes.

    Args:
      loss: the loss that the run will call.
      predictions: an array or ``jax.ShapeDtypeStruct``, what the model puts out for one batch.
        Its number of rows does not matter.
      targets: the targets of the whole data set, in memory or memory-mapped.

    Raises:
      TypeError: float labels where integer ones are needed, or strings.
      ValueError: shapes that do not fit (all axes but the first); labels out of range, with the
        value, where it stands and the range; targets that are not finite, not in [0, 1] (binary),
        not -1 or 1 (hinge), or distributions that are negative somewhere or do not sum to 1.

    >>> predictions = jax.ShapeDtypeStruct((64, 10), np.float32)
    >>> check_targets(cross_entropy.softmax_cross_entropy, predictions, np.array([3, 10]))
    Traceback (most recent call last):
        ...
    ValueError: softmax_cross_entropy: label targets[1] is 10 (1 of 2 are out of place), and 10 classes \
have labels 0..9: renumber the labels, or pass ignore_label= for those that stand for 'no label'
    """
    loss, options = _unwrap(loss)
    check = next((check for known, check in _CHECKS if known is loss), None)
    if check is None:
        return
    targets = np.asarray(targets)
    name = getattr(loss, "__name__", "loss")
    if targets.dtype.kind in "OSU":
        raise TypeError(
            f"{name} got targets of dtype {targets.dtype}, not numbers: for names of classes write "
            "names, targets = np.unique(targets, return_inverse=True)"
        )
    if not targets.ndim:
        raise ValueError(f"{name} got one target, a scalar: pass an array with one row for each example")
    rows = jax.ShapeDtypeStruct(
        (*predictions.shape[:1], *targets.shape[1:]), jax.dtypes.canonicalize_dtype(targets.dtype)
    )
    example = jax.ShapeDtypeStruct(predictions.shape, predictions.dtype)
    jax.eval_shape(functools.partial(loss, **options), example, rows)
    check(name, predictions, targets, options)


def _unwrap(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function inside partials and jits, with the keywords bound on the way; outer ones win."""
    options: dict[str, Any] = {}
    while True:
        if isinstance(loss, functools.partial) and not loss.args:
            loss, options = loss.func, {**loss.keywords, **options}
        elif isinstance(loss, jax.stages.Wrapped):
            loss = getattr(loss, "__wrapped__", None)
        else:
            return loss, options


def _labels(name: str, predictions: Spec, targets: np.ndarray, options: dict[str, Any]) -> None:
    classes = predictions.shape[-1]
    inputs.check_label_range(name, targets, classes, options.get("ignore_label"))


def _labels_or_distributions(
    name: str, predictions: Spec, targets: np.ndarray, options: dict[str, Any]
) -> None:
    labels = np.issubdtype(targets.dtype, np.integer)
    (_labels if labels else _distributions)(name, predictions, targets, options)


def _finite(name: str, _predictions: Spec, targets: np.ndarray, _options: dict[str, Any]) -> None:
    _refuse(name, targets, ~np.isfinite(targets), "targets must be finite: drop or repair these rows")


def _distributions(name: str, predictions: Spec, targets: np.ndarray, options: dict[str, Any]) -> None:
    _finite(name, predictions, targets, options)
    _refuse(name, targets, targets < 0, "probabilities are not negative; are these logits?")
    # A sum of a few hundred numbers rounded to 8 bits (bfloat16) or 11 (float16) misses 1 by this much.
    tolerance = 1e-3 if targets.dtype.itemsize >= 4 else 1e-2
    sums = targets.sum(-1, dtype=np.float64)
    off = abs(sums - 1) > tolerance
    if off.any():
        row = inputs.first_bad(sums, off).replace("targets[", "targets.sum(-1)[")
        raise ValueError(f"{name}: {row}, and each row is a distribution that sums to 1: divide by the sum")


def _unit_interval(name: str, predictions: Spec, targets: np.ndarray, options: dict[str, Any]) -> None:
    _finite(name, predictions, targets, options)
    outside = (targets < 0) | (targets > 1)
    _refuse(name, targets, outside, "targets are in [0, 1]: for targets -1 and 1 write (targets + 1) / 2")


def _plus_or_minus_one(name: str, predictions: Spec, targets: np.ndarray, options: dict[str, Any]) -> None:
    _finite(name, predictions, targets, options)
    other = abs(targets) != 1
    _refuse(name, targets, other, "targets are -1 or 1: for targets 0 and 1 write 2 * targets - 1")


def _refuse(name: str, targets: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if bad.any():
        raise ValueError(f"{name}: {inputs.first_bad(targets, bad)}, and {rule}")


_CHECKS: tuple[tuple[Callable[..., Any], Callable[..., None]], ...] = (
    (cross_entropy.softmax_cross_entropy, _labels_or_distributions),
    (cross_entropy.negative_log_likelihood, _labels),
    (binary.binary_cross_entropy_with_logits, _unit_interval),
    (binary.hinge, _plus_or_minus_one),
    (regression.mean_squared_error, _finite),
    (regression.half_squared_error, _finite),
    (regression.mean_absolute_error, _finite),
    (regression.huber, _finite),
    (similarity.kl_divergence, _distributions),
    (similarity.cosine_similarity, _finite),
    (similarity.cosine_distance, _finite),
)
