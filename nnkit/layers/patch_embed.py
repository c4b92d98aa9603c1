"""Images as sequences of tokens."""

from __future__ import annotations

import math
from typing import Any

from nnkit import initializers, ops
from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import kernel_and_bias, param, positive_int
from nnkit.layers.spatial import Size
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["patch_embed"]


def patch_embed(
    features: int,
    patch_size: Size,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
) -> Layer:
    """Cuts the input into patches side by side and maps each affinely to one token, row by row.

    It equals ``conv(features, patch_size, strides=patch_size, padding="VALID")`` with the spatial axes
    of its output in one, and has the same parameters; the windows do not overlap, so it is computed as
    one matrix product.

    Shapes: x (batch, *spatial, channels), ``kernel`` (*patch_size, channels, features), ``bias``
    (features,), y (batch, Π spatial / Π patch_size, features).

    Raises:
      ValueError: for sizes below 1.
      LayerError: where the patches do not divide a spatial axis, and as :func:`nnkit.layers.conv`.

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words".

    >>> layer = layers.patch_embed(64, 4)
    >>> params, _ = layer.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> layer.apply(params, {}, jnp.zeros((5, 28, 28, 1)), train=False)[0].shape
    (5, 49, 64)
    """
    features = positive_int(features, "patch_embed(features=...)")
    patch_size = spatial.size("patch_embed", "patch_size", patch_size)

    def shape(x: Any, made: Any = None) -> tuple[int, ...]:
        n = spatial.spatial_axes("patch_embed", x, patch_size, None if made is None else made.shape[:-2])
        patch = spatial.each("patch_embed", "patch_size", patch_size, n)
        if any(size % p for size, p in zip(x.shape[1:-1], patch, strict=True)):
            raise LayerError(
                "patch_embed",
                f"cuts into patches of {patch} and got an input of shape {x.shape}, which they do not "
                "divide: resize or pad it first",
            )
        return (*patch, x.shape[-1], features)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        return kernel_and_bias(key, shape(x), features, x.dtype, kernel_init, bias_init, use_bias), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        wanted, why = shape(x, params.get("kernel")), f"its input has shape {x.shape}"
        kernel = param("patch_embed", params, "kernel", wanted, why)
        n = len(wanted) - 2
        x = spatial.blocks(x, wanted[:n])
        x = x.transpose(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1)
        y = ops.linear(x.reshape(x.shape[0], -1, math.prod(wanted[:-1])), kernel.reshape(-1, features))
        if use_bias:
            y = y + param("patch_embed", params, "bias", (features,), why)
        return y, state

    return Layer(init, apply, "patch_embed_")
