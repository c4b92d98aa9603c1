"""Means of an epoch's metrics in compiled code, as good as the host's in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["epoch_means", "weighted_mean"]


def epoch_means(metrics: Mapping[str, Array], sizes: np.ndarray) -> dict[str, Array]:
    """What ``fit`` writes into an epoch's row: means over the examples of the steps that were taken.

    A step with the metric ``skipped`` has no part in them, and ``skipped`` itself is a count.

    Args:
      metrics: by name, one value for each step, (steps,).
      sizes: how many examples each step had, (steps,).

    >>> epoch_means({"loss": jnp.array([1.0, 4.0])}, np.array([2, 1]))
    {'loss': Array(2., dtype=float32)}
    """
    skipped = metrics.get("skipped")

    def mean(name: str, values: Array) -> Array:
        values = values.astype(values.dtype if values.dtype == jnp.float64 else jnp.float32)
        if name == "skipped":
            return jnp.sum(values)
        weights = jnp.asarray(sizes, values.dtype)
        if skipped is not None:
            taken = skipped == 0
            values, weights = (jnp.where(taken, x, 0) for x in (values, weights))
        return weighted_mean(values, weights)

    return {name: mean(name, values) for name, values in metrics.items()}


@jax.custom_jvp
def weighted_mean(values: Float[Array, " n"], weights: Float[Array, " n"]) -> Float[Array, ""]:
    """Σ wᵢ·vᵢ / Σ wᵢ in twice the precision of the arrays, rounded once; NaN where the weights are 0.

    Every sum and product is held as a rounded number and its error (Dekker 1971, "A floating-point
    technique for extending the available precision"), so in float32 it is what float64 would give. Its
    derivative is taken of the formula. The weights are whole numbers and have none.

    >>> values = jnp.array([1e8, 1.0, -1e8])
    >>> float(weighted_mean(values, jnp.ones(3))) == float(np.float32(1 / 3))
    True
    """
    high, low = _total(*_product(values, weights))
    count, rest = _total(weights, jnp.zeros_like(weights))
    quotient = high / count
    product, error = _product(quotient, count)
    remainder = ((high - product) - error) + (low - quotient * rest)
    mean = quotient + remainder / count
    # What is infinite has no error that could be held.
    return jnp.where(jnp.isfinite(mean), mean, jnp.sum(values * weights) / jnp.sum(weights))


@weighted_mean.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    values, weights = primals
    return weighted_mean(values, weights), jnp.sum(tangents[0] * weights) / jnp.sum(weights)


def _total(high: Array, low: Array) -> tuple[Array, Array]:
    """The sum of (n,) pairs as one pair, by halves."""
    while len(high) > 1:
        half = math.ceil(len(high) / 2)
        pad = (0, 2 * half - len(high))
        high, low = jnp.pad(high, pad), jnp.pad(low, pad)
        high, error = _sum(high[:half], high[half:])
        low = low[:half] + low[half:] + error
    return _sum(high[0], low[0])


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(x: Array) -> tuple[Array, Array]:
    kind = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant // 2)
    return high, x - high
