"""Group normalisation, and instance normalisation, whose groups are single channels."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from nnkit import initializers
from nnkit.checks import LayerError
from nnkit.layers.lift import positive_int
from nnkit.layers.normalization import Affine, normalization
from nnkit.types import Array, Initializer, Layer

__all__ = ["group_norm", "instance_norm"]


def group_norm(
    num_groups: int | None = 32,
    *,
    group_size: int | None = None,
    epsilon: float | Array = 1e-6,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = initializers.ones,
    bias_init: Initializer = initializers.zeros,
    axis_name: Hashable | None = None,
) -> Layer:
    """Normalises each example over groups of neighbouring channels and all positions; then scales and shifts.

    ``y = (x - m) / sqrt(v + epsilon) * scale + bias`` with the mean m and the biased variance v of a group
    of channels of one example, over all of its positions.

    Shapes: x (batch, ..., channels), or a pair (x, mask) as in :func:`nnkit.layers.layer_norm`;
    ``scale, bias`` (channels,); y as x. Half-precision input is normalised in float32.

    Args:
      num_groups: into how many groups the channels are cut (32 is the paper's); None where
        ``group_size`` is given.
      group_size: how many channels a group has.
      epsilon: added to the variance. Flax's 1e-6; PyTorch's is 1e-5.
      use_scale: whether there is a learned scale.
      use_bias: whether there is a learned shift.
      scale_init: makes the scale.
      bias_init: makes the shift.
      axis_name: the name of a mapped axis along which an example's positions are cut up.

    Raises:
      LayerError: where the groups do not divide the channels, for a mask of another shape.

    Source: Wu & He 2018, "Group normalization"; Flax's conventions.

    >>> layer = layers.group_norm(2, use_scale=False, use_bias=False)
    >>> y, _ = layer.apply({}, {}, jnp.array([[1.0, 3.0, 10.0, 30.0]]), train=True)
    >>> y.round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"group_norm takes num_groups or group_size, got {num_groups} and {group_size}: write "
            "group_norm(None, group_size=...) or group_norm(num_groups)"
        )
    n = (
        positive_int(group_size, "group_norm(group_size=...)")
        if num_groups is None
        else positive_int(num_groups, "group_norm(num_groups)")
    )

    def groups(x: Any) -> int:
        channels = x.shape[-1]
        if channels % n:
            what = f"{n} groups" if num_groups is not None else f"groups of {n}"
            fits = [d for d in range(1, channels + 1) if channels % d == 0]
            raise LayerError(
                "group_norm",
                f"cannot cut {channels} channels into {what}: use one of {fits}",
            )
        return n if num_groups is not None else channels // n

    return normalization(
        "group_norm",
        _all_but_the_batch,
        _channels,
        Affine(use_scale, use_bias, scale_init, bias_init),
        epsilon=epsilon,
        groups=groups,
        axis_name=axis_name,
    )


def instance_norm(
    *,
    epsilon: float | Array = 1e-6,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = initializers.ones,
    bias_init: Initializer = initializers.zeros,
    axis_name: Hashable | None = None,
) -> Layer:
    """Normalises each channel of each example over its positions; then scales and shifts.

    ``y = (x - m) / sqrt(v + epsilon) * scale + bias`` with the mean m and the biased variance v over the axes
    between the batch and the channels. No statistics are kept: training and test are the same.

    Shapes: x (batch, ..., channels), or a pair (x, mask) as in :func:`nnkit.layers.layer_norm`;
    ``scale, bias`` (channels,); y as x. Half-precision input is normalised in float32.

    Args:
      epsilon: added to the variance. Flax's 1e-6; PyTorch's is 1e-5.
      use_scale: whether there is a learned scale (PyTorch: not by default, ``affine=False``).
      use_bias: whether there is a learned shift (likewise).
      scale_init: makes the scale.
      bias_init: makes the shift.
      axis_name: the name of a mapped axis along which an example's positions are cut up.

    Raises:
      LayerError: for input without an axis between batch and channels, for a mask of another shape.

    Source: Ulyanov et al. 2016, "Instance normalization"; Flax's conventions.

    >>> layer = layers.instance_norm(use_scale=False, use_bias=False)
    >>> y, _ = layer.apply({}, {}, jnp.array([[[1.0, 10.0], [3.0, 30.0]]]), train=True)
    >>> y.round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    return normalization(
        "instance_norm",
        _positions,
        _channels,
        Affine(use_scale, use_bias, scale_init, bias_init),
        epsilon=epsilon,
        axis_name=axis_name,
    )


def _channels(x: Any) -> tuple[int, ...]:
    return (len(x.shape) - 1,)


def _all_but_the_batch(x: Any) -> tuple[int, ...]:
    if len(x.shape) < 2:
        raise LayerError("group_norm", f"takes (batch, ..., channels), got input of shape {x.shape}")
    return tuple(range(1, len(x.shape)))


def _positions(x: Any) -> tuple[int, ...]:
    if len(x.shape) < 3:
        raise LayerError(
            "instance_norm",
            f"takes (batch, ..., channels) with positions between, got input of shape {x.shape}, in which each "
            "channel is one number: use layer_norm()",
        )
    return tuple(range(1, len(x.shape) - 1))
