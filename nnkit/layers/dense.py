"""The fully connected layer."""

from __future__ import annotations

from typing import Any

from nnkit import initializers, ops
from nnkit.layers.lift import float_input, kernel_and_bias, param, positive_int
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["dense"]


def dense(
    features: int,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
) -> Layer:
    """An affine map of the last axis, ``y = x W + b``.

    Shapes: x (batch, ..., in), ``kernel`` W (in, features), ``bias`` b (features,),
    y (batch, ..., features). Parameters take the dtype of ``x``. Flax's defaults: a LeCun-normal
    kernel and zero biases; He's (``initializers.he_normal()``) suits ReLU.

    Raises:
      LayerError: for input that is not floating-point, or whose last axis is not the kernel's.

    >>> layer = layers.dense(2)
    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.array([0.0, 1.0])}
    >>> y, _ = layer.apply(params, {}, jnp.array([[3.0, 4.0]]), train=False)
    >>> y.tolist()
    [[3.0, 9.0]]
    """
    features = positive_int(features, "dense(features=...)")

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        float_input("dense", x)
        shape = (x.shape[-1], features)
        return kernel_and_bias(key, shape, features, x.dtype, kernel_init, bias_init, use_bias), {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        float_input("dense", x)
        why = f"its input has shape {x.shape}"
        y = ops.linear(x, param("dense", params, "kernel", (x.shape[-1], features), why))
        if use_bias:
            y = y + param("dense", params, "bias", (features,), why)
        return y, state

    return Layer(init, apply, "dense_")
