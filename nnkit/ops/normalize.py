"""Normalisation to mean 0 and variance 1 over any axes, with a derivative rule of its own."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.ops.moments import average, number
from nnkit.types import Array

__all__ = ["normalize"]


def normalize(
    x: Array,
    scale: Array,
    bias: Array,
    axes: tuple[int, ...],
    *,
    epsilon: float | Array,
    where: Array | None = None,
    centred: bool = True,
    axis_name: Hashable | None = None,
) -> tuple[Array, Array, Array]:
    """``y = (x − m) / sqrt(v + epsilon) · scale + bias``, with m and v over ``axes``, and m and v themselves.

    v is the biased variance by a second pass over x − m, since E[x²] − m² loses all digits where the mean is
    large. With ``where`` only entries at which it is True count in m and v, while all are normalised; where
    none counts, y = x·scale + bias.

    Shapes: ``scale``, ``bias`` and ``where`` have as many axes as x and broadcast to it; m and v keep the
    reduced axes with length 1. All are of one dtype, float32 or wider.

    Args:
      x: the input.
      scale: the factor of the normalised x.
      bias: what is added to it.
      axes: over which m and v go, not negative.
      epsilon: added to v.
      where: bools; None for all entries.
      centred: whether m is subtracted; if not, m is 0 and v the mean of x² (root-mean-square normalisation).
      axis_name: the name of a mapped axis over whose members m and v go too.

    The derivative makes its two sums over the reduced axes once. Where scale is constant over them, as in
    batch normalisation, they are the gradients of scale and bias as well, and the layer's whole derivative
    takes no other sums; what differentiation makes of the formula has one more.

    >>> y, mean, var = ops.normalize(
    ...     jnp.array([[1.0, 3.0]]), jnp.ones((1, 1)), jnp.zeros((1, 1)), (1,), epsilon=0.0
    ... )
    >>> y.round(3).tolist(), mean.tolist(), var.tolist()
    ([[-1.0, 1.0]], [[2.0]], [[1.0]])
    """
    return _normalize(x, scale, bias, jnp.asarray(epsilon, x.dtype), where, axes, centred, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def _normalize(
    x: Array,
    scale: Array,
    bias: Array,
    epsilon: Array,
    where: Array | None,
    axes: tuple[int, ...],
    centred: bool,
    axis_name: Hashable | None,
) -> tuple[Array, Array, Array]:
    n = number(x.shape, axes, where=where, axis_name=axis_name)
    mean_of = functools.partial(average, axes=axes, n=n, where=where, axis_name=axis_name)
    mean = mean_of(x) if centred else None
    off = x if mean is None else x - mean
    var = mean_of(jnp.square(off))
    y = off * (_root(var, epsilon, n) * scale) + bias
    return y, jnp.zeros_like(var) if mean is None else mean, var


@_normalize.defjvp
def _(
    axes: tuple[int, ...],
    centred: bool,
    axis_name: Hashable | None,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> Any:
    """With x̂ the normalised x, r = 1/√(v + epsilon) and ⟨·⟩ the mean over the axes,
    ``dx̂ = r·(dx − ⟨dx⟩ − x̂·⟨x̂·dx⟩) − x̂·r²·depsilon/2`` and ``dy = scale·dx̂ + x̂·dscale + dbias``.

    Where scale is constant over the axes, dy is written so that the factors of x̂ and of 1 stand in one
    bracket each: transposed, each bracket is one sum. Second derivatives go through m and v, which
    therefore have theirs: dm = ⟨dx⟩, dv = 2⟨x̂·dx⟩/r.
    """
    x, scale, _, epsilon, where = primals
    dx, dscale, dbias, depsilon, _ = tangents
    y, mean, var = _normalize(*primals, axes, centred, axis_name)
    n = number(x.shape, axes, where=where, axis_name=axis_name)
    mean_of = functools.partial(average, axes=axes, n=n, where=where, axis_name=axis_name)
    root = _root(var, epsilon, n)
    normal = (x - mean if centred else x) * root
    mean_dx = mean_of(dx) if centred else jnp.zeros_like(mean)
    mean_ndx = mean_of(normal * dx)
    shrink = root * mean_ndx + jnp.square(root) * depsilon / 2
    if where is not None:
        shrink = jnp.where(n > 0, shrink, 0)
    if all(scale.shape[a] == 1 for a in axes):
        a = root * scale
        dy = a * dx + normal * (dscale - scale * shrink) + (dbias - a * mean_dx)
    else:
        dy = scale * (root * (dx - mean_dx) - normal * shrink) + normal * dscale + dbias
    return (y, mean, var), (dy, mean_dx, 2 * mean_ndx / root)


def _root(var: Array, epsilon: Array, n: int | Array) -> Array:
    """1/√(v + epsilon), and 1 where no entry counted."""
    spread = var + epsilon
    return jax.lax.rsqrt(spread if isinstance(n, int) else jnp.where(n > 0, spread, 1))
