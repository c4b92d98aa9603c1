"""Pooling to a given size: adaptive, and global, to nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnkit import ops, tree
from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import positive_int, stateless
from nnkit.types import Array, Layer

__all__ = ["adaptive_avg_pool", "adaptive_max_pool", "global_avg_pool", "global_max_pool"]


def adaptive_avg_pool(output_size: int | Sequence[int | None]) -> Layer:
    """The mean over windows that give each spatial axis ``output_size`` elements, whatever it had.

    Of an axis of n, output i of m is the mean of elements ⌊i·n/m⌋ to ⌈(i + 1)·n/m⌉ - 1: windows side by
    side where m divides n, else of two sizes and overlapping.

    Shapes: x (batch, *spatial, channels), y (batch, *output_size, channels). Half precision is summed
    in float32.

    Args:
      output_size: a number for every spatial axis, or a tuple with one for each, where None leaves an
        axis as it is.

    Raises:
      ValueError: for a size below 1.
      LayerError: for input of another number of axes.

    Source: PyTorch's ``AdaptiveAvgPool1d`` to ``AdaptiveAvgPool3d``.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> layers.adaptive_avg_pool(3).apply({}, {}, x, train=False)[0].ravel().tolist()
    [0.5, 2.0, 3.5]
    """

    def mean(x: Array, axis: int, m: int) -> Array:
        starts, ends = _windows(x.shape[axis], m)
        at = np.arange(x.shape[axis])[:, None]
        weights = ((at >= starts) & (at < ends)) / (ends - starts)
        wide = tree.wide(x.dtype)
        y = jnp.tensordot(x.astype(wide), jnp.asarray(weights, wide), (axis, 0))
        return jnp.moveaxis(y, -1, axis).astype(x.dtype)

    return _adaptive("adaptive_avg_pool", output_size, ops.avg_pool, mean)


def adaptive_max_pool(output_size: int | Sequence[int | None]) -> Layer:
    """The largest element of the windows of :func:`adaptive_avg_pool`, with its arguments and errors.

    Of equal elements the first gets the whole gradient, as in PyTorch.

    Source: PyTorch's ``AdaptiveMaxPool1d`` to ``AdaptiveMaxPool3d``.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> layers.adaptive_max_pool(3).apply({}, {}, x, train=False)[0].ravel().tolist()
    [1.0, 3.0, 4.0]
    """

    def largest(x: Array, axis: int, m: int) -> Array:
        starts, ends = _windows(x.shape[axis], m)
        # A shorter window repeats its last element, which is then not the first of equals.
        members = np.minimum(starts[:, None] + np.arange((ends - starts).max()), ends[:, None] - 1)
        return _first_largest(jnp.take(x, members, axis), axis + 1)

    return _adaptive("adaptive_max_pool", output_size, ops.max_pool, largest)


def _windows(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the ``m`` windows of an axis of ``n`` start, and where they end."""
    i = np.arange(m)
    return i * n // m, -(-(i + 1) * n // m)


