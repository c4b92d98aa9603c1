"""Trading channels for resolution, and back."""

from __future__ import annotations

from typing import Any

from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import positive_int, stateless
from nnkit.types import Array, Layer

__all__ = ["pixel_shuffle", "pixel_unshuffle"]


def pixel_shuffle(factor: int) -> Layer:
    """Enlarges each spatial axis by r = ``factor``, taking the new elements from the channels.

    In two dimensions ``y[b, r·h + i, r·w + j, c] = x[b, h, w, r²·c + r·i + j]``: PyTorch's order of
    channels, with channels last (TensorFlow's ``depth_to_space`` has r·C·i + C·j + c).

    Shapes: x (batch, *spatial, C·rⁿ) with n spatial axes, y (batch, *(r·spatial), C).

    Raises:
      LayerError: where rⁿ does not divide the channels.

    Source: Shi et al. 2016, "Real-time single image and video super-resolution using an efficient
    sub-pixel convolutional neural network"; PyTorch's ``PixelShuffle``.

    >>> x = jnp.arange(4.0).reshape(1, 1, 1, 4)
    >>> layers.pixel_shuffle(2).apply({}, {}, x, train=False)[0][0, :, :, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    r = positive_int(factor, "pixel_shuffle(factor=...)")

    def shuffle(x: Any) -> Array:
        n = spatial.spatial_axes("pixel_shuffle", x)
        batch, *sizes, channels = x.shape
        if channels % r**n:
            raise LayerError(
                "pixel_shuffle",
                f"with factor {r} needs a multiple of {r**n} channels and got {channels} (input of shape "
                f"{x.shape})",
            )
        x = x.reshape(batch, *sizes, channels // r**n, *[r] * n)
        pairs = [axis for i in range(n) for axis in (1 + i, n + 2 + i)]
        return x.transpose(0, *pairs, n + 1).reshape(batch, *(r * size for size in sizes), -1)

    return stateless(shuffle, name="pixel_shuffle_")


def pixel_unshuffle(factor: int) -> Layer:
    """The inverse of :func:`pixel_shuffle`: each rⁿ block of a channel becomes rⁿ channels.

    Shapes: x (batch, *(r·spatial), C) with n spatial axes, y (batch, *spatial, C·rⁿ).

    Raises:
      LayerError: where ``factor`` does not divide a spatial axis.

    Source: PyTorch's ``PixelUnshuffle``.

    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> layers.pixel_unshuffle(2).apply({}, {}, x, train=False)[0].ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    r = positive_int(factor, "pixel_unshuffle(factor=...)")

    def unshuffle(x: Any) -> Array:
        n = spatial.spatial_axes("pixel_unshuffle", x)
        batch, *sizes, _ = x.shape
        if any(size % r for size in sizes):
            raise LayerError(
                "pixel_unshuffle",
                f"with factor {r} needs spatial axes that it divides and got an input of shape {x.shape}",
            )
        x = spatial.blocks(x, (r,) * n)
        x = x.transpose(0, *range(1, 2 * n, 2), 2 * n + 1, *range(2, 2 * n + 1, 2))
        return x.reshape(batch, *(size // r for size in sizes), -1)

    return stateless(unshuffle, name="pixel_unshuffle_")
