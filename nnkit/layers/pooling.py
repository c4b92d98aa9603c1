"""Pooling over windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnkit import ops
from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import stateless
from nnkit.layers.spatial import Padding, PaddingPairs, Size
from nnkit.types import Array, Layer

__all__ = ["avg_pool", "max_pool", "min_pool", "sum_pool"]


def max_pool(
    window_shape: Size, *, strides: Size | None = None, padding: Padding = "VALID", ceil_mode: bool = False
) -> Layer:
    """The largest element of each window, for each channel.

    Shapes: x (batch, *spatial, channels), y (batch, *out, channels) with
    ``out = (n + before + after - k) // s + 1``, rounded up under ``ceil_mode``. Padding never wins. Of
    equal elements the first gets the whole gradient, as in PyTorch.

    Args:
      window_shape: a number for every spatial axis of the input, or a tuple with one for each (Flax's
        name).
      strides: how far the window moves; None is the window itself, as in PyTorch and Keras, since
        windows side by side are what pooling is nearly always for (Flax, stax: ``strides=1``).
      padding: ``"VALID"``, ``"SAME"``, ``"SAME_LOWER"``, a number as in PyTorch, or for each axis a
        number or a pair (before, after).
      ceil_mode: whether a last window that reaches over the end counts (PyTorch's).

    Raises:
      ValueError: for sizes below 1 or an unknown padding.
      LayerError: for input of another number of axes or smaller than the window, and where a window
        would see nothing but padding.

    Source: Flax's and PyTorch's max pooling. The gradient is that of ``nnkit.ops.max_pool``.

    >>> y, _ = layers.max_pool(2).apply({}, {}, jnp.arange(8.0).reshape(1, 4, 2, 1), train=False)
    >>> y.ravel().tolist()
    [3.0, 7.0]
    """
    return _pool("max_pool", ops.max_pool, window_shape, strides, padding, ceil_mode)


def min_pool(
    window_shape: Size, *, strides: Size | None = None, padding: Padding = "VALID", ceil_mode: bool = False
) -> Layer:
    """The smallest element of each window; arguments, shapes and errors as :func:`max_pool`.

    Source: Flax's ``min_pool``, whose strides default to 1.

    >>> y, _ = layers.min_pool(2).apply({}, {}, jnp.arange(8.0).reshape(1, 4, 2, 1), train=False)
    >>> y.ravel().tolist()
    [0.0, 4.0]
    """
    return _pool("min_pool", ops.min_pool, window_shape, strides, padding, ceil_mode)


def sum_pool(
    window_shape: Size, *, strides: Size | None = None, padding: Padding = "VALID", ceil_mode: bool = False
) -> Layer:
    """The sum of each window, where padding counts as 0; arguments and errors as :func:`max_pool`.

    Source: stax's ``SumPool``, whose strides default to 1.

    >>> y, _ = layers.sum_pool(2).apply({}, {}, jnp.arange(8.0).reshape(1, 4, 2, 1), train=False)
    >>> y.ravel().tolist()
    [6.0, 22.0]
    """
    return _pool("sum_pool", ops.sum_pool, window_shape, strides, padding, ceil_mode)


def avg_pool(
    window_shape: Size,
    *,
    strides: Size | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
    ceil_mode: bool = False,
) -> Layer:
    """The mean of each window; arguments, shapes and errors as :func:`max_pool`.

    Args:
      window_shape: the window.
      strides: how far it moves; None is the window itself.
      padding: as in :func:`max_pool`.
      count_include_pad: whether the divisor counts the padding, as in Flax and PyTorch by default, or
        only what is inside the input, as in stax and Keras. What ``ceil_mode`` adds never counts.
      ceil_mode: whether a last window that reaches over the end counts (PyTorch's).

    Source: Flax's and PyTorch's average pooling.

    >>> y, _ = layers.avg_pool(2).apply({}, {}, jnp.arange(8.0).reshape(1, 4, 2, 1), train=False)
    >>> y.ravel().tolist()
    [1.5, 5.5]
    """

    def pool(x: Array, window: tuple[int, ...], *, strides: tuple[int, ...], padding: PaddingPairs) -> Array:
        return ops.avg_pool(x, window, strides=strides, padding=padding, count_include_pad=count_include_pad)

    rescale = _counted if count_include_pad and ceil_mode else None
    return _pool("avg_pool", pool, window_shape, strides, padding, ceil_mode, rescale)


_Rescale = Callable[[Array, Any, Any, Any, PaddingPairs], Array]


def _pool(
    name: str,
    pool: Callable[..., Array],
    window_shape: Size,
    strides: Size | None,
    padding: Padding,
    ceil_mode: bool,
    rescale: _Rescale | None = None,
) -> Layer:
    given = spatial.size(name, "window_shape", window_shape)
    moved = given if strides is None else spatial.size(name, "strides", strides)
    known = spatial.known_padding(name, padding, ("VALID", "SAME", "SAME_LOWER"))

    def apply(x: Any) -> Array:
        n = spatial.spatial_axes(name, x, given)
        window = spatial.each(name, "window_shape", given, n)
        steps = spatial.each(name, "strides", moved, n)
        sizes = x.shape[1:-1]
        pairs = spatial.padding_pairs(name, known, sizes, window, steps)
        for k, pair in zip(window, pairs, strict=True):
            if max(pair) >= k:
                raise LayerError(
                    name,
                    f"has padding {pair} for a window of {k}, some of which would see nothing but padding: "
                    "it must be smaller than the window",
                )
        spatial.check_fits(name, x.shape, sizes, window, pairs)
        whole = _rounded_up(sizes, window, steps, pairs) if ceil_mode else pairs
        y = pool(x, window, strides=steps, padding=whole)
        return y if rescale is None or whole == pairs else rescale(y, sizes, window, steps, pairs)

    return stateless(apply, name=f"{name}_")


def _rounded_up(
    sizes: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...], padding: PaddingPairs
) -> PaddingPairs:
    """The padding with as much more behind as a last window needs that begins inside the input."""
    grown: list[tuple[int, int]] = []
    for n, k, s, (before, after) in zip(sizes, window, strides, padding, strict=True):
        last = math.ceil((n + before + after - k) / s)
        if last * s >= n + before:  # it would begin in the padding
            last -= 1
        grown.append((before, max(after, last * s + k - n - before)))
    return tuple(grown)


def _counted(y: Array, sizes: Any, window: Any, strides: Any, padding: PaddingPairs) -> Array:
    """Means over whole windows as means over what of them is in the padded input."""
    shares = np.ones(())
    for n, k, s, (before, after), out in zip(sizes, window, strides, padding, y.shape[1:-1], strict=True):
        counts = np.minimum(s * np.arange(out) + k, n + before + after) - s * np.arange(out)
        shares = shares[..., None] * (k / counts)
    return y * jnp.asarray(shares[..., None], y.dtype)
