"""Batch normalisation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnkit import initializers
from nnkit.checks import LayerError, is_static_number
from nnkit.layers.lift import float_input, param
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["batch_norm"]


def batch_norm(
    *,
    momentum: float | Array = 0.99,
    epsilon: float | Array = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    unbiased: bool = False,
    scale_init: Initializer = initializers.ones,
    bias_init: Initializer = initializers.zeros,
) -> Layer:
    """Normalises each channel over all other axes, then scales and shifts it.

    ``y = (x - m) / sqrt(v + epsilon) * scale + bias``. In training m and v are the batch's mean
    and (biased) variance, the latter by a second pass over x - m, since E[x²] - m² loses all
    digits where the mean is large; the running statistics move by
    ``r <- momentum r + (1 - momentum) batch``. At test time m and v are the running statistics.

    Shapes: x (batch, ..., channels); parameters ``scale, bias`` and state ``mean, var``
    (channels,). Half-precision input is normalised in float32.

    Args:
      momentum: how much of the running statistics stays (Flax's; PyTorch's ``momentum`` is one
        minus this: its default 0.1 is 0.9 here).
      epsilon: added to the variance.
      use_scale: whether there is a learned scale.
      use_bias: whether there is a learned shift.
      unbiased: whether the running variance takes n/(n-1) times the batch's, as in PyTorch.
      scale_init: makes the scale.
      bias_init: makes the shift.

    Raises:
      LayerError: in training with one value per channel, whose variance is 0.

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
    if is_static_number(epsilon) and not epsilon >= 0:
        raise ValueError(f"batch_norm(epsilon=...) must not be negative, got {epsilon}")

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        float_input("batch_norm", x)
        shape = (x.shape[-1],)
        dtype = jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype
        bias_key = jax.random.fold_in(key, 1)
        params: dict[str, Any] = {}
        if use_scale:
            params["scale"] = scale_init(key, shape, dtype)
        if use_bias:
            params["bias"] = bias_init(bias_key, shape, dtype)
        return params, {"mean": jnp.zeros(shape, dtype), "var": jnp.ones(shape, dtype)}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        float_input("batch_norm", x)
        shape, why = (x.shape[-1],), f"its input has shape {x.shape}"
        mean, var = (param("batch_norm", state, name, shape, why) for name in ("mean", "var"))
        wide = x.astype(mean.dtype)
        scale = param("batch_norm", params, "scale", shape, why) if use_scale else jnp.ones_like(mean)
        bias = param("batch_norm", params, "bias", shape, why) if use_bias else jnp.zeros_like(mean)
        eps = jnp.asarray(epsilon, mean.dtype)
        if not train:
            y = (wide - mean) * (jax.lax.rsqrt(var + eps) * scale) + bias
            return y.astype(x.dtype), state
        n = x.size // max(x.shape[-1], 1)
        if n <= 1:
            raise LayerError(
                "batch_norm",
                f"got input of shape {x.shape} when train=True, one value per channel, whose "
                "variance is 0: pass a larger batch, or train=False",
            )
        y, *seen = _normalized(wide, scale, bias, eps)
        seen_mean, seen_var = jax.lax.stop_gradient(seen)
        keep, take = (jnp.asarray(m, mean.dtype) for m in (momentum, 1 - momentum))
        state = {
            "mean": keep * mean + take * seen_mean,
            "var": keep * var + take * (seen_var * (n / (n - 1)) if unbiased else seen_var),
        }
        return y.astype(x.dtype), state

    return Layer(init, apply, "batch_norm_")


@jax.custom_jvp
def _normalized(x: Array, scale: Array, bias: Array, epsilon: Array) -> tuple[Array, Array, Array]:
    """x to mean bias and deviation scale in each channel, and the mean and variance that it had."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    centred = x - mean
    var = jnp.mean(jnp.square(centred), axes)
    return centred * (jax.lax.rsqrt(var + epsilon) * scale) + bias, mean, var


@_normalized.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Any:
    """The derivative with its sums over the batch made once.

    With x̂ the normalised x and a = scale/√(var + epsilon),
    ``dy = a·dx + x̂·(dscale − a·mean(x̂·dx)) + (dbias − a·mean(dx))``. Backwards the two brackets are the
    gradients of scale and bias, and that of x needs no other sums over the batch; what
    differentiation makes of the formula of y has one more. Second derivatives go through mean and var,
    which therefore have theirs.
    """
    x, scale, _, epsilon = primals
    dx, dscale, dbias, depsilon = tangents
    axes = tuple(range(x.ndim - 1))
    y, mean, var = _normalized(*primals)
    square = 1 / (var + epsilon)
    root = jax.lax.rsqrt(var + epsilon)
    normal = (x - mean) * root
    a = scale * root
    mean_dx, mean_ndx = jnp.mean(dx, axes), jnp.mean(normal * dx, axes)
    dscale = dscale - a * mean_ndx - scale * square * depsilon / 2
    dy = a * dx + normal * dscale + (dbias - a * mean_dx)
    return (y, mean, var), (dy, mean_dx, 2 * mean_ndx / root)
