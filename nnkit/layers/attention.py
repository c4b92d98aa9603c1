"""Multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit import initializers, ops
from nnkit.checks import LayerError, check_key, check_probability, is_static_number
from nnkit.layers.attention_cache import next_index
from nnkit.layers.dropout import dropout
from nnkit.layers.layer_norm import layer_norm
from nnkit.layers.lift import param, positive_int
from nnkit.layers.positions import sequence_input
from nnkit.modes import draws
from nnkit.ops.attention import Implementation
from nnkit.types import Array, Initializer, Layer, Params, Spec, State

__all__ = ["Attend", "multi_head_attention"]

_NAME = "multi_head_attention"


class Attend(NamedTuple):
    """What :func:`multi_head_attention` takes beside a plain array.

    Attributes:
      query: what asks, (batch, q, features).
      key: what is asked, (batch, k, features of its own); the query itself by default.
      value: what is answered, (batch, k, features of its own); the key by default.
      mask: True where a query may attend, four axes that broadcast to (batch, heads, q, k); see
        ``ops.padding_mask`` and ``ops.causal_mask``.
    """

    query: Any
    key: Any = None
    value: Any = None
    mask: Any = None


def multi_head_attention(
    num_heads: int,
    *,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_key_value_heads: int | None = None,
    causal: bool = False,
    rotary: Callable[[Array, Array], Array] | None = None,
    normalize_qk: bool = False,
    dropout_rate: float | Array = 0.0,
    broadcast_dropout: bool = True,
    use_bias: bool = True,
    kernel_init: Initializer = initializers.lecun_normal(),  # noqa: B008 - a pure function
    bias_init: Initializer = initializers.zeros,
    cache_length: int | None = None,
    implementation: Implementation = "matmul",
) -> Layer:
    """Attention in several heads: projections, ``ops.dot_product_attention`` in each head, a projection.

    Shapes: x (batch, time, features), or :class:`Attend` for keys and values of another sequence and for
    masks; y (batch, time, out_features). Parameters are ``query``, ``key`` and ``value``, each with
    ``kernel`` (features, heads, head_dim) and ``bias`` (heads, head_dim), and ``out`` with ``kernel``
    (heads, head_dim, out_features) and ``bias``: Flax's. A query that may attend to nothing gets 0 from
    attention, and so the bias of ``out``; its gradients are 0 and never NaN. What a mask hides from all
    queries may hold NaN, which then reaches no gradient either.

    **Decoding.** With ``cache_length`` calls with train=False take the next one or several positions of
    each sequence, keep their keys and values in the state (``cached_key``, ``cached_value``, ``index``), and
    attend to all that came before; a mask then stands over all cache_length keys. Trained parameters of
    the layer without a cache go straight in, and piece by piece gives what the whole sequence gives at
    once. Past ``cache_length`` it raises, and in compiled code gives NaN. The cache is for the batch size
    of ``init``'s x. With train=True it is left alone.

    Args:
      num_heads: how many heads.
      qkv_features: the heads' widths together; the query's features by default.
      out_features: of the output; the query's features by default.
      num_key_value_heads: heads of keys and values, a divisor of ``num_heads`` (grouped queries).
      causal: whether each position attends only to itself and what came before.
      rotary: turns queries and keys by their positions: ``ops.rotary``, with another convention
        ``functools.partial(ops.rotary, interleaved=True)``, or any function of them and the positions.
      normalize_qk: whether queries and keys are layer-normalised in each head with a learned scale
        (``query_ln``, ``key_ln``; Dehghani et al. 2023).
      dropout_rate: the probability of dropping an attention weight.
      broadcast_dropout: whether all examples and heads drop the same weights (Flax's, and cheaper), or
        each its own (PyTorch's).
      use_bias: whether projections have biases.
      kernel_init: makes the kernels, as matrices (in, out).
      bias_init: makes the biases.
      cache_length: how many positions can be decoded; needs ``causal=True``.
      implementation: see ``ops.dot_product_attention``.

    Raises:
      ValueError: for widths that the heads do not divide.
      LayerError: for shapes that do not fit, without a key where it drops, and when the cache is full.

    Source: Vaswani et al. 2017, "Attention is all you need"; Flax's ``MultiHeadDotProductAttention``.

    >>> x, lengths = jnp.ones((2, 5, 8)), jnp.array([5, 3])
    >>> layer = layers.multi_head_attention(2, causal=True)
    >>> params, state = layer.init(jax.random.key(0), x)
    >>> y, _ = layer.apply(params, state, x, train=False)
    >>> padded = layers.Attend(x, mask=ops.padding_mask(lengths, 5))
    >>> z, _ = layer.apply(params, state, padded, train=False)
    >>> y.shape, z.shape
    ((2, 5, 8), (2, 5, 8))
    >>> decoder = layers.multi_head_attention(2, causal=True, cache_length=5)
    >>> _, cache = decoder.init(jax.random.key(0), x)
    >>> prompt, cache = decoder.apply(params, cache, x[:, :4], train=False)
    >>> last, cache = decoder.apply(params, cache, x[:, 4:], train=False)
    >>> bool((abs(last - y[:, 4:]) < 1e-6).all())
    True
    """
    num_heads = positive_int(num_heads, f"{_NAME}(num_heads)")
    kv_heads = num_heads
    if num_key_value_heads is not None:
        kv_heads = positive_int(num_key_value_heads, f"{_NAME}(num_key_value_heads=...)")
    if num_heads % kv_heads:
        raise ValueError(
            f"{_NAME}(num_key_value_heads={kv_heads}) must divide num_heads={num_heads}: each serves as many"
        )
    if qkv_features is not None and positive_int(qkv_features, f"{_NAME}(qkv_features=...)") % num_heads:
        raise ValueError(f"{_NAME}(qkv_features={qkv_features}) must be a multiple of num_heads={num_heads}")
    if out_features is not None:
        positive_int(out_features, f"{_NAME}(out_features=...)")
    if cache_length is not None:
        positive_int(cache_length, f"{_NAME}(cache_length=...)")
        if not causal:
            raise ValueError(
                f"{_NAME}(cache_length={cache_length}) needs causal=True: what is decoded now cannot see what "
                "comes later"
            )
    check_probability(dropout_rate, f"{_NAME}(dropout_rate=...)")
    drops = not (is_static_number(dropout_rate) and float(dropout_rate) == 0.0)
    norm = layer_norm(use_bias=False)

    def widths(x: Attend) -> tuple[int, int]:
        """Width of a head, and of the output."""
        features = x.query.shape[-1]
        if qkv_features is None and features % num_heads:
            raise LayerError(
                _NAME,
                f"has {num_heads} heads and input of shape {x.query.shape}, whose {features} features they do "
                f"not divide: pass qkv_features={-(-features // num_heads) * num_heads}",
            )
        return (qkv_features or features) // num_heads, out_features or features

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        x = _inputs(x, cache_length)
        head_dim, out = widths(x)
        keys = jax.random.split(key, 6)
        dtype = x.query.dtype
        shapes = {
            "query": ((x.query.shape[-1],), (num_heads, head_dim)),
            "key": ((x.key.shape[-1],), (kv_heads, head_dim)),
            "value": ((x.value.shape[-1],), (kv_heads, head_dim)),
            "out": ((num_heads, head_dim), (out,)),
        }
        params: dict[str, Any] = {}
        for k, (name, (ins, outs)) in zip(keys[:4], shapes.items(), strict=True):
            bias_key = jax.random.fold_in(k, 1)
            kernel = kernel_init(k, (math.prod(ins), math.prod(outs)), dtype)
            params[name] = {"kernel": kernel.reshape(*ins, *outs)}
            if use_bias:
                params[name]["bias"] = bias_init(bias_key, (math.prod(outs),), dtype).reshape(outs)
        if normalize_qk:
            head = jax.ShapeDtypeStruct((1, head_dim), dtype)
            params["query_ln"] = norm.init(keys[4], head)[0]
            params["key_ln"] = norm.init(keys[5], head)[0]
        if cache_length is None:
            return params, {}
        room = (x.query.shape[0], cache_length, kv_heads, head_dim)
        return params, {
            "cached_key": jnp.zeros(room, dtype),
            "cached_value": jnp.zeros(room, dtype),
            "index": jnp.zeros((), jnp.int32),
        }

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        x = _inputs(x, cache_length)
        head_dim, out = widths(x)
        room = None if train else cache_length
        if room is None:
            x = _usable(x)
        elif x.mask is not None and x.mask.shape[-1] not in (1, room):
            raise LayerError(
                _NAME,
                f"has cache_length={room} and got a mask of shape {x.mask.shape}: when train=False a mask stands "
                f"over all {room} keys of the cache, (batch, heads, q, {room})",
            )
        q = _project(params, "query", x.query, (num_heads, head_dim), use_bias)
        k = _project(params, "key", x.key, (kv_heads, head_dim), use_bias)
        v = _project(params, "value", x.value, (kv_heads, head_dim), use_bias)
        if normalize_qk:
            q, _ = norm.apply(params.get("query_ln", {}), {}, q, train=train)
            k, _ = norm.apply(params.get("key_ln", {}), {}, k, train=train)
        index = jnp.zeros((), jnp.int32) if room is None else next_index(_NAME, state, q.shape[1], room)
        if rotary is not None:
            q, k = (rotary(a, index + jnp.arange(a.shape[1], dtype=index.dtype)) for a in (q, k))
        mask = x.mask
        if room is not None:
            k, v = _append(state, "cached_key", k, index), _append(state, "cached_value", v, index)
            state = {"cached_key": k, "cached_value": v, "index": index + q.shape[1]}
            k, v = k.astype(q.dtype), v.astype(q.dtype)  # a cache may be wider than what is computed in
            before = ops.causal_mask(q.shape[1], room, offset=index)
            mask = before if mask is None else mask & before
        factors = None
        if drops and draws(train):
            factors = _dropout_factors(key, dropout_rate, q, k, broadcast_dropout)
        y = ops.dot_product_attention(
            q, k, v, mask=mask, causal=causal and room is None, dropout=factors, implementation=implementation
        )
        if room is not None:
            y = jnp.where(index + q.shape[1] <= room, y, jnp.asarray(jnp.nan, y.dtype))
        return _project(params, "out", y, (out,), use_bias), state

    return Layer(init, apply, f"{_NAME}_")


def _inputs(x: Any, cache_length: int | None) -> Attend:
    x = Attend(*x) if isinstance(x, tuple) else Attend(x)
    if cache_length is not None and not (x.key is None and x.value is None):
        raise LayerError(
            _NAME, "decodes its own sequence alone and got keys: leave out cache_length for these"
        )
    if x.key is None and x.value is not None:
        raise LayerError(_NAME, "got values without keys: pass Attend(query, key, value)")
    if getattr(x.key, "dtype", None) == jnp.bool_:
        raise LayerError(_NAME, "got a boolean key: pass a mask by its name, layers.Attend(x, mask=mask)")
    key = x.query if x.key is None else x.key
    x = x._replace(key=key, value=key if x.value is None else x.value)
    for array in x[:3]:
        sequence_input(_NAME, array)
    q, k, v = (array.shape[:2] for array in x[:3])
    if q[0] != k[0] or k != v:
        raise LayerError(
            _NAME,
            f"got query {x.query.shape}, key {x.key.shape} and value {x.value.shape}: batches must be equal, and "
            "keys as many as values",
        )
    if x.mask is not None and x.mask.dtype != jnp.bool_:
        raise LayerError(
            _NAME, f"takes a boolean mask, True where a query may attend, got {x.mask.dtype}: write mask > 0"
        )
    return x


def _usable(x: Attend) -> Attend:
    """x with 0 for each NaN or inf of a key that no query may see: it would reach gradients as 0·NaN."""
    if x.mask is None or x.mask.ndim != 4 or x.mask.shape[-1] not in (1, x.key.shape[1]):
        return x  # the operator refuses what does not fit
    seen = jnp.any(x.mask, (1, 2))[..., None]

    def clean(a: Array) -> Array:
        return jnp.where(seen | jnp.isfinite(a), a, jnp.zeros((), a.dtype))

    key = clean(x.key)
    return x._replace(
        query=key if x.query is x.key else x.query,
        key=key,
        value=key if x.value is x.key else clean(x.value),
    )


def _project(params: Params, name: str, x: Array, outs: tuple[int, ...], use_bias: bool) -> Array:
    """An affine map of all axes of ``x`` but the first two."""
    part, ins = params.get(name, {}), x.shape[2:]
    why = f"that of {name!r}, whose input has shape {x.shape}"
    kernel = param(_NAME, part, "kernel", (*ins, *outs), why)
    y = ops.linear(x.reshape(*x.shape[:2], -1), kernel.reshape(math.prod(ins), math.prod(outs)))
    y = y.reshape(*x.shape[:2], *outs)
    return y + param(_NAME, part, "bias", outs, why) if use_bias else y


def _append(state: State, name: str, new: Array, index: Array) -> Array:
    cached = state[name]
    if (cached.shape[0], *cached.shape[2:]) != (new.shape[0], *new.shape[2:]):
        raise LayerError(
            _NAME,
            f"has a cache {cached.shape} and got {new.shape} to append: make it by init with an x of the same "
            "batch size",
        )
    return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), index, axis=1)


def _dropout_factors(key: Array | None, rate: float | Array, q: Array, k: Array, broadcast: bool) -> Array:
    if key is None:
        raise LayerError(
            _NAME, "drops attention weights and needs a key when train=True: pass apply(..., key=key)"
        )
    check_key(key, f"{_NAME}.apply")
    lead = (1, 1) if broadcast else (q.shape[0], q.shape[2])
    ones = jnp.ones((*lead, q.shape[1], k.shape[1]), q.dtype)
    return dropout(rate).apply({}, {}, ones, key=key, train=True)[0]
