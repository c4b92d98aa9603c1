"""Convolutions that treat channels apart: depthwise, and depthwise followed by pointwise."""

from __future__ import annotations

from nnkit import initializers, ops
from nnkit.layers.combine import named, serial
from nnkit.layers.conv import conv, conv_layer
from nnkit.layers.lift import positive_int
from nnkit.layers.spatial import Padding, Size
from nnkit.types import Initializer, Layer

__all__ = ["depthwise_conv", "separable_conv"]


def depthwise_conv(
    kernel_size: Size,
    *,
    channel_multiplier: int = 1,
    strides: Size = 1,
    padding: Padding = "SAME",
    kernel_dilation: Size = 1,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
    algorithm: str | ops.Algorithms | None = None,
) -> Layer:
    """A convolution of each input channel by itself, with ``channel_multiplier`` outputs for each.

    It is ``conv`` with as many groups as channels; output channel ``c·channel_multiplier + m`` is the
    m-th of input channel c.

    Shapes: x (batch, *spatial, in), ``kernel`` (*kernel_size, 1, in·channel_multiplier), ``bias``
    (in·channel_multiplier,), y (batch, *out, in·channel_multiplier). The other arguments and the
    errors are those of :func:`nnkit.layers.conv`.

    Source: Flax's and PyTorch's grouped convolution, Keras' ``DepthwiseConv`` (whose kernel is
    (*kernel_size, in, channel_multiplier)).

    >>> layer = layers.depthwise_conv(3, channel_multiplier=2)
    >>> params, _ = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
    >>> params["kernel"].shape
    (3, 3, 1, 8)
    """
    multiplier = positive_int(channel_multiplier, "depthwise_conv(channel_multiplier=...)")
    return conv_layer(
        "depthwise_conv", lambda channels: (channels * multiplier, channels), kernel_size, strides=strides,
        padding=padding, input_dilation=1, kernel_dilation=kernel_dilation, use_bias=use_bias,
        kernel_init=kernel_init, bias_init=bias_init, algorithm=algorithm,
    )  # fmt: skip


def separable_conv(
    features: int,
    kernel_size: Size,
    *,
    channel_multiplier: int = 1,
    strides: Size = 1,
    padding: Padding = "SAME",
    kernel_dilation: Size = 1,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
    algorithm: str | ops.Algorithms | None = None,
) -> Layer:
    """A depthwise convolution without bias, then a pointwise one that mixes the channels.

    It needs Πk + features multiplications for each input channel and position where ``conv`` needs
    Πk·features. Parameters: ``depthwise/kernel`` (*kernel_size, 1, in·channel_multiplier),
    ``pointwise/kernel`` (1, ..., in·channel_multiplier, features) and ``pointwise/bias`` (features,).
    Strides, padding and dilation are the depthwise part's; the errors are those of
    :func:`nnkit.layers.conv`.

    Source: Chollet 2017, "Xception"; Keras' ``SeparableConv``.

    >>> layer = layers.separable_conv(16, 3, strides=2)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
    >>> layer.apply(params, state, jnp.zeros((5, 8, 8, 4)), train=False)[0].shape
    (5, 4, 4, 16)
    """
    depthwise = depthwise_conv(
        kernel_size, channel_multiplier=channel_multiplier, strides=strides, padding=padding,
        kernel_dilation=kernel_dilation, use_bias=False, kernel_init=kernel_init, algorithm=algorithm,
    )  # fmt: skip
    pointwise = conv(
        features, 1, use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init, algorithm=algorithm
    )
    both = serial(named("depthwise", depthwise), named("pointwise", pointwise))
    return both._replace(name="separable_conv_")
