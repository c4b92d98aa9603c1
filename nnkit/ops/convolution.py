"""Convolution and transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from nnkit.ops.convolution_choice import Algorithms, checked, choose
from nnkit.ops.convolution_geometry import Geometry
from nnkit.ops.convolution_primitives import convolve
from nnkit.types import Array, Spec

__all__ = ["Algorithms", "conv", "conv_algorithm", "conv_algorithms", "conv_transpose"]

# Part of the key of jax.jit's caches: a function traced under one setting is traced anew under another.
_default = jax.make_user_context(Algorithms())


def conv(
    x: Array,
    kernel: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    algorithm: str | Algorithms | None = None,
) -> Array:
    """The convolution (cross-correlation) of x with a kernel, channels last, in any number of axes.

    ``y[n, o, j] = sum over k, i of kernel[k, i, j] x[n, o strides + k kernel_dilation - low, i]``, where x
    is dilated first and counts as 0 outside. The same function as ``jax.lax.conv_general_dilated`` with
    ``NHWC`` and ``HWIO``, and of the same derivatives, forward and backward and of any order; but on a CPU
    each of convolution, input gradient and kernel gradient has an algorithm that is fast within a loop
    too (``docs/numerics.md``). float16 and bfloat16 are summed in float32 there.

    Args:
      x: (batch, \\*spatial, in).
      kernel: (\\*window, in / feature_group_count, out), of x's dtype.
      strides: between neighbouring places of the window, for each spatial axis.
      padding: zeros before and after each spatial axis; a negative number cuts elements off.
      input_dilation: x's elements are moved this far apart, with zeros between.
      kernel_dilation: likewise the kernel's.
      feature_group_count: into how many groups the channels are divided, which do not mix.
      algorithm: :class:`Algorithms`, or one name for all three places; without it what
        :func:`conv_algorithms` says, or else the choice of :func:`conv_algorithm`.

    Returns:
      (batch, \\*output, out), of x's dtype.

    Raises:
      TypeError: for operands of two dtypes.
      ValueError: for shapes, arguments or an algorithm that do not go together.

    >>> x = jnp.arange(5.0).reshape(1, 5, 1)
    >>> ops.conv(x, jnp.ones((3, 1, 1)), strides=(1,), padding=((1, 1),)).ravel().tolist()
    [1.0, 3.0, 6.0, 9.0, 7.0]
    """
    geometry = _geometry(x, kernel, strides, padding, input_dilation, kernel_dilation, feature_group_count)
    if x.dtype != kernel.dtype:
        raise TypeError(f"conv takes operands of one dtype, got {x.dtype} and a kernel of {kernel.dtype}")
    use = _default.value if algorithm is None else algorithm
    return convolve(x, kernel, geometry, checked(use, geometry))


def conv_transpose(
    x: Array,
    kernel: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    kernel_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    algorithm: str | Algorithms | None = None,
) -> Array:
    """A convolution of x dilated by ``strides``: as many outputs for each input.

    Args:
      x: (batch, \\*spatial, in).
      kernel: (\\*window, in / feature_group_count, out), of x's dtype, not flipped.
      strides: how far apart x's elements are moved.
      padding: zeros before and after the dilated input's axes.
      kernel_dilation: how far apart the kernel's elements are moved.
      feature_group_count: into how many groups the channels are divided.
      algorithm: as in :func:`conv`.

    Returns:
      (batch, \\*output, out), of x's dtype.

    >>> x = jnp.asarray([1.0, 2.0]).reshape(1, 2, 1)
    >>> ops.conv_transpose(x, jnp.ones((2, 1, 1)), strides=(2,), padding=((1, 1),)).ravel().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    return conv(
        x, kernel, strides=(1,) * (x.ndim - 2), padding=padding, input_dilation=strides,
        kernel_dilation=kernel_dilation, feature_group_count=feature_group_count, algorithm=algorithm,
    )  # fmt: skip


def conv_algorithm(
    x: Spec,
    kernel: Spec,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None = None,
    kernel_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    platform: str = "cpu",
) -> Algorithms:
    """What :func:`conv` of these arguments would use where nothing else is asked for.

    The choice depends on nothing but what is given here: shapes, and the platform for which the program
    is compiled. On all platforms but ``"cpu"`` it is XLA's own.

    >>> x, kernel = jax.ShapeDtypeStruct((128, 14, 14, 32), "float32"), jax.ShapeDtypeStruct((3, 3, 32, 64), "float32")
    >>> ops.conv_algorithm(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)))
    Algorithms(forward='row', input_gradient='row', kernel_gradient='im2col')
    """
    geometry = _geometry(x, kernel, strides, padding, input_dilation, kernel_dilation, feature_group_count)
    if platform != "cpu":
        return Algorithms("xla", "xla", "xla")
    return Algorithms(
        *(choose(place, geometry, x.shape[-1], kernel.shape[-1]) for place in Algorithms._fields)
    )


def conv_algorithms(algorithm: str | Algorithms) -> AbstractContextManager[Any]:
    """A context in which :func:`conv` uses what is asked for, also within layers and compiled functions.

    A function compiled outside is compiled anew within. ``algorithm`` is as in :func:`conv`.

    >>> conv = jax.jit(lambda x, k: ops.conv(x, k, strides=(1,), padding=((0, 0),)))
    >>> with ops.conv_algorithms("xla"):
    ...     y = conv(jnp.ones((1, 4, 2)), jnp.ones((2, 2, 3)))
    >>> with ops.conv_algorithms(ops.Algorithms(forward="im2col")):
    ...     y = conv(jnp.ones((1, 4, 2)), jnp.ones((2, 2, 3)))
    """
    return _default(checked(algorithm, None))


def _geometry(
    x: Spec,
    kernel: Spec,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    input_dilation: Sequence[int] | None,
    kernel_dilation: Sequence[int] | None,
    groups: int,
) -> Geometry:
    n = len(x.shape) - 2
    if n < 0 or len(kernel.shape) != n + 2:
        raise ValueError(
            f"conv takes x (batch, *spatial, in) and a kernel (*window, in, out) with as many axes, got "
            f"shapes {x.shape} and {kernel.shape}"
        )
    inputs, seen, outputs = x.shape[-1], *kernel.shape[-2:]
    if groups < 1 or seen * groups != inputs or outputs % groups:
        raise ValueError(
            f"conv of {inputs} input channels in feature_group_count={groups} groups takes a kernel of shape "
            f"(*window, in / groups, out) with out divisible by the groups, got {kernel.shape}"
        )
    ones = (1,) * n
    arguments = {
        "strides": strides,
        "input_dilation": ones if input_dilation is None else input_dilation,
        "kernel_dilation": ones if kernel_dilation is None else kernel_dilation,
    }
    for name, values in arguments.items():
        if len(values) != n or min(values, default=1) < 1:
            raise ValueError(
                f"conv takes {name} of {n} positive integers for x of shape {x.shape}, got {values}"
            )
    if isinstance(padding, str) or len(padding) != n or any(len(p) != 2 for p in padding):
        raise ValueError(
            f"conv takes padding as {n} pairs (low, high) for x of shape {x.shape}, got {padding!r}; "
            'names such as "SAME" are nnkit.layers.conv\'s matter'
        )
    return Geometry(
        sizes=tuple(x.shape[1:-1]),
        window=tuple(kernel.shape[:-2]),
        strides=tuple(map(int, arguments["strides"])),
        padding=tuple((int(low), int(high)) for low, high in padding),
        input_dilation=tuple(map(int, arguments["input_dilation"])),
        kernel_dilation=tuple(map(int, arguments["kernel_dilation"])),
        groups=int(groups),
    )
