"""Distances in units in the last place: how many floats lie between two numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["ulp_distance", "ulps"]


def ulp_distance(a: Any, b: Any) -> np.ndarray:
    """Elementwise, the number of steps from one float to the next that lead from ``a`` to ``b``.

    0 and -0 are one number, NaN is 0 from NaN, and inf is one step from the largest float. The
    distance between numbers of opposite sign counts all floats between them.

    Args:
      a, b: float16, bfloat16, float32 or float64 arrays of one dtype and shape.

    Returns:
      Unsigned integers, for float64 too, whose farthest floats are nearly 2⁶⁴ apart. NaN against a
      number is the largest of them.

    Raises:
      TypeError: dtypes that differ or are not floating.
      ValueError: shapes that differ.

    >>> from nnkit.testing import ulp_distance
    >>> one = np.float32(1)
    >>> ulp_distance(one, np.nextafter(one, np.float32(2))).item()
    1
    >>> ulp_distance(jnp.zeros(2, jnp.bfloat16), -jnp.zeros(2, jnp.bfloat16)).tolist()
    [0, 0]
    """
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"ulp_distance takes two arrays of one floating dtype and got {x.dtype} and {y.dtype}"
        )
    if x.shape != y.shape:
        raise ValueError(f"ulp_distance takes two arrays of one shape and got {x.shape} and {y.shape}")
    with np.errstate(invalid="ignore"):  # signalling NaNs of bfloat16
        nans = np.isnan(x).astype(np.int8) + np.isnan(y)
    left, right = _ordered(x), _ordered(y)
    distance = np.where(left > right, left - right, right - left)
    return np.where(nans == 2, 0, np.where(nans == 1, np.iinfo(np.uint64).max, distance)).astype(np.uint64)


def _ordered(x: np.ndarray) -> np.ndarray:
    """The floats' bits as unsigned integers in the floats' order, 0 and -0 together."""
    bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").astype(np.uint64).reshape(x.shape)
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))
    magnitude = bits & (sign - np.uint64(1))
    middle = np.uint64(1 << 63)
    return np.where(bits & sign != 0, middle - magnitude, middle + magnitude)


def ulps(a: Any, b: Any, ignore: list[Any] | None = None) -> int:
    """The largest distance in ulp between two trees of one form; what is not floating must be equal.

    Args:
      a, b: trees with equally many leaves of equal shapes and dtypes.
      ignore: one boolean array a leaf: where not to look.

    Raises:
      AssertionError: leaves that differ in number, dtype or shape, a NaN on one side only, or a count
        or flag that is not equal.

    >>> from nnkit.testing import ulps
    >>> ulps({"w": jnp.ones(3), "n": jnp.int32(1)}, {"w": jnp.ones(3) + 2**-22, "n": jnp.int32(1)})
    2
    """
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(left) == len(right), f"{len(left)} leaves and {len(right)}"
    worst = 0
    for x, y, skipped in zip(left, right, ignore or [False] * len(left), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), (x.dtype, y.dtype, x.shape, y.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_array_equal(x, y)
            continue
        looked_at = ~np.broadcast_to(skipped, x.shape)
        assert not ((np.isnan(x) ^ np.isnan(y)) & looked_at).any(), "NaN on one side only"
        worst = max(worst, int(np.where(looked_at, ulp_distance(x, y), 0).max(initial=0)))
    return worst
