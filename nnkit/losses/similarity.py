"""Losses that compare two distributions or two directions, along the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.losses import inputs

__all__ = ["cosine_distance", "cosine_similarity", "kl_divergence"]


def kl_divergence(
    log_predictions: Float[Array, "*batch classes"], targets: Float[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """KL(targets || predictions) = sum_c t_c (log t_c - log_predictions_c), one value an example.

    The convention of optax's ``kl_divergence``: log-probabilities against probabilities, summed over
    the last axis. (PyTorch's ``kl_div`` has the elements, and its "mean" divides by the classes
    too; Keras takes two probabilities.) 0 log 0 is 0, and a log-probability of -inf costs nothing
    where the target is 0, both without NaN in the gradient; where the target is positive it costs
    inf. Along a target of exactly 0 the slope, truly -inf, is taken without its t log t part.

    Raises:
      TypeError: integer arguments.
      ValueError: shapes that differ.

    >>> log_predictions = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    >>> print(kl_divergence(log_predictions, jnp.array([[0.25, 0.75], [0.0, 1.0]])).round(4))
    [0.     0.6931]
    """
    inputs.check_same_shape("kl_divergence", log_predictions, targets)
    log_q = inputs.as_float(log_predictions, "log_predictions")
    t = inputs.as_float(targets, "targets").astype(log_q.dtype)
    if not t.ndim:
        raise ValueError("kl_divergence got scalars: it needs shape (..., classes)")
    log_t = jnp.log(jnp.where(t == 0, 1, t))
    return jnp.sum(t * (log_t - jnp.where((t == 0) & (log_q == -jnp.inf), 0, log_q)), -1)


def cosine_similarity(
    predictions: Float[Array, "*batch features"],
    targets: Float[Array, "*batch features"],
    *,
    epsilon: float | Float[Array, ""] = 1e-8,
) -> Float[Array, "*batch"]:
    """p·t / (max(|p|, epsilon) max(|t|, epsilon)) along the last axis, in [-1, 1].

    PyTorch's formula and ``epsilon``. (In optax epsilon is 0, and a floor of the squared norm.)
    The similarity to a vector of zeros is 0, with gradient 0: the formula's own slope there is
    1/epsilon, which would end a training run. Vectors of any length that the dtype can hold are
    compared without overflow.

    This grows as vectors agree: to train, minimise :func:`cosine_distance`.

    Raises:
      TypeError: integer arguments.
      ValueError: shapes that differ; a negative ``epsilon``.

    >>> x, y = jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([[4.0, 3.0], [1.0, 0.0]])
    >>> print(cosine_similarity(x, y).round(4))
    [0.96 0.  ]
    """
    inputs.check_same_shape("cosine_similarity", predictions, targets)
    inputs.check_positive("cosine_similarity", "epsilon", epsilon, zero=True)
    p = inputs.as_float(predictions, "predictions")
    t = inputs.as_float(targets, "targets").astype(p.dtype)
    if not p.ndim:
        raise ValueError("cosine_similarity got scalars: it needs shape (..., features)")
    epsilon = jnp.asarray(epsilon).astype(p.dtype)
    return jnp.sum(_unit(p, epsilon) * _unit(t, epsilon), -1)


def cosine_distance(
    predictions: Float[Array, "*batch features"],
    targets: Float[Array, "*batch features"],
    *,
    epsilon: float | Float[Array, ""] = 1e-8,
) -> Float[Array, "*batch"]:
    """1 - :func:`cosine_similarity`, in [0, 2], one value an example; Keras's loss is this less 1.

    >>> print(cosine_distance(jnp.array([[3.0, 4.0]]), jnp.array([[-3.0, -4.0]])))
    [2.]
    """
    return 1 - cosine_similarity(predictions, targets, epsilon=epsilon)


def _unit(x: Array, epsilon: Array) -> Array:
    """x / max(|x|, epsilon), and 0 with gradient 0 where x is 0."""
    # Scaled first: a square overflows at 1e20 in float32. The unit vector does not depend on the
    # scale, so no gradient goes through it.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    zero = largest == 0
    scale = jnp.where(zero, 1, largest)
    scaled = x / scale
    # At zeros the root of 1 is taken instead, because that of 0 has slope inf.
    norm = jnp.sqrt(jnp.where(zero, 1, jnp.sum(jnp.square(scaled), -1, keepdims=True)))
    return jnp.where(zero, 0, scaled / jnp.maximum(norm, epsilon / scale))
