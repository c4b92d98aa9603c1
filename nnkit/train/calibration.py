"""Temperature scaling: confidences that are right as often as they say."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from nnkit.losses import check_targets, softmax_cross_entropy
from nnkit.losses.inputs import as_float, as_labels

__all__ = ["fit_temperature"]

_WIDEST = 20.0
"""The search goes over exp(±20) / the largest difference of logits: float32 shows none smaller to others."""
_HALVINGS = 30
_NEWTON_STEPS = 4


def fit_temperature(
    logits: Float[Array, "examples classes"] | np.ndarray, labels: Int[Array, " examples"] | np.ndarray
) -> Float[Array, ""]:
    """The temperature T at which softmax(logits / T) has the smallest negative log-likelihood on a validation set.

    ``T = argmin_T mean_i( logsumexp(z_i / T) - z_i[label_i] / T )``. In b = 1/T this is convex with the
    derivative ``mean_i( E[z_i] - z_i[label_i] )``, E being over the classes by softmax(b z_i). Its root is
    found by halving an interval of log b and then by Newton's steps, compiled: to rounding in float32
    too, where a minimum searched by its values would be known to half the digits only.

    A network that was trained long is too sure of itself, T > 1; the class that it predicts stays the same.
    Use ``logits / T`` on the test set.

    Shapes: logits (examples, classes), labels (examples,) of integers; a scalar.

    Raises:
      TypeError, ValueError: for labels out of range or of another number, logits that are not finite.
      ValueError: where there is no such T: the logits are right everywhere (the lower T, the better), or the
        labels' are not above the average (the higher, the better). Traced, the result is then the end of the
        range searched.

    Source: Guo et al. 2017, "On calibration of modern neural networks".

    >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])  # 98% sure, and right in 75%
    >>> temperature = train.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
    >>> print(f"{temperature:.3f} {jax.nn.softmax(logits / temperature)[0, 0]:.3f}")
    3.641 0.750
    """
    if jnp.ndim(logits) != 2 or jnp.shape(labels) != jnp.shape(logits)[:1]:
        raise ValueError(
            "fit_temperature takes logits (examples, classes) and labels (examples,), got "
            f"{jnp.shape(logits)} and {jnp.shape(labels)}"
        )
    if 0 in jnp.shape(logits):
        raise ValueError(f"fit_temperature got no logits, their shape is {jnp.shape(logits)}")
    z = as_float(logits, "logits")
    concrete = not isinstance(logits, Tracer) and not isinstance(labels, Tracer)
    if concrete:
        check_targets(softmax_cross_entropy, z, np.asarray(labels))
        bad = np.flatnonzero(~np.isfinite(np.asarray(z)).all(-1))
        if bad.size:
            raise ValueError(
                f"fit_temperature got logits that are not finite in {bad.size} of {len(z)} rows, the first of them "
                f"{bad[0]}: {np.asarray(z)[bad[0]]}"
            )
    found = _fit(z, as_labels(labels))
    if concrete and not found.has_high:
        raise ValueError(
            "fit_temperature finds no temperature: the labels' logits are not above the average of their rows, so the "
            "higher it is the better; are these the labels of these logits?"
        )
    if concrete and not found.has_low:
        raise ValueError(
            "fit_temperature finds no temperature: all examples are right, so the lower it is the better; fit it on "
            "validation examples of which the network gets some wrong"
        )
    return found.temperature


class _Found(NamedTuple):
    temperature: Array
    has_low: Array  # whether a low temperature is too low
    has_high: Array


@jax.jit
def _fit(z: Array, labels: Array) -> _Found:
    # Against the label's logit: what is averaged is then small where the sums nearly cancel.
    z = z - jnp.take_along_axis(z, labels[:, None], axis=1)
    scale = jnp.max(jnp.abs(z))
    z = z / jnp.where(scale > 0, scale, 1)
    slope = jax.jit(partial(_slope, z))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        is_above = slope(jnp.exp(middle))[0] > 0  # the root is below
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    ends = jnp.asarray(-_WIDEST, z.dtype), jnp.asarray(_WIDEST, z.dtype)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, ends)

    def polish(_: Any, b: Array) -> Array:
        first, second = slope(b)
        step = first / jnp.where(second > 0, second, jnp.inf)
        return jnp.clip(b - step, jnp.exp(ends[0]), jnp.exp(ends[1]))

    b = jax.lax.fori_loop(0, _NEWTON_STEPS, polish, jnp.exp((low + high) / 2))
    at_ends = jnp.mean(jnp.max(z, -1)), jnp.mean(z)  # the slopes at b = ∞ and b = 0
    return _Found(jnp.where(scale > 0, scale, 1) / b, at_ends[0] > 0, at_ends[1] < 0)


def _slope(z: Array, b: Array) -> tuple[Array, Array]:
    """The first and the second derivative of the mean negative log-likelihood in b = 1/T."""
    p = jax.nn.softmax(b * z)
    mean = jnp.sum(p * z, -1)
    return jnp.mean(mean), jnp.mean(jnp.sum(p * jnp.square(z - mean[:, None]), -1))
