"""Metrics that are means over examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nnkit import checks
from nnkit.losses.inputs import as_float, one_hot
from nnkit.metrics.inputs import Mask, classes_and_labels, kept, labels_of

__all__ = ["accuracy", "masked_mean", "perplexity", "top_k_accuracy"]


def accuracy(
    predictions: Float[Array, "*batch classes"] | Int[Array, "*batch"],
    targets: Int[Array, "*batch"] | Float[Array, "*batch classes"],
) -> Float[Array, "*batch"]:
    """1 where the predicted class is the target's, else 0; a row of scores with NaN is wrong.

    ``predictions`` may also be classes, integers or bools of the labels' shape, which for a yes or
    no are ``logits > 0``. A negative label is never right.

    >>> print(accuracy(jnp.array([[2.0, 1.0], [jnp.nan, 1.0]]), jnp.array([0, 0])))
    [1. 0.]
    """
    predicted, labels, _ = classes_and_labels("accuracy", predictions, targets)
    return ((predicted == labels) & (labels >= 0)).astype(jnp.float32)


def top_k_accuracy(
    predictions: Float[Array, "*batch classes"],
    targets: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    k: int = 5,
) -> Float[Array, "*batch"]:
    """1 where the target's class is among the ``k`` largest scores, else 0.

    Among equal scores the first come first, so ``k=1`` is :func:`accuracy`. (scikit-learn's
    function lets the last come first.) A row with NaN is wrong.

    >>> print(top_k_accuracy(jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([1, 2]), k=2))
    [1. 0.]
    """
    labels = labels_of("top_k_accuracy", predictions, targets)
    scores = as_float(predictions, "predictions")
    classes = scores.shape[-1]
    if checks.is_static_number(k) and not 1 <= k <= classes:
        raise ValueError(f"top_k_accuracy got k={k} for {classes} classes: k must be in 1..{classes}")
    # The rank of the target instead of a sort: one pass, and `k` may be traced.
    hit = one_hot(labels, classes)
    own = jnp.sum(jnp.where(hit, scores, 0), -1, keepdims=True)
    before = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1) < labels[..., None]
    rank = jnp.sum((scores > own) | (before & (scores == own)), -1)
    right = (rank < k) & jnp.any(hit, -1) & ~jnp.any(jnp.isnan(scores), -1)
    return right.astype(jnp.float32)


def masked_mean(values: Float[Array, "*shape"], mask: Mask | None = None) -> Float[Array, ""]:
    """The mean of the values whose mask is not 0; 0 if there are none.

    What is masked may be NaN. The mask covers the leading axes of ``values``.

    >>> print(masked_mean(jnp.array([1.0, 0.0, jnp.nan]), jnp.array([True, True, False])))
    0.5
    """
    values = as_float(values, "values")
    keep = kept("masked_mean", mask, values.shape)
    total = jnp.sum(jnp.where(keep, values, 0))
    return total / jnp.maximum(jnp.sum(keep), 1).astype(values.dtype)


def perplexity(
    negative_log_likelihoods: Float[Array, "*shape"], mask: Mask | None = None
) -> Float[Array, ""]:
    """exp of the mean negative log-likelihood (in nats), 1 if all are masked.

    Not additive: over several batches take the mean of all the likelihoods first, since the mean of
    the batches' perplexities is too large.

    >>> print(perplexity(jnp.log(jnp.array([2.0, 8.0]))).round(4))
    4.0
    """
    return jnp.exp(masked_mean(negative_log_likelihoods, mask))
