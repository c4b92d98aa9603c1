"""Losses of regression: what a number missed its target by.

Each takes predictions and targets of one and the same shape and gives one value an example, the
mean over all axes but the first. (Keras takes the mean over the last axis only and optax none at
all; the mean over a batch is the same in all three.) Half precision is computed, and the loss
returned, in float32. Targets are floating: integers here are more often class labels or unscaled
pixels than numbers to be met.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.losses import inputs

__all__ = ["half_squared_error", "huber", "mean_absolute_error", "mean_squared_error"]


def mean_squared_error(
    predictions: Float[Array, "batch ..."], targets: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """The mean of (predictions - targets)² over each example, PyTorch's and Keras's function.

    Raises:
      ValueError: shapes that differ; (batch, 1) against (batch,) would broadcast to (batch, batch).
      TypeError: integer predictions or targets.

    >>> print(mean_squared_error(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [0.0, 0.0]])))
    [2. 0.]
    """
    name = "mean_squared_error"
    return inputs.mean_over_examples(name, jnp.square(_error(name, predictions, targets)))


def half_squared_error(
    predictions: Float[Array, "batch ..."],
    targets: Float[Array, "batch ..."],
    *,
    reduce: Literal["mean", "sum"] = "mean",
) -> Float[Array, " batch"]:
    """The mean of ½ (predictions - targets)² over each example; the elements are optax's ``l2_loss``.

    Args:
      predictions, targets: floating, of equal shape.
      reduce: over an example's axes. "sum" is ½ ||predictions - targets||², up to a constant the
        negative log-likelihood of a Gaussian of variance 1, as in the bound of a variational
        autoencoder.

    Raises:
      As :func:`mean_squared_error`.

    >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 4.0]])
    >>> print(half_squared_error(x, y), half_squared_error(x, y, reduce="sum"))
    [1.25] [2.5]
    """
    name = "half_squared_error"
    return inputs.mean_over_examples(name, 0.5 * jnp.square(_error(name, predictions, targets)), reduce)


def mean_absolute_error(
    predictions: Float[Array, "batch ..."], targets: Float[Array, "batch ..."]
) -> Float[Array, " batch"]:
    """The mean of |predictions - targets| over each example, PyTorch's and Keras's function.

    Where they are equal the slope is 0, as in PyTorch.

    Raises:
      As :func:`mean_squared_error`.

    >>> print(mean_absolute_error(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 4.0]])))
    [1.5]
    """
    name = "mean_absolute_error"
    error = _error(name, predictions, targets)
    # jnp.abs has slope 1 at 0: a network that is right would be pushed away from it.
    return inputs.mean_over_examples(name, error * jax.lax.stop_gradient(jnp.sign(error)))


def huber(
    predictions: Float[Array, "batch ..."],
    targets: Float[Array, "batch ..."],
    *,
    delta: float | Float[Array, ""] = 1.0,
) -> Float[Array, " batch"]:
    """Half squared error up to ``delta``, and from there on a line; the mean over each example.

    With e = predictions - targets: ½ e² where |e| <= delta, else delta (|e| - ½ delta). The slope
    is e clipped to ±delta. Elements as optax's ``huber_loss``, PyTorch's ``huber_loss`` and Keras's
    ``Huber`` (Huber, 1964). PyTorch's ``smooth_l1_loss`` is this divided by delta.

    Args:
      predictions, targets: floating, of equal shape.
      delta: positive; may be traced.

    Raises:
      As :func:`mean_squared_error`.
      ValueError: a ``delta`` that is not positive and finite.

    >>> print(huber(jnp.array([0.5, 3.0]), jnp.zeros(2)))
    [0.125 2.5  ]
    """
    inputs.check_positive("huber", "delta", delta)
    error = jnp.abs(_error("huber", predictions, targets))
    delta = jnp.asarray(delta).astype(error.dtype)
    quadratic = jnp.minimum(error, delta)
    return inputs.mean_over_examples("huber", 0.5 * jnp.square(quadratic) + delta * (error - quadratic))


def _error(name: str, predictions: Any, targets: Any) -> Array:
    inputs.check_same_shape(name, predictions, targets)
    predictions = inputs.as_float(predictions, "predictions")
    return predictions - inputs.as_float(targets, "targets").astype(predictions.dtype)
