"""Batch normalisation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from nnkit import initializers
from nnkit.checks import LayerError, is_static_number
from nnkit.layers.children import is_inferring
from nnkit.layers.lift import param
from nnkit.layers.normalization import Affine, bound_axis, check_epsilon, split, usable
from nnkit.ops.moments import number
from nnkit.ops.normalize import normalize
from nnkit.tree import wide
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["batch_norm"]


def batch_norm(
    *,
    momentum: float | Array = 0.99,
    epsilon: float | Array = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    unbiased: bool = False,
    use_running_average: bool = False,
    axis_name: Hashable | None = None,
    scale_init: Initializer = initializers.ones,
    bias_init: Initializer = initializers.zeros,
) -> Layer:
    """Normalises each channel over all other axes, then scales and shifts it.

    ``y = (x - m) / sqrt(v + epsilon) * scale + bias``. In training m and v are the batch's mean
    and (biased) variance, the latter by a second pass over x - m, since E[x²] - m² loses all
    digits where the mean is large; the running statistics move by
    ``r <- momentum r + (1 - momentum) batch``. At test time m and v are the running statistics.

    Shapes: x (batch, ..., channels), or a pair (x, mask); parameters ``scale, bias`` and state
    ``mean, var`` (channels,); y as x. A mask has the axes of x from the first on, each as long or of
    length 1: (batch,) for whole examples, (batch, time) for positions. Entries where it is False count in
    no statistic and are normalised with the rest; a batch without a single one that counts comes out
    as ``x * scale + bias`` and leaves the running statistics as they are. Half-precision input is
    normalised in float32.

    Args:
      momentum: how much of the running statistics stays (Flax's; PyTorch's ``momentum`` is one
        minus this: its default 0.1 is 0.9 here).
      epsilon: added to the variance.
      use_scale: whether there is a learned scale.
      use_bias: whether there is a learned shift.
      unbiased: whether the running variance takes n/(n-1) times the batch's, as in PyTorch.
      use_running_average: whether the running statistics normalise in training too, and stay as they
        are: frozen statistics, for fine-tuning on small batches.
      axis_name: the name (or names) of a mapped axis of ``jax.vmap`` or ``jax.shard_map`` along which
        the batch is cut up: the statistics are then those of the whole batch, and equal on all devices.
        Under ``jax.jit`` with sharded arrays they are so of themselves.
      scale_init: makes the scale.
      bias_init: makes the shift.

    Raises:
      LayerError: in training with one value per channel, whose variance is 0; outside an axis called
        ``axis_name``; for a mask of another shape.

    Source: Ioffe & Szegedy 2015, "Batch normalization"; conventions of Flax by default, and of
    PyTorch with ``batch_norm(momentum=0.9, unbiased=True)``.

    >>> layer = layers.batch_norm()
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 1)))
    >>> y, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
    >>> y.round(3).tolist(), state["mean"].round(3).tolist(), state["var"].round(3).tolist()
    ([[-1.0], [1.0]], [0.02...], [1.0])
    """
    if is_static_number(momentum) and not 0 <= momentum <= 1:
        raise ValueError(f"batch_norm(momentum=...) must be in [0, 1], got {momentum}")
    check_epsilon("batch_norm", epsilon)
    affine = Affine(use_scale, use_bias, scale_init, bias_init)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        x, _ = split("batch_norm", x)
        shape, dtype = (x.shape[-1],), wide(x.dtype)
        params = affine.init(key, shape, dtype)
        return params, {"mean": jnp.zeros(shape, dtype), "var": jnp.ones(shape, dtype)}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        x, mask = split("batch_norm", x)
        shape, why = (x.shape[-1],), f"its input has shape {x.shape}"
        mean, var = (param("batch_norm", state, name, shape, why) for name in ("mean", "var"))
        scale, bias = affine.read("batch_norm", params, x, (x.ndim - 1,))
        wide_x, where = usable(x, mask)
        if use_running_average or not train:
            m, v = mean.astype(scale.dtype), var.astype(scale.dtype)
            y = (wide_x - m) * (jax.lax.rsqrt(v + jnp.asarray(epsilon, v.dtype)) * scale) + bias
            return y.astype(x.dtype), state
        axis = bound_axis("batch_norm", axis_name)
        axes = tuple(range(x.ndim - 1))
        n = number(x.shape, axes, where=where, axis_name=axis)
        if isinstance(n, int) and n <= 1 and not is_inferring():
            raise LayerError(
                "batch_norm",
                f"got input of shape {x.shape} when train=True, one value per channel, whose "
                "variance is 0: pass a larger batch, or train=False",
            )
        y, *seen = normalize(wide_x, scale, bias, axes, epsilon=epsilon, where=where, axis_name=axis)
        seen_mean, seen_var = (s.reshape(shape).astype(mean.dtype) for s in jax.lax.stop_gradient(seen))
        if not isinstance(n, int):
            n = n.reshape(shape)
        return y.astype(x.dtype), {
            "mean": _moved(mean, seen_mean, momentum, n),
            "var": _moved(var, seen_var * _excess(n, var.dtype) if unbiased else seen_var, momentum, n),
        }

    return Layer(init, apply, "batch_norm_")


def _moved(old: Array, seen: Array, momentum: float | Array, n: int | Array) -> Array:
    """The running statistic after one more batch; where no entry counted, as it was."""
    keep, take = (jnp.asarray(m, old.dtype) for m in (momentum, 1 - momentum))
    new = keep * old + take * seen
    return new if isinstance(n, int) else jnp.where(n > 0, new, old)


def _excess(n: int | Array, dtype: Any) -> float | Array:
    """n/(n - 1), by which the unbiased variance exceeds the other."""
    return n / (n - 1) if isinstance(n, int) else n.astype(dtype) / jnp.maximum(n - 1, 1).astype(dtype)
