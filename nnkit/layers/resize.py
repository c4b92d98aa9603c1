"""Resampling the spatial axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnkit import tree
from nnkit.checks import unknown_name
from nnkit.layers import spatial
from nnkit.layers.lift import stateless
from nnkit.layers.spatial import Size
from nnkit.types import Array, Layer

__all__ = ["resize", "upsample"]

_METHODS = {
    "nearest": "nearest",
    "linear": "linear",
    "bilinear": "linear",
    "trilinear": "linear",
    "cubic": "cubic",
    "bicubic": "cubic",
    "lanczos3": "lanczos3",
    "lanczos5": "lanczos5",
}


def resize(shape: Size, *, method: str = "linear", antialias: bool = True) -> Layer:
    """Resamples the spatial axes to ``shape``, pixels being areas: output i looks at (i + ½)·n/m - ½.

    Shapes: x (batch, *spatial, channels), y (batch, *shape, channels). Half precision is computed in
    float32.

    Args:
      shape: the new size of every spatial axis, or a tuple with one for each.
      method: ``"nearest"``, ``"linear"`` (in two dimensions also called bilinear), ``"cubic"`` (Keys'
        kernel with a = -½; PyTorch's has -¾), ``"lanczos3"`` or ``"lanczos5"``.
      antialias: whether the kernel is widened where an axis shrinks, so that every input counts. Without
        it, ``"linear"`` is PyTorch's ``interpolate(mode="bilinear", align_corners=False)``; where axes
        grow the two are the same.

    Raises:
      ValueError: for a size below 1 or an unknown method.
      LayerError: for input of another number of axes.

    Source: ``jax.image.resize``. ``"nearest"`` is PyTorch's ``"nearest-exact"``; PyTorch's ``"nearest"``
    looks at ⌊i·n/m⌋ and is the same where m is a multiple of n.

    >>> layer = layers.resize(4)
    >>> layer.apply({}, {}, jnp.array([[[0.0], [4.0]]]), train=False)[0].ravel().tolist()
    [0.0, 1.0, 3.0, 4.0]
    """
    wanted, kernel = spatial.size("resize", "shape", shape), _method("resize", method)

    def apply(x: Any) -> Array:
        n = spatial.spatial_axes("resize", x, wanted)
        return _resized(x, spatial.each("resize", "shape", wanted, n), kernel, antialias)

    return stateless(apply, name="resize_")


def upsample(scale: Size, *, method: str = "nearest") -> Layer:
    """Enlarges each spatial axis by the whole number ``scale``.

    Shapes: x (batch, *spatial, channels), y (batch, *(scale·spatial), channels). ``method`` and errors
    are those of :func:`resize`; other sizes are ``resize``'s too.

    Source: PyTorch's ``Upsample(scale_factor=scale)``, whose default is nearest too.

    >>> layers.upsample(2).apply({}, {}, jnp.array([[[1.0], [2.0]]]), train=False)[0].ravel().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    scale, kernel = spatial.size("upsample", "scale", scale), _method("upsample", method)

    def apply(x: Any) -> Array:
        n = spatial.spatial_axes("upsample", x, scale)
        factors = spatial.each("upsample", "scale", scale, n)
        if kernel == "nearest":
            for axis, factor in enumerate(factors, start=1):
                x = jnp.repeat(x, factor, axis)
            return x
        goal = tuple(size * factor for size, factor in zip(x.shape[1:-1], factors, strict=True))
        return _resized(x, goal, kernel, antialias=False)

    return stateless(apply, name="upsample_")


def _method(layer: str, method: str) -> str:
    if method not in _METHODS:
        raise ValueError(f"{layer}(method=...): {unknown_name('method', method, _METHODS)}")
    return _METHODS[method]


def _resized(x: Array, goal: tuple[int, ...], method: str, antialias: bool) -> Array:
    shape = (x.shape[0], *goal, x.shape[-1])
    return jax.image.resize(x.astype(tree.wide(x.dtype)), shape, method, antialias=antialias).astype(x.dtype)
