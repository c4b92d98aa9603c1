"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from nnkit import initializers
from nnkit.layers.normalization import Affine, axes_of, normalization
from nnkit.types import Array, Initializer, Layer

__all__ = ["layer_norm"]


def layer_norm(
    *,
    epsilon: float | Array = 1e-6,
    use_scale: bool = True,
    use_bias: bool = True,
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    scale_init: Initializer = initializers.ones,
    bias_init: Initializer = initializers.zeros,
    axis_name: Hashable | None = None,
) -> Layer:
    """Normalises each example, at each position by itself, over its channels; then scales and shifts.

    ``y = (x - m) / sqrt(v + epsilon) * scale + bias`` with the mean m and the biased variance v of x over
    ``reduction_axes``, the variance by a second pass.

    Shapes: x (batch, ..., channels), or a pair (x, mask); ``scale, bias`` have the lengths of
    ``feature_axes``; y as x. A mask has the axes of x from the first on, each as long or of length 1;
    entries where it is 0 count in no moment and are normalised with the rest. Half-precision input is
    normalised in float32.

    Args:
      epsilon: added to the variance. Flax's 1e-6; PyTorch's is 1e-5.
      use_scale: whether there is a learned scale.
      use_bias: whether there is a learned shift.
      reduction_axes: the axes over which the moments go.
      feature_axes: the axes along which scale and bias differ. PyTorch's ``LayerNorm((h, w, c))`` has
        the last three for both arguments.
      scale_init: makes the scale.
      bias_init: makes the shift.
      axis_name: the name of a mapped axis (``jax.vmap``, ``jax.shard_map``) along which ``reduction_axes``
        are cut up: the moments then go over all its members.

    Raises:
      LayerError: for axes that x has not, for a mask of another shape.

    Source: Ba et al. 2016, "Layer normalization"; Flax's conventions.

    >>> layer = layers.layer_norm(use_scale=False, use_bias=False)
    >>> y, _ = layer.apply({}, {}, jnp.array([[1.0, 3.0], [10.0, 30.0]]), train=True)
    >>> y.round(3).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    return normalization(
        "layer_norm",
        lambda x: axes_of("layer_norm", "reduction_axes", reduction_axes, x),
        lambda x: axes_of("layer_norm", "feature_axes", feature_axes, x),
        Affine(use_scale, use_bias, scale_init, bias_init),
        epsilon=epsilon,
        axis_name=axis_name,
    )
