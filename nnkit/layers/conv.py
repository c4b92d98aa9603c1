"""Convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnkit import initializers, ops
from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import kernel_and_bias, param, positive_int
from nnkit.layers.spatial import Padding, Size
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["conv", "conv_layer"]

_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
_PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CAUSAL", *_MODES)


def conv(
    features: int,
    kernel_size: Size,
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    input_dilation: Size = 1,
    kernel_dilation: Size = 1,
    feature_group_count: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
    algorithm: str | ops.Algorithms | None = None,
) -> Layer:
    """A convolution over any number of spatial axes: each window of the input times a kernel, plus a bias.

    In one dimension, with stride s and kernel dilation d,
    ``y[i, o] = b[o] + Σⱼ Σ꜀ x[s·i + d·j - before, c] W[j, c, o]``: the kernel is not flipped.

    Shapes: x (batch, *spatial, in), ``kernel`` W (*kernel_size, in // feature_group_count, features),
    ``bias`` b (features,), y (batch, *out, features) with
    ``out = (n + before + after - d(k - 1) - 1) // s + 1``. Parameters take the dtype of ``x``.

    Args:
      features: the number of output channels.
      kernel_size: a number for every spatial axis of the input, or a tuple with one for each.
      strides: how far the window moves, likewise.
      padding: ``"SAME"`` (⌈n / s⌉ outputs; the odd element of padding comes after, under
        ``"SAME_LOWER"`` before), ``"VALID"`` (none), ``"CAUSAL"`` (one spatial axis; all of it before),
        ``"CIRCULAR"`` and ``"REFLECT"`` (not zeros but the input itself), a number for all sides as in
        PyTorch, or for each axis a number or a pair (before, after).
      input_dilation: puts this minus one zeros between neighbouring elements of the input.
      kernel_dilation: the distance between the elements of the kernel (PyTorch's ``dilation``).
      feature_group_count: splits input and output channels into groups that do not mix (PyTorch's
        ``groups``).
      use_bias: whether there is a bias.
      kernel_init: makes the kernel.
      bias_init: makes the bias.
      algorithm: that of ``nnkit.ops.conv``, which chooses by itself where there is none.

    Raises:
      ValueError: for sizes below 1, an unknown padding, features that the groups do not divide.
      LayerError: for input of another number of axes, whose channels are not the kernel's or are not
        divided by the groups, or that is smaller than the window.

    Source: Flax's ``Conv`` in names, defaults and padding; PyTorch's ``Conv1d`` to ``Conv3d`` with
    ``padding=`` a number (0 by default there) and ``kernel_init=variance_scaling(1 / 3, "fan_in",
    "uniform")``. The algorithm and its gradients are those of ``nnkit.ops.conv``.

    >>> layer = layers.conv(8, 3, strides=2)
    >>> params, _ = layer.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    >>> params["kernel"].shape
    (3, 3, 1, 8)
    >>> layer.apply(params, {}, jnp.zeros((5, 28, 28, 1)), train=False)[0].shape
    (5, 14, 14, 8)
    """
    features = positive_int(features, "conv(features=...)")
    groups = positive_int(feature_group_count, "conv(feature_group_count=...)")
    if features % groups:
        raise ValueError(
            f"conv(features={features}, feature_group_count={groups}): the groups must divide the features"
        )
    return conv_layer(
        "conv", lambda channels: (features, groups), kernel_size, strides=strides, padding=padding,
        input_dilation=input_dilation, kernel_dilation=kernel_dilation, use_bias=use_bias,
        kernel_init=kernel_init, bias_init=bias_init, algorithm=algorithm,
    )  # fmt: skip


def conv_layer(
    name: str,
    features_and_groups: Callable[[int], tuple[int, int]],
    kernel_size: Size,
    *,
    strides: Size,
    padding: Padding,
    input_dilation: Size,
    kernel_dilation: Size,
    use_bias: bool,
    kernel_init: Initializer,
    bias_init: Initializer,
    algorithm: str | ops.Algorithms | None,
) -> Layer:
    """A convolution whose features and groups may be a function of the input's channels."""
    kernel_size = spatial.size(name, "kernel_size", kernel_size)
    strides = spatial.size(name, "strides", strides)
    input_dilation = spatial.size(name, "input_dilation", input_dilation)
    kernel_dilation = spatial.size(name, "kernel_dilation", kernel_dilation)
    known = spatial.known_padding(name, padding, _PADDINGS)

    def shapes(x: Any, made: Any = None) -> tuple[tuple[int, ...], int, int]:
        n = spatial.spatial_axes(name, x, kernel_size, None if made is None else made.shape[:-2])
        channels = x.shape[-1]
        features, groups = features_and_groups(channels)
        if channels % groups:
            raise LayerError(
                name,
                f"has feature_group_count={groups}, which does not divide the {channels} channels of its "
                f"input of shape {x.shape}",
            )
        window = spatial.each(name, "kernel_size", kernel_size, n)
        return (*window, channels // groups, features), features, groups

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        kernel, features, _ = shapes(x)
        return kernel_and_bias(key, kernel, features, x.dtype, kernel_init, bias_init, use_bias), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        shape, features, groups = shapes(x, params.get("kernel"))
        n = len(shape) - 2
        steps = spatial.each(name, "strides", strides, n)
        between = spatial.each(name, "input_dilation", input_dilation, n)
        apart = spatial.each(name, "kernel_dilation", kernel_dilation, n)
        kernel = param(name, params, "kernel", shape, _why(params, x, groups))
        window = spatial.dilated(shape[:n], apart)
        given = x.shape
        pad: str | int | tuple[Any, ...] = known
        if known in _MODES:
            x, pad = spatial.pad_by_mode(x, window, _MODES[known]), "VALID"
        sizes = spatial.dilated(x.shape[1:-1], between)
        pairs = spatial.padding_pairs(name, pad, sizes, window, steps)
        spatial.check_fits(name, given, sizes, window, pairs)
        y = ops.conv(
            x, kernel, strides=steps, padding=pairs, input_dilation=between, kernel_dilation=apart,
            feature_group_count=groups, algorithm=algorithm,
        )  # fmt: skip
        if use_bias:
            y = y + param(name, params, "bias", (features,), f"its input has shape {given}")
        return y, state

    return Layer(init, apply, f"{name}_")


def _why(params: Params, x: Any, groups: int) -> str:
    """What is said where the kernel is not of the shape that ``x`` needs."""
    why = f"its input has shape {x.shape}"
    kernel = params.get("kernel")
    if kernel is not None and kernel.ndim == x.ndim and x.shape[1] == kernel.shape[-2] * groups:
        why += ". Channels come last here: write jnp.moveaxis(x, 1, -1) if axis 1 holds them"
    return why
