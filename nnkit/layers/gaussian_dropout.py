"""Noise of a normal distribution: Gaussian dropout, which multiplies, and Gaussian noise, which is added."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit.checks import check_probability, is_static_number
from nnkit.layers.dropout import inverse, noisy
from nnkit.tree import wide
from nnkit.types import Array, Layer

__all__ = ["gaussian_dropout", "gaussian_noise"]


def gaussian_dropout(rate: float | Array) -> Layer:
    """Multiplies each element by normal noise of mean 1 and variance rate / (1 - rate) while training.

    ``y = x (1 + s n)`` with ``s = sqrt(rate / (1 - rate))`` and n standard normal: mean and variance of the
    factor are those of inverted dropout at this rate. At test time y = x. A traced rate of 1, at which s has no
    bound, gives 0 as dropout does.

    Args:
      rate: the rate of the dropout that it stands for, in [0, 1); may be a traced scalar.

    Raises:
      ValueError: for a rate outside [0, 1).
      LayerError: without a key when train=True.

    Source: Srivastava et al. 2014, "Dropout", section 10; Keras's ``GaussianDropout``.

    >>> x = jnp.ones((100, 100))
    >>> y, _ = layers.gaussian_dropout(0.2).apply({}, {}, x, key=jax.random.key(0), train=True)
    >>> abs(float(y.mean()) - 1) < 0.02, abs(float(y.std()) - 0.5) < 0.02
    (True, True)
    """
    check_probability(rate, "gaussian_dropout(rate)")

    def training(key: Array, x: Array) -> Array:
        variance = rate * inverse(1 - rate)
        some = variance > 0
        # The root's derivative at 0 has no bound: a rate of 0 has its own branch.
        s = jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0)
        y = x * (1 + s.astype(x.dtype) * _normal(key, x))
        return jnp.where(jnp.asarray(rate) < 1, y, jnp.zeros((), x.dtype))

    return noisy("gaussian_dropout", training, off=is_static_number(rate) and float(rate) == 0.0)


def gaussian_noise(stddev: float | Array) -> Layer:
    """Adds normal noise of mean 0 and deviation ``stddev`` to each element while training.

    ``y = x + stddev n`` with n standard normal; at test time y = x.

    Args:
      stddev: the deviation, not negative; may be a traced scalar.

    Raises:
      ValueError: for a negative deviation.
      LayerError: without a key when train=True.

    Source: Bishop 1995, "Training with noise is equivalent to Tikhonov regularization"; Keras's
    ``GaussianNoise``.

    >>> x = jnp.zeros((100, 100))
    >>> y, _ = layers.gaussian_noise(0.5).apply({}, {}, x, key=jax.random.key(0), train=True)
    >>> abs(float(y.mean())) < 0.02, abs(float(y.std()) - 0.5) < 0.02
    (True, True)
    """
    if is_static_number(stddev) and not stddev >= 0:
        raise ValueError(f"gaussian_noise(stddev) must not be negative, got {stddev}")

    def training(key: Array, x: Array) -> Array:
        return x + jnp.asarray(stddev, x.dtype) * _normal(key, x)

    # Noise added to the data stands for more data, not for uncertain weights: no sample needs it.
    off = is_static_number(stddev) and float(stddev) == 0.0
    return noisy("gaussian_noise", training, off=off, samples=False)


def _normal(key: Array, x: Array) -> Array:
    """Standard normal noise like x; drawn in float32 at least, since a half precision has few values to draw."""
    return jax.random.normal(key, x.shape, wide(x.dtype)).astype(x.dtype)
