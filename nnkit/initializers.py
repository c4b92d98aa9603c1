"""Initial values of parameters: ``(key, shape, dtype=float32) -> array``.

``zeros`` and ``ones`` are initializers; all others return one: ``he_normal()(key, shape)``. Kernels
have their outputs last, ``(..., in, out)``. Everything equals ``jax.nn.initializers`` (JAX 0.10.2) bit
for bit under the same key and dtype; the other conventions are named:

==========================================  ========================================================
PyTorch's kaiming and xavier normals        ``truncated=False`` (the uniform ones are the same)
PyTorch's Linear and Conv, U(±1/√fan_in)    ``variance_scaling(1 / 3, "fan_in", "uniform")``
the lecture's Xavier, N(0, 1/(in + out))    ``xavier_normal(mode="fan_sum", truncated=False)``
Flax's embedding, N(0, 1/features)          ``lecun_normal(in_axis=1, out_axis=0, truncated=False)``
==========================================  ========================================================

A scale may be a traced value, so that a sweep can map over it; a plain number must be finite and not
negative (ValueError). A dtype must be floating-point, and whatever draws needs a typed key (TypeError).
A shape with a 0 in it gives an empty array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nnkit.checks import check_key, is_static_number, unknown_name
from nnkit.types import Initializer

__all__ = [
    "constant",
    "fans",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

Axes: TypeAlias = int | Sequence[int]
Scalar: TypeAlias = float | Float[Array, ""]


def zeros(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """All 0, where biases start; the key is not looked at.

    >>> zeros(None, (3,))
    Array([0., 0., 0.], dtype=float32)
    """
    return jnp.zeros(_checked("zeros", shape, dtype), dtype)


def ones(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """All 1, where the scales of normalisation layers start; the key is not looked at.

    >>> ones(None, (3,))
    Array([1., 1., 1.], dtype=float32)
    """
    return jnp.ones(_checked("ones", shape, dtype), dtype)


def constant(value: Any) -> Initializer:
    """All ``value``, a number or an array that broadcasts to the shape; the key is not looked at.

    >>> constant(0.25)(None, (3,))
    Array([0.25, 0.25, 0.25], dtype=float32)
    """

    def init(key, shape, dtype=jnp.float32):
        return jnp.full(_checked("constant", shape, dtype), value, dtype)

    return init


def uniform(scale: Scalar = 1e-2, *, symmetric: bool = False) -> Initializer:
    """U(0, scale), the convention of JAX and Flax, or with ``symmetric`` U(-scale, scale), Keras'.

    The variance is scale²/12, or scale²/3 if symmetric.

    >>> print(f"{uniform(0.1)(jax.random.key(0), (1000,)).mean():.2f}")
    0.05
    """
    _check_scale("uniform", "scale", scale)
    low = -1 if symmetric else 0

    def draw(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, low) * jnp.array(scale, dtype)

    return _random("uniform", draw)


def normal(stddev: Scalar = 1e-2) -> Initializer:
    """N(0, stddev²).

    >>> print(f"{normal(0.1)(jax.random.key(0), (500, 500)).std():.3f}")
    0.100
    """
    _check_scale("normal", "stddev", stddev)

    def draw(key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * jnp.array(stddev, dtype)

    return _random("normal", draw)


def truncated_normal(stddev: Scalar = 1e-2, *, lower: Scalar = -2.0, upper: Scalar = 2.0) -> Initializer:
    """N(0, stddev²) kept within [lower·stddev, upper·stddev].

    ``stddev`` is that before the truncation, JAX's convention: what is drawn has 0.8796·stddev under
    the default bounds, for which ``variance_scaling`` corrects and this does not.

    >>> print(f"{truncated_normal(0.1)(jax.random.key(0), (500, 500)).std():.3f}")
    0.088
    """
    _check_scale("truncated_normal", "stddev", stddev)
    if is_static_number(lower) and is_static_number(upper) and not lower < upper:
        raise ValueError(f"truncated_normal needs lower < upper, got lower={lower} and upper={upper}")

    def draw(key, shape, dtype):
        return jax.random.truncated_normal(key, lower, upper, shape, dtype) * jnp.array(stddev, dtype)

    return _random("truncated_normal", draw)


def fans(
    shape: Sequence[int], in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), groups: int = 1
) -> tuple[int, int]:
    """How many inputs one output of a kernel sums over, and how many outputs one input reaches.

    fan_in = Π in · Π window and fan_out = Π out · Π window / groups. The window is every axis not named;
    ``batch_axis`` holds independent kernels and counts for neither.

    ================================================  ===========================  ====================
    kernel                                            arguments                    fan_in, fan_out
    ================================================  ===========================  ====================
    dense (in, out)                                                                in, out
    convolution (*window, in // groups, out)          groups=groups                Πw·in/g, Πw·out/g
    attention, to heads (d_model, heads, head_dim)    in_axis=0, out_axis=(1, 2)   d, h·k
    attention, from heads (heads, head_dim, d_model)  in_axis=(0, 1), out_axis=2   h·k, d
    embedding (vocabulary, features)                  in_axis=1, out_axis=0        features, vocabulary
    ================================================  ===========================  ====================

    JAX and PyTorch leave ``groups`` out: their fan_in of a grouped kernel is this one, their fan_out is
    ``groups`` times as large. PyTorch's transposed kernels are (in, out, *window), which exchanges its
    two fans. Strides count nowhere. Flax writes the embedding's axes as ``out_axis=0`` alone; that names
    axis 0 twice and makes both fans the number of features.

    Raises ValueError for an axis that the shape lacks or that is named twice, and for outputs that do
    not divide into ``groups``.

    >>> fans((3, 3, 16, 64), groups=4)
    (144, 144)
    >>> fans((512, 8, 64), in_axis=0, out_axis=(1, 2))
    (512, 512)
    """
    return _fans("fans", tuple(shape), in_axis, out_axis, batch_axis, groups)


def variance_scaling(
    scale: Scalar,
    mode: str,
    distribution: str,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    *,
    groups: int = 1,
) -> Initializer:
    """Mean 0 and variance scale/n, with n a function of the kernel's fans (JAX's, Keras' convention).

    Args:
      scale: of the variance: 1 for linear layers, 2 before a ReLU, which halves E[x²].
      mode: n is ``fan_in`` (keeps the size of activations), ``fan_out`` (of gradients), their mean
        ``fan_avg``, their geometric mean ``fan_geo_avg`` or their sum ``fan_sum``.
      distribution: ``normal``; ``truncated_normal``, within two standard deviations and divided by
        0.8796 so that the variance is still scale/n; or ``uniform``, within ±√(3·scale/n).
      in_axis, out_axis, batch_axis, groups: see :func:`fans`.

    Raises ValueError for an unknown ``mode`` or ``distribution`` and for what ``fans`` does.

    >>> x = variance_scaling(2.0, "fan_out", "normal")(jax.random.key(0), (300, 200))
    >>> print(f"{x.std():.3f}")
    0.100
    """
    return _scaled("variance_scaling", scale, mode, distribution, in_axis, out_axis, batch_axis, groups)


def he_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), *, groups: int = 1, truncated: bool = True
) -> Initializer:
    """Normal of variance 2/fan_in, for kernels before a ReLU; ``truncated`` at 2 standard deviations.

    He et al. 2015, arXiv:1502.01852. JAX's is truncated, PyTorch's ``kaiming_normal_`` is not.

    >>> print(f"{he_normal()(jax.random.key(0), (200, 300)).std():.3f}")
    0.100
    """
    return _scaled("he_normal", 2.0, "fan_in", _normal(truncated), in_axis, out_axis, batch_axis, groups)


def he_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), *, groups: int = 1
) -> Initializer:
    """U(±√(6/fan_in)), for kernels before a ReLU.

    He et al. 2015, arXiv:1502.01852; the same in JAX and PyTorch (``kaiming_uniform_``).

    >>> print(f"{abs(he_uniform()(jax.random.key(0), (600, 100))).max():.3f}")
    0.100
    """
    return _scaled("he_uniform", 2.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, groups)


def xavier_normal(
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    *,
    groups: int = 1,
    mode: str = "fan_avg",
    truncated: bool = True,
) -> Initializer:
    """Normal of variance 2/(fan_in + fan_out), for kernels before a tanh or a sigmoid.

    Glorot and Bengio 2010. JAX's is ``truncated`` at 2 standard deviations, PyTorch's
    ``xavier_normal_`` is not; the lecture's is not either and has the variance 1/(fan_in + fan_out),
    which is ``mode="fan_sum"``.

    >>> print(f"{xavier_normal()(jax.random.key(0), (300, 500)).std():.3f}")
    0.050
    """
    return _scaled("xavier_normal", 1.0, mode, _normal(truncated), in_axis, out_axis, batch_axis, groups)


def xavier_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), *, groups: int = 1, mode: str = "fan_avg"
) -> Initializer:
    """U(±√(6/(fan_in + fan_out))), for kernels before a tanh or a sigmoid.

    Glorot and Bengio 2010; the same in JAX and PyTorch (``xavier_uniform_``).

    >>> print(f"{abs(xavier_uniform()(jax.random.key(0), (200, 400))).max():.3f}")
    0.100
    """
    return _scaled("xavier_uniform", 1.0, mode, "uniform", in_axis, out_axis, batch_axis, groups)


def lecun_normal(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), *, groups: int = 1, truncated: bool = True
) -> Initializer:
    """Normal of variance 1/fan_in, for linear layers and before SELU; ``truncated`` as in JAX.

    LeCun et al. 1998, "Efficient BackProp"; Flax's default for dense and convolution kernels.

    >>> print(f"{lecun_normal()(jax.random.key(0), (100, 300)).std():.3f}")
    0.100
    """
    return _scaled("lecun_normal", 1.0, "fan_in", _normal(truncated), in_axis, out_axis, batch_axis, groups)


def lecun_uniform(
    in_axis: Axes = -2, out_axis: Axes = -1, batch_axis: Axes = (), *, groups: int = 1
) -> Initializer:
    """U(±√(3/fan_in)), for linear layers and before SELU.

    LeCun et al. 1998, "Efficient BackProp"; JAX.

    >>> print(f"{abs(lecun_uniform()(jax.random.key(0), (300, 100))).max():.3f}")
    0.100
    """
    return _scaled("lecun_uniform", 1.0, "fan_in", "uniform", in_axis, out_axis, batch_axis, groups)


kaiming_normal, kaiming_uniform = he_normal, he_uniform
glorot_normal, glorot_uniform = xavier_normal, xavier_uniform


def orthogonal(scale: Scalar = 1.0, column_axis: int = -1) -> Initializer:
    """A uniformly distributed matrix W of orthogonal columns, or rows where they are fewer, times ``scale``.

    W is the kernel as (all other axes, ``column_axis``): WᵀW = scale²·I with no more columns than rows,
    else WWᵀ = scale²·I. Half precision is drawn in float32 and rounded. ValueError for a shape of fewer
    than two axes. (Saxe et al. 2014, arXiv:1312.6120; JAX.)

    >>> w = orthogonal()(jax.random.key(0), (64, 16))
    >>> bool(jnp.allclose(w.T @ w, jnp.eye(16), atol=1e-5))
    True
    """
    _check_scale("orthogonal", "scale", scale)

    def draw(key, shape, dtype):
        if len(shape) < 2:
            raise ValueError(f"orthogonal needs a shape of at least two axes, got {shape}")
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        (axis,) = _axes("orthogonal", "column_axis", column_axis, shape)
        rest = shape[:axis] + shape[axis + 1 :]
        # The QR decompositions of LAPACK and cuSOLVER know no half precision.
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        q = jax.random.orthogonal(key, math.prod(rest), (), wide, shape[axis])
        q = jnp.moveaxis(q.reshape(*rest, shape[axis]), -1, axis)
        return jnp.array(scale, dtype) * q.astype(dtype)

    return _random("orthogonal", draw)


def _random(what: str, draw: Callable[..., Array]) -> Initializer:
    """``draw(key, shape, dtype)`` behind the checks of what it is called with."""

    def init(key, shape, dtype=jnp.float32):
        check_key(key, what)
        return draw(key, _checked(what, shape, dtype), dtype)

    return init


def _scaled(what, scale, mode, distribution, in_axis, out_axis, batch_axis, groups) -> Initializer:
    """``variance_scaling`` under the name by which the user knows it."""
    _check_scale(what, "scale", scale)
    if mode not in _MODES:
        raise unknown_name("mode", mode, _MODES)
    if distribution not in _DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, _DISTRIBUTIONS)

    def draw(key, shape, dtype):
        n = _MODES[mode](*_fans(what, shape, in_axis, out_axis, batch_axis, groups))
        # An empty kernel has no fan to divide by, and no value to scale.
        variance = jnp.array(scale / (n or 1), dtype)
        return _DISTRIBUTIONS[distribution](key, shape, dtype, variance)

    return _random(what, draw)


_MODES = {
    "fan_in": lambda n_in, n_out: n_in,
    "fan_out": lambda n_in, n_out: n_out,
    "fan_avg": lambda n_in, n_out: (n_in + n_out) / 2,
    "fan_geo_avg": lambda n_in, n_out: (n_in * n_out) ** 0.5,
    "fan_sum": lambda n_in, n_out: n_in + n_out,
}


def _truncated(key, shape, dtype, variance):
    # The number is the standard deviation of a standard normal truncated to [-2, 2].
    stddev = jnp.sqrt(variance) / jnp.array(0.87962566103423978, dtype)
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) * stddev


_DISTRIBUTIONS = {
    "truncated_normal": _truncated,
    "normal": lambda key, shape, dtype, v: jax.random.normal(key, shape, dtype) * jnp.sqrt(v),
    "uniform": lambda key, shape, dtype, v: jax.random.uniform(key, shape, dtype, -1) * jnp.sqrt(3 * v),
}


def _normal(truncated: bool) -> str:
    return "truncated_normal" if truncated else "normal"


def _fans(what, shape, in_axis, out_axis, batch_axis, groups) -> tuple[int, int]:
    ins = _axes(what, "in_axis", in_axis, shape)
    outs = _axes(what, "out_axis", out_axis, shape)
    named = (*ins, *outs, *_axes(what, "batch_axis", batch_axis, shape))
    if len(set(named)) < len(named):
        raise ValueError(
            f"{what}: in_axis={in_axis}, out_axis={out_axis} and batch_axis={batch_axis} name an axis of "
            f"{shape} twice; for an embedding write in_axis=1, out_axis=0"
        )
    n_in, n_out = math.prod(shape[i] for i in ins), math.prod(shape[i] for i in outs)
    if not isinstance(groups, int) or groups < 1 or n_out % groups:
        raise ValueError(f"{what}: groups={groups!r} must be a positive int that divides the {n_out} outputs")
    window = math.prod(size for i, size in enumerate(shape) if i not in named)
    return n_in * window, n_out // groups * window


def _axes(what, argument, axes, shape) -> tuple[int, ...]:
    """``axes`` as a tuple, counted from the front."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"{what}: shape {shape} has no axis {argument}={axis}: a kernel is (..., in, out). Start "
                "biases with zeros and scales with ones, or name the axes that the shape has"
            )
    return tuple(axis % len(shape) for axis in axes)


def _checked(what, shape, dtype) -> tuple[int, ...]:
    """``shape`` as a tuple, where ``dtype`` is one that a parameter can have."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{what} needs a floating-point dtype and got {jnp.dtype(dtype).name}: parameters are "
            "differentiated, pass jnp.float32 or jnp.bfloat16"
        )
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _check_scale(what, argument, value) -> None:
    if is_static_number(value):
        if not 0 <= value < math.inf:
            raise ValueError(f"{what} needs a finite {argument} of at least 0, got {argument}={value}")
    elif not hasattr(value, "dtype"):
        raise TypeError(f"{what} needs a number for {argument}, got {argument}={value!r}")
