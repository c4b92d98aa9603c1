"""The parameters of gated cells: one kernel whose columns are the gates, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.layers.lift import float_input, param
from nnkit.tree import wide
from nnkit.types import Array, Initializer, Params, Spec

__all__ = ["add_bias", "bias_of", "gate_params", "input_product", "recurrent_product"]


def gate_params(
    layer: str,
    key: Array,
    x: Spec,
    features: int,
    gates: int,
    kernel_init: Initializer,
    recurrent_kernel_init: Initializer,
    bias_inits: Sequence[Initializer],
) -> dict[str, Any]:
    """``kernel`` (in, gates·features), ``recurrent_kernel`` (features, gates·features) and ``bias``.

    Each gate's block is drawn by itself, so an orthogonal recurrent kernel is so gate by gate and fans
    are those of one gate, as in Flax. ``bias_inits`` has one for each block of the bias; none for no bias.
    """
    float_input(layer, x)
    if len(x.shape) != 2:
        raise LayerError(
            layer, f"takes (batch, channels) at each time step, got {x.shape}: flatten what is more"
        )
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    params: dict[str, Any] = {
        "kernel": _blocks(keys[0], [kernel_init] * gates, (x.shape[-1], features), x.dtype),
        "recurrent_kernel": _blocks(keys[1], [recurrent_kernel_init] * gates, (features, features), x.dtype),
    }
    if bias_inits:
        params["bias"] = _blocks(keys[2], bias_inits, (features,), x.dtype)
    return params


def _blocks(key: Array, inits: Sequence[Initializer], shape: tuple[int, ...], dtype: Any) -> Array:
    drawn = [init(jax.random.fold_in(key, i), shape, dtype) for i, init in enumerate(inits)]
    return jnp.concatenate(drawn, axis=-1)


def input_product(layer: str, params: Params, x: Array, columns: int) -> Array:
    """``x @ kernel``."""
    float_input(layer, x)
    why = f"its input at one time step has shape {x.shape}"
    return jnp.matmul(x, param(layer, params, "kernel", (x.shape[-1], columns), why))


def recurrent_product(layer: str, params: Params, h: Array, dtype: Any, columns: int) -> Array:
    """``h @ recurrent_kernel``."""
    why = f"it feeds back {h.shape[-1]} features"
    kernel = param(layer, params, "recurrent_kernel", (h.shape[-1], columns), why)
    return jnp.matmul(h.astype(dtype), kernel)


def bias_of(layer: str, params: Params, columns: int, why: str) -> Array:
    """``bias``, checked."""
    return param(layer, params, "bias", (columns,), why)


def add_bias(z: Array, bias: Array) -> Array:
    """``z + bias``, whose gradient for the bias, a sum over all rows of z, is made in float32 at least."""
    rows = jnp.broadcast_to(bias.astype(wide(bias.dtype)), z.shape)
    return z + rows.astype(bias.dtype)
