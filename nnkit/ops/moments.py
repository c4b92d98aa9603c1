"""Means and variances by two passes, over masked entries and over the devices of a mesh."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnkit.tree import wide
from nnkit.types import Array

__all__ = ["Moments", "average", "moments", "number"]


class Moments(NamedTuple):
    """What :func:`moments` returns.

    Attributes:
      mean: the means, in float32 for the half precisions.
      var: the biased variances, likewise.
      n: over how many entries they go: an int where that is static, else an int32 array.
    """

    mean: Array
    var: Array
    n: int | Array


def moments(
    x: Array,
    axes: int | tuple[int, ...] | None = None,
    *,
    where: Array | None = None,
    axis_name: Hashable | None = None,
    keepdims: bool = False,
) -> Moments:
    """The mean and the biased variance over ``axes``: m = Σx/n, then v = Σ|x − m|²/n by a second pass.

    E[x²] − m² would cost one pass and all digits where the mean is large: at mean 1e4 and spread 1 nothing is
    left of it in float32.

    Args:
      x: any floating-point array; half precision is summed, and its moments returned, in float32.
      axes: the axes to reduce; None for all.
      where: bools that broadcast to x; an entry counts where it is True. A mean over no entry is 0, its
        variance too.
      axis_name: the name (or names) of a mapped axis of ``jax.vmap`` or ``jax.shard_map``: the moments
        are then those of all its members together.
      keepdims: whether the reduced axes stay, with length 1.

    >>> mean, var, n = ops.moments(jnp.array([1.0, 3.0, 100.0]), where=jnp.array([True, True, False]))
    >>> float(mean), float(var), int(n)
    (2.0, 1.0, 2)
    """
    x = x.astype(wide(x.dtype))
    if axes is None:
        axes = tuple(range(x.ndim))
    n = number(x.shape, axes, where=where, axis_name=axis_name)
    mean = average(x, axes, n, where=where, axis_name=axis_name)
    off = x - mean
    squares = jnp.square(off.real) + jnp.square(off.imag) if jnp.iscomplexobj(x) else jnp.square(off)
    found = Moments(mean, average(squares, axes, n, where=where, axis_name=axis_name), n)
    return found if keepdims else jax.tree.map(lambda a: a if isinstance(a, int) else a.squeeze(axes), found)


def number(
    shape: tuple[int, ...],
    axes: int | tuple[int, ...],
    *,
    where: Array | None = None,
    axis_name: Hashable | None = None,
) -> int | Array:
    """How many entries of an array of this shape each mean over ``axes`` goes over; axes stay with length 1."""
    if where is None:
        n = math.prod(shape[a] for a in ((axes,) if isinstance(axes, int) else axes))
        return n if axis_name is None else n * jax.lax.axis_size(axis_name)
    # Counted in integers: a float32 stops counting at 2²⁴.
    n = jnp.sum(jnp.broadcast_to(where, shape), axes, dtype=jnp.int32, keepdims=True)
    return n if axis_name is None else jax.lax.psum(n, axis_name)


def average(
    x: Array,
    axes: int | tuple[int, ...],
    n: int | Array,
    *,
    where: Array | None = None,
    axis_name: Hashable | None = None,
) -> Array:
    """The mean over the entries that :func:`number` counted as ``n``; 0 where there is none."""
    if where is None and axis_name is None:
        return jnp.mean(x, axes, keepdims=True)
    total = jnp.sum(x, axes, where=where, keepdims=True)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return total / jnp.maximum(n, 1).astype(x.dtype)
