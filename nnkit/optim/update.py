"""The last act of a step: adding the update to the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from nnkit.checks import check_key
from nnkit.optim.leafwise import leafwise
from nnkit.types import PyTree

__all__ = ["apply_updates", "round_stochastically"]


def apply_updates(params: PyTree, updates: PyTree, *, key: Key[Array, ""] | None = None) -> PyTree:
    """The parameters after a step, θ + u, in the parameters' dtypes (optax's ``apply_updates``).

    The sum is taken in the wider of the two dtypes and rounded once. A parameter without an update
    (None) stays as it is.

    With a key, bfloat16 and float16 parameters are rounded at random, to one of the two neighbours of
    the float32 sum and to each the more likely the nearer it is, so that the mean is the sum. Rounded
    to nearest, an update below half of the distance between floats, some 2⁻⁹ of a bfloat16 parameter,
    is lost however often it comes. Other parameters are added as without a key.

    Args:
      params: θ.
      updates: u, of the same form.
      key: where the random roundings come from: a new one for every step, for instance
        ``jax.random.fold_in(key, step)``. The i-th parameter's is ``fold_in(key, i)``.

    Raises:
      ValueError: where the trees or the shapes differ, naming the path.
      TypeError: for parameters that are not floating-point, or a key that is none.

    Stochastic rounding in training: Gupta et al., 2015, https://arxiv.org/abs/1502.02551.

    >>> params = optim.apply_updates({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([0.5, -0.5])})
    >>> params["w"].tolist()
    [1.5, 1.5]

    The bfloat16 after 1 is 1.0078125. A sum of a quarter of the way there is rounded up one time in four:

    >>> params, updates = jnp.ones(10_000, jnp.bfloat16), jnp.full(10_000, 0.0078125 / 4)
    >>> optim.apply_updates(params, updates).max().item()
    1.0
    >>> rounded = optim.apply_updates(params, updates, key=jax.random.key(0))
    >>> np.unique(rounded.astype(jnp.float32)).tolist(), round(float((rounded > 1).mean()), 2)
    ([1.0, 1.0078125], 0.25)
    """

    def leaf(u: Array | None, p: Any) -> tuple[Any]:
        if u is None or p is None:
            return (p,)
        if key is not None and p.dtype in _HALF:
            return (p.astype(jnp.float32) + u.astype(jnp.float32),)
        return ((p + u).astype(p.dtype),)

    sums = leafwise("apply_updates", leaf, {"updates": updates}, {"params": params}, none=True)[0]
    if key is None:
        return sums
    check_key(key, "apply_updates")
    old, structure = jax.tree.flatten(params)
    new = jax.tree.leaves(sums)
    for i, (p, s) in enumerate(zip(old, new, strict=True)):
        if getattr(p, "dtype", None) in _HALF and s.dtype == jnp.float32:
            new[i] = round_stochastically(jax.random.fold_in(key, i), s, p.dtype)
    return structure.unflatten(new)


def round_stochastically(key: Key[Array, ""], x: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """float32 numbers as bfloat16 or float16 ones that are ``x`` in the mean.

    Each becomes one of its two neighbours, one of which is ``x`` itself if the dtype has it, with a
    probability that is exact (a float16 below 2⁻³¹: to 2⁻³² of the gap). Beyond the largest float the
    neighbour is inf; inf and NaN stay.

    >>> key = jax.random.key(0)
    >>> round_stochastically(key, jnp.array([0.5, -0.0, jnp.inf, jnp.nan]), jnp.float16).tolist()
    [0.5, -0.0, inf, nan]
    """
    if dtype == jnp.bfloat16:
        # A bfloat16 is the first 16 bits of a float32, so the rest is the distance to the lower one in
        # magnitude in 2⁻¹⁶ of the gap: a random number below 2¹⁶ carries over as often as it should.
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
        kept = lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(x), kept, x.astype(jnp.bfloat16))
    # The gap between float16 numbers, a power of two, is 2⁻²⁴ below 2⁻¹⁴, and all that is divided and
    # multiplied by it is exact.
    exponent = (lax.bitcast_convert_type(x, jnp.uint32) >> 23) & 0xFF
    power = jnp.clip(exponent, 127 - 14, 127 + 16)
    gap, inverse = (
        lax.bitcast_convert_type(e << 23, jnp.float32) for e in (power - 10, 127 + 127 + 10 - power)
    )
    steps = jnp.abs(x) * inverse
    lower = jnp.floor(steps)
    chance = ((steps - lower) * 2.0**32).astype(jnp.uint32)
    up = jax.random.bits(key, x.shape, jnp.uint32) < chance
    rounded = jnp.copysign((lower + up.astype(jnp.float32)) * gap, x).astype(jnp.float16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.float16))


_HALF = (jnp.bfloat16, jnp.float16)
