"""Positions as numbers: the sinusoids that are added, and the rotation of queries and keys."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nnkit.checks import is_static_number
from nnkit.tree import wide

__all__ = ["rotary", "sinusoidal"]


def rotary(
    x: Float[Array, "*batch time heads dim"],
    positions: Int[Array, "*#batch time"],
    *,
    base: float | Array = 10000.0,
    interleaved: bool = False,
    features: int | None = None,
) -> Float[Array, "*batch time heads dim"]:
    """Turns pairs of features by angles that grow with the position (RoPE).

    Pair i of d features is turned by θ = position · base^(-2i/d): ``(a cos θ - b sin θ, b cos θ + a sin θ)``.
    The product of a query and a key that are turned so depends on the distance of their positions only.
    Angles are float32, and half precision is turned in float32.

    Args:
      x: queries or keys.
      positions: where each stands, the same for all examples or for each.
      base: the wavelengths go from 2π to 2π·base.
      interleaved: whether a pair is features 2i and 2i + 1 (the paper's, GPT-J's and Meta's LLaMA's) or i and
        i + d/2 (GPT-NeoX's and Hugging Face's).
      features: how many of the first features of each head are turned; all by default.

    Raises:
      ValueError: for an odd number of features, or more than there are.

    Source: Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding".

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> print(np.asarray(ops.rotary(x, jnp.array([1]))).ravel().round(2))  # cos 1, sin 1
    [0.54 0.84]
    """
    d = x.shape[-1] if features is None else features
    if d % 2 or not 0 < d <= x.shape[-1]:
        raise ValueError(
            f"rotary turns pairs of features and got {d} of {x.shape[-1]}: an even number must do"
        )
    angles = _angles(positions, d, base, x.dtype)[..., None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    turned = x[..., :d].astype(angles.dtype)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.astype(x.dtype)
    return turned if d == x.shape[-1] else jnp.concatenate([turned, x[..., d:]], -1)


def sinusoidal(
    positions: Int[Array, "*batch"], features: int, *, base: float | Array = 10000.0, dtype=jnp.float32
) -> Float[Array, "*batch features"]:
    """A vector for each position: features 2i and 2i + 1 are sine and cosine of position · base^(-2i/features).

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.

    >>> print(np.asarray(ops.sinusoidal(jnp.array([0, 1]), 4)).round(2))
    [[0.   1.   0.   1.  ]
     [0.84 0.54 0.01 1.  ]]
    """
    angles = _angles(positions, features, base, dtype)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
    return pairs.reshape(*positions.shape, -1)[..., :features].astype(dtype)


def _angles(positions, features, base, dtype):
    """position · base^(-2i/features) for i up to features/2, float32 at least."""
    dtype = wide(dtype)
    if is_static_number(base):
        # In float64, as a power in float32 is off by more than its last digit.
        frequencies = jnp.asarray(float(base) ** (-np.arange(0, features, 2) / features), dtype)
    else:
        exponents = jnp.asarray(-np.arange(0, features, 2) / features, dtype)
        frequencies = jnp.asarray(base, dtype) ** exponents
    return jnp.asarray(positions).astype(dtype)[..., None] * frequencies
