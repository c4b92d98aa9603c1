"""Layers that the toolkit does not have yet, written as any user would write a layer of his own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import initializers
from nnkit.types import Layer


def embedding(vocabulary: int, features: int) -> Layer:
    def init(key, x):
        table = initializers.normal(features**-0.5)(key, (vocabulary, features), jnp.float32)
        return {"embedding": table}, {}

    def apply(params, state, x, *, key=None, train):
        return params["embedding"][x], state

    return Layer(init, apply, "embedding_")


def layer_norm() -> Layer:
    def init(key, x):
        return {"scale": jnp.ones(x.shape[-1], x.dtype), "bias": jnp.zeros(x.shape[-1], x.dtype)}, {}

    def apply(params, state, x, *, key=None, train):
        x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
        return x * params["scale"] + params["bias"], state

    return Layer(init, apply, "layer_norm_")


def recurrent(features: int) -> Layer:
    """h_t = tanh(x_t U + h_{t-1} W + b); the last h is carried to the next call in the state."""

    def init(key, x):
        k1, k2 = jax.random.split(key)
        params = {
            "input_kernel": initializers.lecun_normal()(k1, (x.shape[-1], features), x.dtype),
            "kernel": initializers.orthogonal()(k2, (features, features), x.dtype),
            "bias": jnp.zeros(features, x.dtype),
        }
        return params, {"carry": jnp.zeros((x.shape[0], features), x.dtype)}

    def apply(params, state, x, *, key=None, train):
        def step(h, x_t):
            h = jnp.tanh(x_t @ params["input_kernel"] + h @ params["kernel"] + params["bias"])
            return h, h

        carry, ys = jax.lax.scan(step, state["carry"], jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(ys, 0, 1), {"carry": carry}

    return Layer(init, apply, "recurrent_")


def causal_attention(heads: int, cache: int | None = None) -> Layer:
    """Self-attention over what came before.

    With ``cache`` the layer takes one position at a time and keeps keys and values of up to
    ``cache`` positions in its state; its parameters are those of the layer without one.
    """

    def init(key, x):
        k1, k2 = jax.random.split(key)
        features = x.shape[-1]
        params = {
            "qkv_kernel": initializers.lecun_normal()(k1, (features, 3 * features), x.dtype),
            "out_kernel": initializers.lecun_normal()(k2, (features, features), x.dtype),
        }
        if cache is None:
            return params, {}
        room = jnp.zeros((x.shape[0], cache, heads, features // heads), x.dtype)
        return params, {"keys": room, "values": room, "position": jnp.zeros((), jnp.int32)}

    def apply(params, state, x, *, key=None, train):
        batch, length, features = x.shape
        qkv = (x @ params["qkv_kernel"]).reshape(batch, length, 3, heads, features // heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            at = state["position"]
            keys = jax.lax.dynamic_update_slice_in_dim(state["keys"], k, at, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(state["values"], v, at, axis=1)
            seen = (jnp.arange(cache) <= at)[None, None, None, :]
            y = jax.nn.dot_product_attention(q, keys, values, mask=seen)
            state = {"keys": keys, "values": values, "position": at + 1}
        return y.reshape(batch, length, features) @ params["out_kernel"], state

    return Layer(init, apply, "causal_attention_")
