"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from nnkit import initializers
from nnkit.layers.normalization import Affine, axes_of, normalization
from nnkit.types import Array, Initializer, Layer

__all__ = ["rms_norm"]


def rms_norm(
    *,
    epsilon: float | Array = 1e-6,
    use_scale: bool = True,
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    scale_init: Initializer = initializers.ones,
    axis_name: Hashable | None = None,
) -> Layer:
    """Divides each example, at each position by itself, by the root of its mean square over the channels.

    ``y = x / sqrt(mean(x²) + epsilon) * scale``, with the mean over ``reduction_axes``.

    Shapes: x (batch, ..., channels), or a pair (x, mask) as in :func:`nnkit.layers.layer_norm`; ``scale``
    has the lengths of ``feature_axes``; y as x. Half-precision input is normalised in float32.

    Args:
      epsilon: added to the mean square. Flax's 1e-6; PyTorch's is the dtype's ``finfo.eps``.
      use_scale: whether there is a learned scale.
      reduction_axes: the axes over which the mean goes.
      feature_axes: the axes along which the scale differs.
      scale_init: makes the scale.
      axis_name: the name of a mapped axis along which ``reduction_axes`` are cut up.

    Raises:
      LayerError: for axes that x has not, for a mask of another shape.

    Source: Zhang & Sennrich 2019, "Root mean square layer normalization"; Flax's conventions.

    >>> y, _ = layers.rms_norm(use_scale=False).apply({}, {}, jnp.array([[3.0, 3.0, -3.0]]), train=True)
    >>> y.round(3).tolist()
    [[1.0, 1.0, -1.0]]
    """
    return normalization(
        "rms_norm",
        lambda x: axes_of("rms_norm", "reduction_axes", reduction_axes, x),
        lambda x: axes_of("rms_norm", "feature_axes", feature_axes, x),
        Affine(use_scale, False, scale_init, initializers.zeros),
        epsilon=epsilon,
        centred=False,
        axis_name=axis_name,
    )