def _adaptive(
    name: str,
    output_size: int | Sequence[int | None],
    pool: Callable[..., Array],
    over_axis: Callable[[Array, int, int], Array],
) -> Layer:
    what = f"{name}(output_size=...)"
    if isinstance(output_size, Sequence) and not isinstance(output_size, str):
        wanted = tuple(None if m is None else positive_int(m, what) for m in output_size)
    else:
        wanted = positive_int(output_size, what)

    def apply(x: Any) -> Array:
        n = spatial.spatial_axes(name, x, wanted)
        given = (wanted,) * n if isinstance(wanted, int) else wanted
        sizes = x.shape[1:-1]
        goal = tuple(size if m is None else m for size, m in zip(sizes, given, strict=True))
        if all(size % m == 0 for size, m in zip(sizes, goal, strict=True)):
            window = tuple(size // m for size, m in zip(sizes, goal, strict=True))
            return pool(x, window, strides=window, padding=((0, 0),) * n)
        # From the last axis on, so that the first of equal elements is the first in row-major order.
        for axis in range(n, 0, -1):
            if sizes[axis - 1] != goal[axis - 1]:
                x = over_axis(x, axis, goal[axis - 1])
        return x

    return stateless(apply, name=f"{name}_")


def _first_largest(x: Array, axis: int) -> Array:
    """The largest element over ``axis``, whose gradient goes to the first of equals."""
    at = jnp.expand_dims(jnp.argmax(x, axis), axis)
    return jnp.squeeze(jnp.take_along_axis(x, at, axis), axis)


def global_avg_pool(*, keepdims: bool = False) -> Layer:
    """The mean over all spatial axes: ``y[b, c] = Σ x[b, ..., c] / Π spatial``.

    With a mask, the mean over the elements that it marks, and 0 where it marks none.

    Shapes: x (batch, *spatial, channels), or the pair (x, mask) with a boolean mask (batch, *spatial);
    y (batch, channels), or (batch, 1, ..., channels) with ``keepdims``. Half precision is summed in
    float32.

    Raises:
      LayerError: for input without a spatial axis, and for a mask of another shape.

    Source: Lin et al. 2013, "Network in network"; Keras' ``GlobalAveragePooling``, masks included.

    >>> x, mask = jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[True, True, False]])
    >>> pool = layers.global_avg_pool()
    >>> [pool.apply({}, {}, given, train=False)[0].tolist() for given in (x, (x, mask))]
    [[[4.0]], [[2.0]]]
    """

    def pool(given: Any) -> Array:
        x, mask, axes = _masked("global_avg_pool", given)
        y = x.astype(tree.wide(x.dtype))
        if mask is None:
            return jnp.mean(y, axes, keepdims=keepdims).astype(x.dtype)
        count = jnp.maximum(jnp.sum(mask, axes, y.dtype, keepdims=keepdims), 1)
        return (jnp.sum(jnp.where(mask, y, 0), axes, keepdims=keepdims) / count).astype(x.dtype)

    return stateless(pool, name="global_avg_pool_")


def global_max_pool(*, keepdims: bool = False) -> Layer:
    """The largest element over all spatial axes; input, shapes and errors as :func:`global_avg_pool`.

    With a mask, the largest of the elements that it marks, and 0 where it marks none. Of equal
    elements the first gets the whole gradient, as in ``max_pool`` and PyTorch's ``AdaptiveMaxPool``.

    Source: Keras' ``GlobalMaxPooling``.

    >>> x, mask = jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[True, True, False]])
    >>> pool = layers.global_max_pool()
    >>> [pool.apply({}, {}, given, train=False)[0].tolist() for given in (x, (x, mask))]
    [[[8.0]], [[3.0]]]
    """

    def pool(given: Any) -> Array:
        x, mask, axes = _masked("global_max_pool", given)
        flat = (x if mask is None else jnp.where(mask, x, -jnp.inf)).reshape(x.shape[0], -1, x.shape[-1])
        y = _first_largest(flat, 1)
        if mask is not None:
            y = jnp.where(jnp.any(mask, axes), y, 0)
        return jnp.expand_dims(y, axes) if keepdims else y

    return stateless(pool, name="global_max_pool_")


def _masked(layer: str, given: Any) -> tuple[Array, Array | None, tuple[int, ...]]:
    """The array, its mask with a channel axis, and the spatial axes."""
    x: Any = given
    mask: Any = None
    if isinstance(given, tuple) and len(given) == 2:
        x, mask = given
    n = spatial.spatial_axes(layer, x)
    axes = tuple(range(1, n + 1))
    if mask is None:
        return x, None, axes
    if getattr(mask, "shape", None) != x.shape[:-1] or mask.dtype != np.bool_:
        raise LayerError(
            layer,
            f"takes (x, mask) with a boolean mask of shape {x.shape[:-1]}, got "
            f"{getattr(mask, 'dtype', type(mask).__name__)} of shape {getattr(mask, 'shape', None)}",
        )
    return x, mask[..., None], axes
