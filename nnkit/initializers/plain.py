"""Initializers that do not look at what a kernel joins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.checks import is_static_number
from nnkit.initializers.arguments import Scalar, check_scale, checked, drawn
from nnkit.initializers.fans import axes_of
from nnkit.types import Initializer

__all__ = ["constant", "normal", "ones", "orthogonal", "truncated_normal", "uniform", "zeros"]


def zeros(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """All 0, where biases start; the key is not looked at.

    >>> zeros(None, (3,))
    Array([0., 0., 0.], dtype=float32)
    """
    return jnp.zeros(checked("zeros", shape, dtype), dtype)


def ones(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """All 1, where the scales of normalisation layers start; the key is not looked at.

    >>> ones(None, (3,))
    Array([1., 1., 1.], dtype=float32)
    """
    return jnp.ones(checked("ones", shape, dtype), dtype)


def constant(value: Any) -> Initializer:
    """All ``value``, a number or an array that broadcasts to the shape; the key is not looked at.

    >>> constant(0.25)(None, (3,))
    Array([0.25, 0.25, 0.25], dtype=float32)
    """

    def init(key, shape, dtype=jnp.float32):
        return jnp.full(checked("constant", shape, dtype), value, dtype)

    return init


def uniform(scale: Scalar = 1e-2, *, symmetric: bool = False) -> Initializer:
    """U(0, scale), the convention of JAX and Flax, or with ``symmetric`` U(-scale, scale), Keras'.

    The variance is scale²/12, or scale²/3 if symmetric.

    >>> print(f"{uniform(0.1)(jax.random.key(0), (1000,)).mean():.2f}")
    0.05
    """
    check_scale("uniform", "scale", scale)
    low = -1 if symmetric else 0

    def draw(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, low) * jnp.array(scale, dtype)

    return drawn("uniform", draw)


def normal(stddev: Scalar = 1e-2) -> Initializer:
    """N(0, stddev²).

    >>> print(f"{normal(0.1)(jax.random.key(0), (500, 500)).std():.3f}")
    0.100
    """
    check_scale("normal", "stddev", stddev)

    def draw(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * jnp.array(stddev, dtype)

    return drawn("normal", draw)


def truncated_normal(stddev: Scalar = 1e-2, *, lower: Scalar = -2.0, upper: Scalar = 2.0) -> Initializer:
    """N(0, stddev²) kept within [lower·stddev, upper·stddev].

    ``stddev`` is that before the truncation, JAX's convention: what is drawn has 0.8796·stddev under
    the default bounds, for which ``variance_scaling`` corrects and this does not.

    >>> print(f"{truncated_normal(0.1)(jax.random.key(0), (500, 500)).std():.3f}")
    0.088
    """
    check_scale("truncated_normal", "stddev", stddev)
    if is_static_number(lower) and is_static_number(upper) and not lower < upper:
        raise ValueError(f"truncated_normal needs lower < upper, got lower={lower} and upper={upper}")

    def draw(key, shape, dtype):
        return jax.random.truncated_normal(key, lower, upper, shape, dtype) * jnp.array(stddev, dtype)

    return drawn("truncated_normal", draw)


def orthogonal(scale: Scalar = 1.0, column_axis: int = -1) -> Initializer:
    """A uniformly distributed matrix W of orthogonal columns, or rows where they are fewer, times ``scale``.

    W is the kernel as (all other axes, ``column_axis``): WᵀW = scale²·I with no more columns than rows,
    else WWᵀ = scale²·I. Half precision is drawn in float32 and rounded. ValueError for a shape of fewer
    than two axes. (Saxe et al. 2014, arXiv:1312.6120; JAX.)

    >>> w = orthogonal()(jax.random.key(0), (64, 16))
    >>> bool(jnp.allclose(w.T @ w, jnp.eye(16), atol=1e-5))
    True
    """
    check_scale("orthogonal", "scale", scale)

    def draw(key, shape, dtype):
        if len(shape) < 2:
            raise ValueError(f"orthogonal needs a shape of at least two axes, got {shape}")
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        (axis,) = axes_of("orthogonal", "column_axis", column_axis, shape)
        rest = shape[:axis] + shape[axis + 1 :]
        # The QR decompositions of LAPACK and cuSOLVER know no half precision.
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        q = jax.random.orthogonal(key, math.prod(rest), (), wide, shape[axis])
        q = jnp.moveaxis(q.reshape(*rest, shape[axis]), -1, axis)
        return jnp.array(scale, dtype) * q.astype(dtype)

    return drawn("orthogonal", draw)
