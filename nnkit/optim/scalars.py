"""Hyper-parameters: checked once when they are plain numbers, used alike when they are traced.

A hyper-parameter is a Python or numpy number, or a scalar array that may be traced (a mapped grid,
a hypergradient, a rate set from outside without recompiling). Only plain numbers are ever compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from nnkit.checks import is_static_number

__all__ = [
    "Scalar",
    "as_scalar",
    "check_dtype",
    "check_learning_rate",
    "divider",
    "increment",
    "inverse",
    "inverse_root",
    "quotient",
    "total_weight",
    "unbiased",
]

Scalar: TypeAlias = float | Array
"""A number, or a scalar array that may be traced."""


def as_scalar(value: Any, name: str, interval: str = "(-inf, inf)", why: str = "") -> Any:
    """``value`` as a Python number or a scalar array, or an error that names the argument.

    A numpy number becomes a Python one, which takes the dtype of whatever it multiplies.

    Args:
      value: what the user passed.
      name: the argument's name, for the message.
      interval: where a plain number must lie, ``[0, 1)`` for instance; NaN lies nowhere.
      why: ends the message.

    >>> as_scalar(np.float64(0.5), "b1", "[0, 1)")
    0.5
    >>> as_scalar(1.0, "b1", "[0, 1)", "it is the decay of an average")
    Traceback (most recent call last):
    ValueError: b1 must be in [0, 1), got 1.0: it is the decay of an average
    """
    why = f": {why}" if why else ""
    if is_static_number(value):
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} must be in {interval}, got {value}{why}")
        return value.item() if isinstance(value, np.number) else value
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}{why}")
    if value.shape != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {value.shape}: map over its values with jax.vmap"
        )
    return jnp.asarray(value)


def check_learning_rate(value: Any) -> Any:
    """A learning rate: a schedule as it is, anything else through :func:`as_scalar`."""
    if callable(value):
        return value
    return as_scalar(value, "learning_rate", "[0, inf)", "the sign of the step is already the optimizer's")


def check_dtype(dtype: Any, name: str) -> Any:
    """``dtype`` in the form that arrays have here (float64 is float32 without x64), or None.

    >>> check_dtype("bfloat16", "mu_dtype")
    dtype(bfloat16)
    >>> check_dtype(jnp.int32, "mu_dtype")
    Traceback (most recent call last):
    TypeError: mu_dtype must be a floating-point dtype, got int32
    """
    if dtype is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype}")
    return dtype


def increment(count: Int[Array, ""]) -> Int[Array, ""]:
    """The next step's number; it stays at the largest integer instead of wrapping to the smallest.

    >>> int(increment(jnp.int32(7))), int(increment(jnp.int32(2**31 - 1)))
    (8, 2147483647)
    """
    count = jnp.asarray(count)
    return jnp.where(count < jnp.iinfo(count.dtype).max, count + 1, count)


# Compiled on its own so that an update that is not jitted gets the power from the same kernel as in
# optax: one ulp of b2ᵗ is some 100 ulp of 1 - b2ᵗ at the first steps.
@functools.partial(jax.jit, inline=True)
def total_weight(decay: Scalar, count: Int[Array, ""]) -> Float[Array, ""]:
    """The sum of the weights in an exponential average of ``count`` terms, ``1 - decayᵗ``.

    Dividing by it removes the average's bias to its start at 0. It has the precision of ``decay``,
    float32 unless x64 is on, as in optax. PyTorch takes the power in float64; a first Adam step
    differs from PyTorch's by up to 6e-6 relative for that reason.

    >>> round(float(total_weight(0.9, jnp.int32(2))), 6)
    0.19
    """
    decay = jnp.asarray(decay)
    return 1 - decay ** count.astype(decay.dtype)


def divider(divisor: Float[Array, ""], dtype: Any) -> Callable[[Array], Array]:
    """The function x -> x / divisor for leaves of ``dtype``; the divisor is positive and at most 1.

    A vector division costs several multiplications, and in Adam it is half of the arithmetic: with
    this its update takes about 0.86 of optax's time on a CPU (an MLP of 235,000 parameters). A
    product with the rounded 1/divisor would do, but is up to 5 ulp off in the end. So 1/divisor is
    held as a sum high + low to some 36 bits, and x·high + x·low, one multiplication and one fused
    multiply-add, rounds as the true quotient does (no difference in 4e7 random values; without a
    fused multiply-add at most 1 ulp).
    """
    divisor = divisor.astype(dtype)
    if jnp.dtype(dtype) != jnp.float32:
        return lambda x: x / divisor
    # A little below 1/divisor, so that low is positive: an overflowed x must give inf, not inf - inf.
    high = (1 / divisor) * (1 - 2.0**-22)
    # 1 - divisor·high without rounding: halves of 12 bits have exact products.
    d1, h1 = (lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11) for x in (divisor, high))
    d2, h2 = divisor - d1, high - h1
    residual = ((1 - d1 * h1) - d1 * h2) - d2 * h1 - d2 * h2
    low = jnp.where(divisor > 0, residual / divisor, 0)
    return lambda x: x * high + x * low


def unbiased(decay: Scalar, count: Int[Array, ""]) -> Callable[[Array], Array]:
    """The function that divides an average of ``count`` terms by its total weight.

    The scalars that this takes are computed once a step, not once a parameter.

    >>> unbiased(0.5, jnp.int32(1))(jnp.array([1.0, 2.0])).tolist()
    [2.0, 4.0]
    """
    by_dtype = functools.cache(lambda dtype: divider(total_weight(decay, count), dtype))
    return lambda x: by_dtype(x.dtype)(x)


def quotient(x: Array, denominator: Array, *added: Scalar) -> Array:
    """``x / denominator``, and 0 where the denominator is 0.

    Args:
      x: any array.
      denominator: not negative.
      added: the small numbers that were added to it. One that is surely positive keeps the
        denominator from 0, and no guard is compiled.

    >>> quotient(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0]), 0.0).tolist()
    [0.5, 0.0]
    """
    dtype = denominator.dtype
    if dtype == jnp.float16:
        # XLA makes x / a / b into x / (a·b), and what is left of 1e-7 times a bias correction is 0 in float16.
        x, denominator = x.astype(jnp.float32), denominator.astype(jnp.float32)
    if not _may_vanish(dtype, *added):
        return x / denominator
    zero = denominator == 0
    # Both selects are needed: a derivative of x/0 that is multiplied by 0 would still be NaN.
    return jnp.where(zero, 0, x / jnp.where(zero, 1, denominator))


def inverse(x: Array, *added: Scalar) -> Array:
    """``1 / x``, and 0 where x is 0; arguments as for :func:`quotient`.

    >>> inverse(jnp.array([4.0, 0.0]), 0.0).tolist()
    [0.25, 0.0]
    """
    return quotient(jnp.ones([], x.dtype), x, *added)


def inverse_root(x: Array, *added: Scalar) -> Array:
    """``1 / √x``, and 0 where x is 0; arguments as for :func:`quotient`.

    >>> inverse_root(jnp.array([4.0, 0.0]), 0.0).tolist()
    [0.5, 0.0]
    """
    if not _may_vanish(x.dtype, *added):
        return lax.rsqrt(x)
    zero = x == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, x)))


def _may_vanish(dtype: Any, *added: Scalar) -> bool:
    """Whether all of ``added`` may be 0 in ``dtype``: 1e-8 is in float16, and a traced number may be."""
    return all(isinstance(x, jax.Array) or not np.asarray(x).astype(dtype).any() for x in added)
