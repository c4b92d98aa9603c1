"""Pooling: what windows of an array have for their maximum, minimum, sum or mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from nnkit.ops import pooling_windows
from nnkit.ops.pooling_windows import Windows, largest
from nnkit.ops.primitives import bind, by_platform
from nnkit.tree import wide
from nnkit.types import Array

__all__ = ["avg_pool", "max_pool", "min_pool", "sum_pool"]


def max_pool(
    x: Array, window: Sequence[int], *, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Array:
    """The largest element of each window.

    Of several equal ones the first takes the whole gradient, as in XLA and PyTorch. A window that holds a
    NaN is NaN, and the first NaN takes the gradient. What is padded is the smallest number there is.

    Args:
      x: (batch, \\*spatial, channels), of floats or integers.
      window: the window's size along each spatial axis.
      strides: between neighbouring windows.
      padding: how much to add before and after each spatial axis; a negative number cuts elements off.

    Returns:
      (batch, \\*windows, channels), of x's dtype.

    Raises:
      ValueError: for arguments that do not go with x's shape.

    >>> x = jnp.asarray([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> ops.max_pool(x, (2,), strides=(2,), padding=((0, 0),)).ravel().tolist()
    [3.0, 3.0]
    """
    return bind(_largest, x, windows=_windows("max_pool", x, window, strides, padding))


def min_pool(
    x: Array, window: Sequence[int], *, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Array:
    """The smallest element of each window; otherwise as :func:`max_pool`.

    >>> x = jnp.asarray([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> ops.min_pool(x, (2,), strides=(2,), padding=((0, 0),)).ravel().tolist()
    [1.0, 2.0]
    """
    windows = _windows("min_pool", x, window, strides, padding)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return -bind(_largest, -x, windows=windows)
    return ~bind(_largest, ~x, windows=windows)  # the order reversed, where a negative may not exist


def sum_pool(
    x: Array, window: Sequence[int], *, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> Array:
    """The sum of each window, where what is padded is 0; the arguments are :func:`max_pool`'s.

    float16 and bfloat16 are summed in float32.

    >>> x = jnp.asarray([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> ops.sum_pool(x, (2,), strides=(1,), padding=((0, 0),)).ravel().tolist()
    [4.0, 6.0, 5.0]
    """
    return bind(_total, x, windows=_windows("sum_pool", x, window, strides, padding), sizes=x.shape[1:-1])


def avg_pool(
    x: Array,
    window: Sequence[int],
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    count_include_pad: bool = True,
) -> Array:
    """The mean of each window; the arguments are :func:`max_pool`'s.

    float16 and bfloat16 are computed in float32 and rounded once.

    Args:
      x: (batch, \\*spatial, channels), of floats.
      window: the window's size along each spatial axis.
      strides: between neighbouring windows.
      padding: how much to add before and after each spatial axis.
      count_include_pad: whether padding counts as elements that are 0, as in Flax and PyTorch, or not
        at all; a window of nothing but padding has then the mean 0.

    >>> x = jnp.asarray([1.0, 3.0, 3.0, 2.0]).reshape(1, 4, 1)
    >>> ops.avg_pool(x, (2,), strides=(2,), padding=((1, 1),)).ravel().tolist()
    [0.5, 3.0, 1.0]
    >>> ops.avg_pool(x, (2,), strides=(2,), padding=((1, 1),), count_include_pad=False).ravel().tolist()
    [1.0, 3.0, 2.0]
    """
    windows = _windows("avg_pool", x, window, strides, padding)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"avg_pool takes floats, got {x.dtype}")
    whole = functools.partial(bind, _total, windows=windows, sizes=x.shape[1:-1])
    total = whole(x.astype(wide(x.dtype)))
    if count_include_pad:
        return (total / jnp.asarray(math.prod(windows.window), total.dtype)).astype(x.dtype)
    ones = jnp.ones((1, *x.shape[1:-1], 1), total.dtype)
    return (total / jnp.maximum(whole(ones), jnp.ones((), total.dtype))).astype(x.dtype)


def _windows(name: str, x: Array, window: Any, strides: Any, padding: Any) -> Windows:
    n = x.ndim - 2
    for argument, values in (("window", window), ("strides", strides)):
        if n < 0 or len(values) != n or min(values, default=1) < 1:
            raise ValueError(
                f"{name} takes {argument} of one positive integer for each spatial axis of x (batch, *spatial, "
                f"channels), got {values} for x of shape {x.shape}"
            )
    if isinstance(padding, str) or len(padding) != n or any(len(p) != 2 for p in padding):
        raise ValueError(
            f"{name} takes padding as {n} pairs (low, high) for x of shape {x.shape}, got {padding!r}; "
            f'names such as "SAME" are nnkit.layers.{name}\'s matter'
        )
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return Windows(tuple(map(int, window)), tuple(map(int, strides)), pairs)


def _pooled(x: tuple[int, ...], *_: Any, windows: Windows, sizes: Any = None) -> tuple[int, ...]:
    return (x[0], *windows.output(x[1:-1]), x[-1])


def _xla_pick(t: Array, x: Array, windows: Windows) -> Array:
    return jax.jvp(lambda x: largest(x, windows), (x,), (t,))[1]


def _xla_place(t: Array, x: Array, windows: Windows) -> Array:
    return jax.vjp(lambda x: largest(x, windows), x)[1](t)[0]


def _total_in_float32(x: Array, windows: Windows, sizes: Any) -> Array:
    return _wide(x, lambda x: pooling_windows.total(x, windows))


def _spread_in_float32(t: Array, windows: Windows, sizes: Any) -> Array:
    return _wide(t, lambda t: pooling_windows.spread(t, windows, sizes))


def _xla_spread(t: Array, windows: Windows, sizes: Any) -> Array:
    x = jax.ShapeDtypeStruct((t.shape[0], *sizes, t.shape[-1]), t.dtype)
    return jax.linear_transpose(lambda x: pooling_windows.total(x, windows), x)(t)[0]


def _wide(x: Array, f: Any) -> Array:
    narrow = x.dtype in (jnp.float16, jnp.bfloat16)
    return f(x.astype(jnp.float32)).astype(x.dtype) if narrow else f(x)


# A maximum; what of t stands where it is, linear in t; and its transpose, which is the gradient. A sum and its
# transpose. As primitives, they can be differentiated forward and backward as often as one likes, and the
# gradients are written out by hand on a CPU and left to XLA elsewhere.
_largest = by_platform("nnkit_max_pool", _pooled, largest, largest)
_pick = by_platform("nnkit_max_pool_tangent", _pooled, pooling_windows.pick, _xla_pick)
_place = by_platform("nnkit_max_pool_gradient", lambda t, x, windows: x, pooling_windows.place, _xla_place)
_total = by_platform("nnkit_sum_pool", _pooled, _total_in_float32, _total_in_float32)
_spread = by_platform(
    "nnkit_sum_pool_gradient",
    lambda t, windows, sizes: (t[0], *sizes, t[-1]),
    _spread_in_float32,
    _xla_spread,
)


def _jvp_of_largest(primals: Any, tangents: Any, windows: Windows) -> Any:
    (x,), (t,) = primals, tangents
    y = bind(_largest, x, windows=windows)
    if isinstance(t, ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, bind(_pick, t, x, windows=windows)


def _linear_in_the_first(primitive: Primitive, transpose: Primitive) -> None:
    """Of (t, x), linear in t; in x constant wherever it has a derivative at all."""

    def transposed(ct: Any, t: Any, x: Array, windows: Windows) -> Any:
        return [ad.Zero(t.aval) if isinstance(ct, ad.Zero) else bind(transpose, ct, x, windows=windows), None]

    ad.defjvp(primitive, lambda t, _, x, windows: bind(primitive, t, x, windows=windows), None)
    ad.primitive_transposes[primitive] = transposed


ad.primitive_jvps[_largest] = _jvp_of_largest
_linear_in_the_first(_pick, _place)
_linear_in_the_first(_place, _pick)
ad.deflinear2(_total, lambda ct, x, windows, sizes: [bind(_spread, ct, windows=windows, sizes=sizes)])
ad.deflinear2(_spread, lambda ct, t, windows, sizes: [bind(_total, ct, windows=windows, sizes=sizes)])


def _mapped(operands: Any, axes: Any, *, primitive: Primitive, **static: Any) -> Any:
    """A mapped axis becomes part of the examples'; an operand that is not mapped is repeated along it."""
    size = next(a.shape[at] for a, at in zip(operands, axes, strict=True) if at is not None)
    leading = [
        jnp.broadcast_to(a, (size, *a.shape)) if at is None else jnp.moveaxis(a, at, 0)
        for a, at in zip(operands, axes, strict=True)
    ]
    y = bind(primitive, *(a.reshape(size * a.shape[1], *a.shape[2:]) for a in leading), **static)
    return y.reshape(size, leading[0].shape[1], *y.shape[1:]), 0


for _primitive in (_largest, _pick, _place, _total, _spread):
    batching.primitive_batchers[_primitive] = functools.partial(_mapped, primitive=_primitive)
