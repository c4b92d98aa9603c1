"""Initializers whose variance goes by the number of inputs and outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit.checks import unknown_name
from nnkit.initializers.arguments import Scalar, check_scale, drawn
from nnkit.initializers.fans import Axes, fans_for
from nnkit.types import Initializer

__all__ = [
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
]


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


def _scaled(what, scale, mode, distribution, in_axis, out_axis, batch_axis, groups) -> Initializer:
    """``variance_scaling`` under the name by which the user knows it."""
    check_scale(what, "scale", scale)
    if mode not in _MODES:
        raise unknown_name("mode", mode, _MODES)
    if distribution not in _DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, _DISTRIBUTIONS)

    def draw(key, shape, dtype):
        n = _MODES[mode](*fans_for(what, shape, in_axis, out_axis, batch_axis, groups))
        # An empty kernel has no fan to divide by, and no value to scale.
        variance = jnp.array(scale / (n or 1), dtype)
        return _DISTRIBUTIONS[distribution](key, shape, dtype, variance)

    return drawn(what, draw)


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
