"""Alpha dropout, for self-normalising networks."""

from __future__ import annotations

import jax.numpy as jnp

from nnkit.checks import check_probability, is_static_number
from nnkit.layers.dropout import inverse, keep_mask, noisy
from nnkit.types import Array, Layer

__all__ = ["alpha_dropout"]

_LOWEST = -1.7580993408473766
"""What SELU tends to at -∞, -λα with λ and α of Klambauer et al."""


def alpha_dropout(rate: float | Array) -> Layer:
    """Sets each element to SELU's lowest value with probability ``rate`` while training; keeps mean and variance.

    ``y = a (m x + (1 - m) l) + b`` with a Bernoulli(1 - rate) mask m, SELU's limit l = -1.758,
    ``a = 1 / sqrt((1 - rate)(1 + rate l²))`` and ``b = -a rate l``: where x has mean 0 and variance 1, so has
    y. At test time y = x. A traced rate of 1 gives 0, the limit.

    Args:
      rate: the probability of dropping, in [0, 1); may be a traced scalar.

    Raises:
      ValueError: for a rate outside [0, 1).
      LayerError: without a key when train=True.

    Source: Klambauer et al. 2017, "Self-normalizing neural networks"; as in PyTorch and Keras.

    >>> x = jax.random.normal(jax.random.key(0), (200, 200))
    >>> y, _ = layers.alpha_dropout(0.3).apply({}, {}, x, key=jax.random.key(1), train=True)
    >>> abs(float(y.mean())) < 0.02, abs(float(y.std()) - 1) < 0.02
    (True, True)
    """
    check_probability(rate, "alpha_dropout(rate)")

    def training(key: Array, x: Array) -> Array:
        inside = inverse((1 - rate) * (1 + rate * _LOWEST**2))
        some = inside > 0
        a = jnp.where(some, jnp.sqrt(jnp.where(some, inside, 1)), 0)
        b = -a * rate * _LOWEST
        y = jnp.where(keep_mask(key, rate, x.shape), x, jnp.asarray(_LOWEST, x.dtype))
        return y * a.astype(x.dtype) + b.astype(x.dtype)

    return noisy("alpha_dropout", training, off=is_static_number(rate) and float(rate) == 0.0)
