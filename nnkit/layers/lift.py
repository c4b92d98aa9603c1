"""From plain functions to layers, and the small helpers that every layer uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["flatten", "identity", "stateless"]


def stateless(f: Callable[[Any], Any], *, name: str | None = None) -> Layer:
    """A plain function of the input as a layer without parameters, state or randomness.

    The name defaults to the function's own.

    >>> square = layers.stateless(jnp.square)
    >>> y, state = square.apply({}, {}, jnp.array([3.0]), train=False)
    >>> float(y[0]), state
    (9.0, {})
    """
    if not callable(f):
        raise TypeError(f"stateless takes a function of the input, got {type(f).__name__}")

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        return {}, {}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        return f(x), state

    return Layer(init, apply, own_name(f, "stateless_") if name is None else name)


def own_name(f: Callable[..., Any], otherwise: str) -> str:
    """The kind that a function's own name gives, or ``otherwise`` for a lambda.

    >>> own_name(jnp.tanh, "stateless_"), own_name(lambda x: x, "stateless_")
    ('tanh_', 'stateless_')
    """
    own = getattr(f, "__name__", "")
    return f"{own}_" if own.isidentifier() and not own.endswith("_") else otherwise


identity: Layer = stateless(lambda x: x, name="identity_")
"""The layer that returns its input."""


def _flatten(x: Array) -> Array:
    if x.ndim == 0:
        raise LayerError("flatten", "needs a batch axis, got a scalar")
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


flatten: Layer = stateless(_flatten, name="flatten_")
"""All axes but the first in one: (batch, height, width, channels) -> (batch, features)."""


def float_input(layer: str, x: Any) -> Any:
    """Returns ``x`` if it is a floating array (or spec) with a batch axis, raises otherwise."""
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    if dtype is None or shape is None:
        raise LayerError(layer, f"takes an array, got {type(x).__name__}")
    if not shape:
        raise LayerError(layer, "takes an array with a batch axis, got a scalar")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise LayerError(
            layer, f"takes floating-point input, got {dtype} of shape {shape}: write x.astype(jnp.float32)"
        )
    return x


def param(layer: str, params: Params, name: str, shape: tuple[int, ...], why: str) -> Array:
    """The parameter ``name``, raising where it is missing or not of the shape that is needed."""
    if name not in params:
        raise LayerError(
            layer,
            f"has no {name!r} among {sorted(params)}: pass the parameters and the state that this model's init made",
        )
    value = params[name]
    if value.shape != shape:
        raise LayerError(layer, f"has a {name} of shape {value.shape} and needs {shape}: {why}")
    return value


def positive_int(value: Any, what: str) -> int:
    """``value`` as an int of at least 1, or an error that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, jax.Array):
        raise TypeError(f"{what} must be a whole number, got {value!r}")
    if value.__index__() < 1:
        raise ValueError(f"{what} must be at least 1, got {value}")
    return value.__index__()


def kernel_and_bias(
    key: Array,
    kernel_shape: tuple[int, ...],
    features: int,
    dtype: Any,
    kernel_init: Initializer,
    bias_init: Initializer,
    use_bias: bool,
) -> Params:
    """The parameters of an affine layer."""
    bias_key = jax.random.fold_in(key, 1)
    params = {"kernel": kernel_init(key, kernel_shape, dtype)}
    if use_bias:
        params["bias"] = bias_init(bias_key, (features,), dtype)
    return params
