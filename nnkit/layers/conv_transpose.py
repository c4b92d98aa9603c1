"""Transposed convolution."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp

from nnkit import initializers, ops
from nnkit.checks import LayerError
from nnkit.layers import spatial
from nnkit.layers.lift import kernel_and_bias, param, positive_int
from nnkit.layers.spatial import Padding, PaddingPairs, Size
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["conv_transpose"]


def conv_transpose(
    features: int,
    kernel_size: Size,
    *,
    strides: Size = 1,
    padding: Padding = "SAME",
    output_padding: Size = 0,
    kernel_dilation: Size = 1,
    feature_group_count: int = 1,
    use_bias: bool = True,
    transpose_kernel: bool | None = None,
    convention: Literal["flax", "torch"] = "flax",
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
    algorithm: str | ops.Algorithms | None = None,
) -> Layer:
    """A convolution of the input with s - 1 zeros between neighbours: it enlarges by the stride s.

    With K = d(k - 1) + 1 the reach of the kernel, the size of each axis goes from n to

    ==========================  ===========================================================
    ``padding``                 size
    ==========================  ===========================================================
    ``"SAME"``, ``"CIRCULAR"``  s·n
    ``"VALID"``                 s·n + max(K - s, 0)
    pairs, ``"flax"``           (n - 1)s + 2 - K + before + after
    numbers, ``"torch"``        (n - 1)s + K - before - after + output_padding
    ==========================  ===========================================================

    The libraries mean different things by the same words. In Flax the kernel is applied as it is, and
    explicit padding is added to the dilated input. In PyTorch (``convention="torch"``) the layer is
    the transpose of the convolution with the same strides, padding and kernel: padding is what that
    convolution adds to *its* input, so that here more of it gives less output, and the kernel appears
    flipped. ``"CIRCULAR"`` adds what falls off one end of the output to the other.

    Shapes: x (batch, *spatial, in), ``kernel`` (*kernel_size, in // groups, features), or transposed
    (*kernel_size, features // groups, in), which is PyTorch's ``weight`` with its axes reversed but
    those of the window; ``bias`` (features,), y (batch, *out, features).

    Args:
      features: the number of output channels.
      kernel_size: a number for every spatial axis of the input, or a tuple with one for each.
      strides: by how much each axis grows, likewise.
      padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, or as in :func:`nnkit.layers.conv` in numbers;
        under ``"torch"`` numbers only, 0 being PyTorch's default.
      output_padding: rows added at the end of the output, PyTorch's; below the stride or the dilation.
      kernel_dilation: the distance between the elements of the kernel.
      feature_group_count: splits input and output channels into groups that do not mix.
      use_bias: whether there is a bias.
      transpose_kernel: whether the kernel is that of the convolution this one is the transpose of,
        flipped in space and with its outputs before its inputs. Flax's argument; it follows
        ``convention`` unless given.
      convention: whose padding and kernel.
      kernel_init: makes the kernel.
      bias_init: makes the bias.
      algorithm: that of ``nnkit.ops.conv``, which chooses by itself where there is none.

    Raises:
      ValueError: for sizes below 1, a padding that the convention does not know, an ``output_padding``
        that is too large or not ``"torch"``'s.
      LayerError: as :func:`nnkit.layers.conv` does, and where nothing of the output would be left.

    Source: Flax's ``ConvTranspose``; PyTorch's ``ConvTranspose1d`` to ``ConvTranspose3d``.

    >>> x = jnp.zeros((5, 7, 7, 4))
    >>> for layer in (
    ...     layers.conv_transpose(8, 4, strides=2),
    ...     layers.conv_transpose(8, 4, strides=2, padding=1, convention="torch"),
    ... ):
    ...     params, _ = layer.init(jax.random.key(0), x)
    ...     print(params["kernel"].shape, layer.apply(params, {}, x, train=False)[0].shape)
    (4, 4, 4, 8) (5, 14, 14, 8)
    (4, 4, 8, 4) (5, 14, 14, 8)
    """
    name = "conv_transpose"
    features = positive_int(features, f"{name}(features=...)")
    groups = positive_int(feature_group_count, f"{name}(feature_group_count=...)")
    if features % groups:
        raise ValueError(
            f"{name}(features={features}, feature_group_count={groups}): the groups must divide the features"
        )
    if convention not in ("flax", "torch"):
        raise ValueError(f"{name}(convention=...) must be 'flax' or 'torch', got {convention!r}")
    kernel_size = spatial.size(name, "kernel_size", kernel_size)
    strides = spatial.size(name, "strides", strides)
    kernel_dilation = spatial.size(name, "kernel_dilation", kernel_dilation)
    known = spatial.known_padding(name, padding, ("SAME", "VALID", "CIRCULAR"))
    if convention == "torch" and isinstance(known, str):
        raise ValueError(
            f"{name}(padding={padding!r}, convention='torch'): PyTorch's padding is a number, 0 by default: "
            "write padding=0"
        )
    more = spatial.known_padding(name, output_padding, ())
    if convention == "flax" and more != 0:
        raise ValueError(
            f"{name}(output_padding={output_padding}) is PyTorch's: write convention='torch', or add it to "
            "the second number of each pair of padding"
        )
    flipped = convention == "torch" if transpose_kernel is None else transpose_kernel

    def shapes(x: Any, made: Any = None) -> tuple[int, ...]:
        n = spatial.spatial_axes(name, x, kernel_size, None if made is None else made.shape[:-2])
        channels = x.shape[-1]
        if channels % groups:
            raise LayerError(
                name,
                f"has feature_group_count={groups}, which does not divide the {channels} channels of its "
                f"input of shape {x.shape}",
            )
        window = spatial.each(name, "kernel_size", kernel_size, n)
        return (*window, *((features // groups, channels) if flipped else (channels // groups, features)))

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        shape = shapes(x)
        return kernel_and_bias(key, shape, features, x.dtype, kernel_init, bias_init, use_bias), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        shape = shapes(x, params.get("kernel"))
        n, why = len(shape) - 2, f"its input has shape {x.shape}"
        steps = spatial.each(name, "strides", strides, n)
        apart = spatial.each(name, "kernel_dilation", kernel_dilation, n)
        kernel = param(name, params, "kernel", shape, why)
        window = spatial.dilated(shape[:n], apart)
        if convention == "torch":
            pairs = _torch_padding(known, more, window, steps, apart)
        elif isinstance(known, str):
            pairs = tuple(_named_padding(known, k, s) for k, s in zip(window, steps, strict=True))
        else:
            pairs = spatial.explicit_padding(name, known, n)
        spatial.check_fits(name, x.shape, spatial.dilated(x.shape[1:-1], steps), window, pairs)
        periods = [size * s for size, s in zip(x.shape[1:-1], steps, strict=True)]
        y = ops.conv_transpose(
            x, _as_forward(kernel, groups) if flipped else kernel, strides=steps, padding=pairs,
            kernel_dilation=apart, feature_group_count=groups, algorithm=algorithm,
        )  # fmt: skip
        if known == "CIRCULAR":
            y = _wrapped(y, periods, extra_before=not flipped)
        if use_bias:
            y = y + param(name, params, "bias", (features,), why)
        return y, state

    return Layer(init, apply, f"{name}_")


def _named_padding(padding: str, k: int, s: int) -> tuple[int, int]:
    """The padding of the dilated input in lax and Flax; CIRCULAR is VALID until it is wrapped."""
    if padding == "SAME":
        before = k - 1 if s > k - 1 else math.ceil((k + s - 2) / 2)
        return before, k + s - 2 - before
    return k - 1, s - 1 + max(k - s, 0)


def _torch_padding(
    padding: Any, more: Any, window: tuple[int, ...], strides: tuple[int, ...], dilation: tuple[int, ...]
) -> PaddingPairs:
    n = len(window)
    forward = spatial.explicit_padding("conv_transpose", padding, n)
    at_end = [after for _, after in spatial.explicit_padding("conv_transpose", more, n)]
    for extra, s, d in zip(at_end, strides, dilation, strict=True):
        if extra >= max(s, d):
            raise LayerError(
                "conv_transpose",
                f"has output_padding={extra}, which must be smaller than the stride {s} or the dilation {d}",
            )
    return tuple(
        (k - 1 - before, k - 1 - after + extra)
        for k, (before, after), extra in zip(window, forward, at_end, strict=True)
    )


def _as_forward(kernel: Array, groups: int) -> Array:
    """(*window, out // groups, in) to (*window, in // groups, out), flipped in space."""
    *window, out, channels = kernel.shape
    kernel = jnp.flip(kernel, tuple(range(len(window))))
    kernel = kernel.reshape(*window, out, groups, channels // groups)
    kernel = jnp.moveaxis(kernel, -1, -3)  # (*window, in // groups, out // groups, groups)
    return jnp.swapaxes(kernel, -1, -2).reshape(*window, channels // groups, groups * out)


def _wrapped(y: Array, periods: list[int], *, extra_before: bool) -> Array:
    """``y`` summed over its shifts by whole periods, so that each axis has the size of its period.

    It is centred in an odd number of periods, the middle one being the output; for an even kernel
    the odd element goes before, or behind where the kernel is transposed (Flax's choice).
    """
    for axis, period in enumerate(periods, start=1):
        missing = -(y.shape[axis] - period) % (2 * period)
        small, large = missing // 2, (missing + 1) // 2
        widths = [(0, 0)] * y.ndim
        widths[axis] = (large, small) if extra_before else (small, large)
        y = jnp.pad(y, widths)
        y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
    return y
