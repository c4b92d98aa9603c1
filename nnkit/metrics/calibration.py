"""Calibration: whether what is predicted with confidence p is right in p of the cases."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nnkit.losses.inputs import as_float
from nnkit.metrics.inputs import Mask, kept, labels_of

__all__ = ["CalibrationBins", "calibration_bins", "expected_calibration_error"]


class CalibrationBins(NamedTuple):
    """Sums over the examples whose confidence lies in each bin; add batches with ``jax.tree.map``.

    Attributes:
      examples: how many.
      confidence: the sum of their confidences, the largest probability of each.
      correct: how many of them were right.
    """

    examples: Float[Array, " bins"]
    confidence: Float[Array, " bins"]
    correct: Float[Array, " bins"]


def calibration_bins(
    predictions: Float[Array, "*batch classes"],
    targets: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    bins: int = 15,
    from_logits: bool = True,
    mask: Mask | None = None,
) -> CalibrationBins:
    """Confidence and correctness, summed in bins ((b-1)/bins, b/bins] of the confidence.

    The sums of batches add up: ``jax.tree.map(jnp.add, a, b)``. They are all that
    :func:`expected_calibration_error` and a reliability diagram need.

    Args:
      predictions: logits; probabilities with ``from_logits=False``.
      targets: integer labels or one-hot rows.
      bins: how many, of equal width.
      from_logits: whether to take the softmax first.
      mask: what is not 0 counts.

    Rows with NaN are left out: ``examples.sum()`` then falls short of the number of examples.

    >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    >>> sums = calibration_bins(probabilities, jnp.array([0, 1, 1]), bins=2, from_logits=False)
    >>> print(sums.examples, sums.correct)
    [0. 3.] [0. 2.]
    """
    name = "calibration_bins"
    if bins < 1:
        raise ValueError(f"{name} got bins={bins}: it must be at least 1")
    labels = labels_of(name, predictions, targets)
    p = as_float(predictions, "predictions")
    p = jax.nn.softmax(p) if from_logits else p
    confidence = jnp.max(p, -1)
    keep = kept(name, mask, labels.shape) & ~jnp.isnan(confidence)
    confidence = jnp.where(keep, confidence, 0).ravel()
    right = (jnp.argmax(p, -1) == labels) & keep
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    sums = jnp.stack([keep.ravel().astype(p.dtype), confidence, right.ravel().astype(p.dtype)])
    return CalibrationBins(*jnp.zeros((3, bins), p.dtype).at[:, index].add(sums))


def expected_calibration_error(sums: CalibrationBins) -> Float[Array, ""]:
    """By how much confidence misses accuracy, a mean over bins weighted by their examples.

    sum over bins of examples / all examples * |accuracy - mean confidence| (Naeini, Cooper and
    Hauskrecht, 2015; with 15 bins Guo et al., 2017). 0 without examples.

    >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    >>> sums = calibration_bins(probabilities, jnp.array([0, 1, 1]), from_logits=False)
    >>> print(f"{expected_calibration_error(sums):.3f}")
    0.400
    """
    gap = jnp.sum(jnp.abs(sums.correct - sums.confidence))
    return gap / jnp.maximum(jnp.sum(sums.examples), 1)
